"""Records of the running daemon as values of the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from imdsproxy.cli.admin_client import path_to
from imdsproxy.core.records import Refused, parse_instance, parse_network
from imdsproxy.errors import AdminError

if TYPE_CHECKING:
    from imdsproxy.cli.admin_client import AdminClient
    from imdsproxy.core.model import Instance, Network

__all__ = ["read_instance", "read_network", "read_networks"]


def read_instance(daemon: AdminClient, instance: str) -> Instance:
    """One instance.

    Raises:
        NotFound: There is none of that id.
        AdminError: The daemon is of another version, and its records are not understood.
    """
    record = _record(daemon, "instances", instance)
    read = parse_instance(record)
    if isinstance(read, Refused):
        raise _unread("instance", instance)
    return read


def read_network(daemon: AdminClient, network: str) -> Network:
    """One network; raises as `read_instance`."""
    read = parse_network(_record(daemon, "networks", network))
    if isinstance(read, Refused):
        raise _unread("network", network)
    return read


def read_networks(daemon: AdminClient) -> list[Network]:
    """All networks; raises as `read_network`."""
    found: list[Network] = []
    for shape in cast("Sequence[Mapping[str, Mapping[str, object]]]", daemon.get("/v1/networks")):
        read = parse_network(shape["record"])
        if isinstance(read, Refused):
            raise _unread("network", str(shape["record"].get("id")))
        found.append(read)
    return found


def _record(daemon: AdminClient, kind: str, name: str) -> object:
    shape = cast("Mapping[str, object]", daemon.get(path_to(kind, name)))
    return shape["record"]


def _unread(what: str, name: str) -> AdminError:
    return AdminError(
        f"the daemon's record of {what} {name} is not understood",
        hint="is the daemon of the same version as this command?",
    )
