"""What a guest reads with curl, and whether it is its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeAlias

import yaml

from demo.processes import CommandError, inside, run
from demo.roster import Guest

__all__ = ["PATHS", "Dialect", "Documents", "Reading", "Transport", "judge_documents", "read"]

Documents: TypeAlias = Mapping[str, bytes]
"""Bodies by path."""


class Dialect(StrEnum):
    """A tree of documents."""

    EC2 = "ec2"
    OPENSTACK = "openstack"
    NOCLOUD = "nocloud"


class Transport(StrEnum):
    """The address that a guest asks."""

    IPV4 = "http://169.254.169.254"
    IPV6 = "http://[fe80::a9fe:a9fe%25eth0]"


_EC2: Final = "latest/meta-data"
_OPENSTACK: Final = "openstack/latest"
PATHS: Final = {
    Dialect.EC2: (
        f"{_EC2}/instance-id",
        f"{_EC2}/hostname",
        f"{_EC2}/local-ipv4",
        f"{_EC2}/placement/availability-zone",
        f"{_EC2}/public-keys/0/openssh-key",
        "latest/user-data",
    ),
    Dialect.OPENSTACK: (
        f"{_OPENSTACK}/meta_data.json",
        f"{_OPENSTACK}/network_data.json",
        f"{_OPENSTACK}/user_data",
    ),
    Dialect.NOCLOUD: (
        "nocloud/meta-data",
        "nocloud/network-config",
        "nocloud/vendor-data",
        "nocloud/user-data",
    ),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What one guest saw of one dialect over one transport.

    Attributes:
        faults: Everything that is not the guest's own; empty when all is well.
    """

    instance_id: str
    hostname: str
    user_data_sha256: str
    faults: tuple[str, ...]


def read(guest: Guest, dialect: Dialect, transport: Transport, *, directory: Path) -> Reading:
    """Reads the dialect's documents by one curl; they stay below `directory` to be looked at."""
    target = directory / f"{guest.name}.{dialect}.{transport.name.lower()}"
    argv = ["curl", "--silent", "--show-error", "--fail-early", "--fail", "--globoff"]
    argv += ["--max-time", "20", "--noproxy", "*", "--create-dirs"]
    files = {path: target / path for path in PATHS[dialect]}
    for path, file in files.items():
        file.unlink(missing_ok=True)
        argv += [f"{transport}/{path}", "--output", str(file)]
    try:
        run(inside(guest.netns, argv), timeout_s=60)
    except CommandError as failed:
        return Reading("", "", "", (str(failed).rpartition("curl: ")[2],))
    # curl makes no file for an empty body
    bodies = {path: file.read_bytes() if file.exists() else b"" for path, file in files.items()}
    return judge_documents(guest, dialect, bodies)


def judge_documents(guest: Guest, dialect: Dialect, bodies: Documents) -> Reading:
    """Compares the documents with what the guest's record says."""
    try:
        return _JUDGES[dialect](guest, bodies)
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        return Reading("", "", "", (f"a document of another shape: {error!r}",))


def _differences(pairs: Mapping[str, tuple[object, object]]) -> Iterator[str]:
    for what, (own, seen) in pairs.items():
        if own != seen:
            yield f"{what} is {seen!r}, not {own!r}"


def _judge_ec2(guest: Guest, bodies: Documents) -> Reading:
    def text(name: str) -> str:
        return bodies[f"{_EC2}/{name}"].decode()

    digest = hashlib.sha256(bodies["latest/user-data"]).hexdigest()
    faults = _differences(
        {
            "instance-id": (guest.instance_id, text("instance-id")),
            "hostname": (guest.hostname, text("hostname")),
            "local-ipv4": (guest.ipv4, text("local-ipv4")),
            "availability-zone": (guest.zone, text("placement/availability-zone")),
            "openssh-key": (guest.ssh_keys[0], text("public-keys/0/openssh-key").strip()),
            "user-data": (guest.user_data_sha256, digest),
        }
    )
    return Reading(text("instance-id"), text("hostname"), digest, tuple(faults))


def _judge_openstack(guest: Guest, bodies: Documents) -> Reading:
    meta = json.loads(bodies[f"{_OPENSTACK}/meta_data.json"])
    network = json.loads(bodies[f"{_OPENSTACK}/network_data.json"])
    digest = hashlib.sha256(bodies[f"{_OPENSTACK}/user_data"]).hexdigest()
    addresses = {entry.get("ip_address") for entry in network["networks"]}
    faults = _differences(
        {
            "uuid": (guest.uuid, meta["uuid"]),
            "hostname": (guest.hostname, meta["hostname"]),
            "availability_zone": (guest.zone, meta["availability_zone"]),
            "public_keys": (list(guest.ssh_keys), _stripped(meta["public_keys"].values())),
            "links": ([guest.mac], [entry["ethernet_mac_address"] for entry in network["links"]]),
            "ip_address": ({guest.ipv4, guest.ipv6}, addresses),
            "user_data": (guest.user_data_sha256, digest),
        }
    )
    return Reading(meta["uuid"], meta["hostname"], digest, tuple(faults))


def _stripped(keys: object) -> list[str]:
    return [str(key).strip() for key in list(keys)]  # type: ignore[call-overload] # JSON's values


def _judge_nocloud(guest: Guest, bodies: Documents) -> Reading:
    meta = yaml.safe_load(bodies["nocloud/meta-data"])
    network = bodies["nocloud/network-config"].decode().lower()
    digest = hashlib.sha256(bodies["nocloud/user-data"]).hexdigest()
    faults = _differences(
        {
            "instance-id": (guest.uuid, meta["instance-id"]),
            "local-hostname": (guest.hostname, meta["local-hostname"]),
            "network-config's MAC": (True, guest.mac in network),
            "network-config's address": (True, guest.ipv4 in network),
            "user-data": (guest.user_data_sha256, digest),
        }
    )
    return Reading(meta["instance-id"], meta["local-hostname"], digest, tuple(faults))


_JUDGES: Final[Mapping[Dialect, Callable[[Guest, Documents], Reading]]] = {
    Dialect.EC2: _judge_ec2,
    Dialect.OPENSTACK: _judge_openstack,
    Dialect.NOCLOUD: _judge_nocloud,
}
