"""Records of networks and guests, as mappings for the admin API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from bench.lab import GUESTS, guest

__all__ = ["USER_DATA_BYTES", "first_guest", "instance", "network", "user_data"]

USER_DATA_BYTES: Final = 4096


def user_data(size: int = USER_DATA_BYTES) -> str:
    """Return a shell script of exactly this many bytes."""
    head = "#!/bin/sh\n"
    return head + "#" * (size - len(head) - 1) + "\n"


def network(name: str) -> dict[str, object]:
    """Return the record of a network whose listener is the namespace of the same name."""
    return {
        "id": name,
        "name": name,
        "listener": {"namespace": name},
        "subnets": [{"cidr": str(GUESTS.network), "gateway": str(GUESTS.network[1])}],
    }


def instance(
    identity: str,
    ports: Mapping[str, Sequence[str]] | None = None,
    *,
    with_user_data: bool = True,
    tag: str = "",
) -> dict[str, object]:
    """Return the record of a guest as clouds make it: a key, a tag, user-data.

    Args:
        identity: The guest's id.
        ports: Addresses by network.
        with_user_data: Whether the guest has 4 KiB of user-data.
        tag: A tag that changes the revision.
    """
    record: dict[str, object] = {
        "id": identity,
        "name": identity,
        "project": "bench",
        "ports": [
            {"network": name, "addresses": list(addresses)}
            for name, addresses in (ports or {}).items()
        ],
        "ssh_keys": [
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBenchBenchBenchBenchBenchBenchBenchBenchBe bench"
        ],
        "tags": {"role": tag or "bench"},
        "availability_zone": "az-1",
        "instance_type": "m1.small",
    }
    if with_user_data:
        record["user_data"] = user_data()
    return record


def first_guest(name: str, *, with_user_data: bool = True) -> dict[str, object]:
    """Return the record of the guest at the first address of a network."""
    return instance(f"guest-{name}", {name: [guest(0)]}, with_user_data=with_user_data)
