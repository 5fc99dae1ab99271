"""Who is in the lab: three networks that reuse one address range, two guests in each.

The guests of one network have the very addresses and MAC addresses of the other networks' guests,
so that only the network tells them apart. Pure: the one random word of a run is passed in.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

__all__ = [
    "CIDR4",
    "DAEMON_PREFIX",
    "CIDR6",
    "GATEWAY4",
    "GATEWAY6",
    "HOST_NAMESPACE",
    "PREFIX",
    "PROOF",
    "Guest",
    "LabNetwork",
    "guests",
    "networks",
    "records",
]

PREFIX: Final = "imdsdemo-"
"""How the name of every namespace of the lab begins."""

DAEMON_PREFIX: Final = "imdsdm"
"""The daemon's `host.name_prefix`: how the names of what it makes itself begin."""

HOST_NAMESPACE: Final = f"{PREFIX}host"
"""The lab's host: the daemon, HAProxy, the bridges."""

CIDR4: Final = "10.0.0.0/24"
CIDR6: Final = "fd00:a9fe::/64"
GATEWAY4: Final = "10.0.0.1"
GATEWAY6: Final = "fd00:a9fe::1"

PROOF: Final = "/proof/written"
"""The file that each guest's user-data writes."""

_UUIDS: Final = uuid.UUID("0d6f1c1e-6a0b-4d0e-8d43-5a1c0de0feed")

Yaml: TypeAlias = "str | int | bool | bytes | list[Yaml] | dict[str, Yaml]"


@dataclass(frozen=True, slots=True)
class LabNetwork:
    """One network, how the daemon reaches it, and where the guests' cables end.

    Attributes:
        id: Its id, also the name of its bridge.
        kind: The listener's kind, for the reader's eyes.
        listener: The record's `listener`.
        namespace: The namespace that holds the bridge.
        routed: The bridge itself carries the gateway's addresses.
        metadata: The lab, not the daemon, puts the metadata addresses on the bridge.
    """

    id: str
    kind: str
    listener: Mapping[str, str]
    namespace: str
    routed: bool
    metadata: bool = False


@dataclass(frozen=True, slots=True)
class Guest:
    """One guest, and everything that it must read.

    Attributes:
        written: What its user-data writes into `PROOF`.
        ssh_keys: OpenSSH public key lines.
    """

    name: str
    network: str
    netns: str
    uuid: str
    hostname: str
    zone: str
    mac: str
    ipv4: str
    ipv6: str
    ssh_keys: tuple[str, ...]
    user_data: bytes
    written: str

    @property
    def instance_id(self) -> str:
        """EC2's form of the id: `i-` and the first 17 hexadecimal digits of the UUID."""
        return f"i-{self.uuid.replace('-', '')[:17]}"

    @property
    def user_data_sha256(self) -> str:
        """Hexadecimal SHA-256 of the bytes that the store was given."""
        return hashlib.sha256(self.user_data).hexdigest()

    @property
    def enter(self) -> list[str]:
        """What to put before a command so that it runs as this guest."""
        return ["ip", "netns", "exec", self.netns]


def networks() -> tuple[LabNetwork, ...]:
    """The three networks: one for each kind of listener."""
    return (
        LabNetwork(
            id="red",
            kind="namespace",
            listener={"namespace": f"{PREFIX}red", "device": "red"},
            namespace=f"{PREFIX}red",
            routed=True,
            metadata=True,
        ),
        LabNetwork(
            id="green",
            kind="bridge",
            listener={"bridge": "green"},
            namespace=HOST_NAMESPACE,
            routed=False,
        ),
        LabNetwork(
            id="blue",
            kind="interface",
            listener={"interface": "blue"},
            namespace=HOST_NAMESPACE,
            routed=True,
        ),
    )


def guests(word: str) -> tuple[Guest, ...]:
    """All guests; `word` makes this run's user-data unlike any earlier run's."""
    return tuple(
        _guest(network.id, letter, number, word)
        for network in networks()
        for number, letter in enumerate("ab", start=11)
    )


def _guest(network: str, letter: str, number: int, word: str) -> Guest:
    name = f"{network}-{letter}"
    written = f"{name} {word}"
    return Guest(
        name=name,
        network=network,
        netns=f"{PREFIX}{name}",
        uuid=str(uuid.uuid5(_UUIDS, name)),
        hostname=f"{name}.test",
        zone=f"zone-{network}",
        mac=f"fa:16:3e:00:00:{number:02x}",
        ipv4=f"10.0.0.{number}",
        ipv6=f"fd00:a9fe::{number}",
        ssh_keys=(f"ssh-ed25519 {_key_text(name)} {name}@demo.test",),
        user_data=_cloud_config(written) if letter == "a" else _gzipped_script(written),
        written=written,
    )


def _key_text(name: str) -> str:
    """The base64 of an Ed25519 public key's wire form; nobody has the private half."""
    body = hashlib.sha256(name.encode()).digest()
    kind = b"ssh-ed25519"
    wire = len(kind).to_bytes(4, "big") + kind + len(body).to_bytes(4, "big") + body
    return base64.b64encode(wire).decode()


def _cloud_config(written: str) -> bytes:
    return (f"#cloud-config\nwrite_files:\n- path: {PROOF}\n  content: {written}\n").encode()


def _gzipped_script(written: str) -> bytes:
    script = f"#!/bin/sh\nprintf '%s' '{written}' >{PROOF}\n"
    return gzip.compress(script.encode(), mtime=0)


def records(word: str) -> dict[str, Yaml]:
    """The record file that the command line feeds to the daemon: `networks` and `instances`."""
    return {
        "networks": [_network_record(network) for network in networks()],
        "instances": [_instance_record(guest) for guest in guests(word)],
    }


def _network_record(network: LabNetwork) -> Yaml:
    return {
        "id": network.id,
        "name": f"{network.id} network",
        "project": network.id,
        "listener": dict(network.listener),
        "subnets": [
            {"cidr": CIDR4, "gateway": GATEWAY4},
            {"cidr": CIDR6, "gateway": GATEWAY6},
        ],
        "mtu": 1500,
    }


def _instance_record(guest: Guest) -> Yaml:
    keys: list[Yaml] = list(guest.ssh_keys)
    addresses: list[Yaml] = [guest.ipv4, guest.ipv6]
    return {
        "id": guest.uuid,
        "name": guest.name,
        "hostname": guest.hostname,
        "project": guest.network,
        "ports": [{"network": guest.network, "mac": guest.mac, "addresses": addresses}],
        "ssh_keys": keys,
        "tags": {"color": guest.network},
        "availability_zone": guest.zone,
        "instance_type": "demo.small",
        "user_data": guest.user_data,
    }
