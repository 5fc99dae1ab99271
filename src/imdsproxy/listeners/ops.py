"""What can be done to a host for a listener: values that `listeners.apply` carries out.

Each is idempotent: done twice, or on a host that is that way already, it changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from imdsproxy.core.hoststate import Family
from imdsproxy.core.model import IpAddress, NetworkId


@dataclass(frozen=True, slots=True)
class CreateNamespace:
    """Make a namespace of ours: `lo` up and marked, router advertisements ignored."""

    network: NetworkId
    namespace: str
    alias: str


@dataclass(frozen=True, slots=True)
class DeleteNamespace:
    """Remove a namespace of ours, and with it the veth pair that ends in it."""

    namespace: str


@dataclass(frozen=True, slots=True)
class CreateVeth:
    """Make a veth pair between a bridge and a namespace of ours, both ends up and marked."""

    network: NetworkId
    link: str
    bridge: str
    namespace: str
    inner: str
    mtu: int
    alias: str


@dataclass(frozen=True, slots=True)
class DeleteLink:
    """Remove a link of ours from the host's own namespace."""

    link: str


@dataclass(frozen=True, slots=True)
class AttachLink:
    """Make a link of ours a port of a bridge."""

    network: NetworkId
    link: str
    bridge: str


@dataclass(frozen=True, slots=True)
class SetMtu:
    """Give a device an MTU in bytes; `namespace` is `None` for the host's own."""

    network: NetworkId
    namespace: str | None
    device: str
    mtu: int


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Set a device up; `namespace` is `None` for the host's own."""

    network: NetworkId
    namespace: str | None
    device: str


@dataclass(frozen=True, slots=True)
class AddAddress:
    """Put an address on a device, without duplicate address detection, marked with `protocol`."""

    network: NetworkId
    namespace: str | None
    device: str
    address: IpAddress
    prefix: int
    protocol: int


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    """Take an address away again."""

    namespace: str | None
    device: str
    address: IpAddress
    prefix: int


@dataclass(frozen=True, slots=True)
class AddDefaultRoute:
    """Reach every address of a family directly on a device (scope link, no gateway)."""

    network: NetworkId
    namespace: str
    device: str
    family: Family


HostOp: TypeAlias = (
    CreateNamespace
    | DeleteNamespace
    | CreateVeth
    | DeleteLink
    | AttachLink
    | SetMtu
    | LinkUp
    | AddAddress
    | RemoveAddress
    | AddDefaultRoute
)
