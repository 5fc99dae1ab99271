"""What can be done to a host for a listener: values that `listeners.apply` carries out.

Each is idempotent: done twice, or on a host that is that way already, it changes nothing. Removals belong to no
network. `action` says what an op does, for an error's message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from imdsproxy.core.hoststate import Family
from imdsproxy.core.model import IpAddress, NetworkId


@dataclass(frozen=True, slots=True)
class CreateNamespace:
    """Make a namespace of ours: `lo` up and marked, router advertisements ignored."""

    action: ClassVar[str] = "create namespace {0.namespace}"
    network: NetworkId
    namespace: str
    alias: str


@dataclass(frozen=True, slots=True)
class DeleteNamespace:
    """Remove a namespace of ours, and with it the veth pair that ends in it."""

    action: ClassVar[str] = "delete namespace {0.namespace}"
    network: ClassVar[None] = None

    namespace: str


@dataclass(frozen=True, slots=True)
class CreateVeth:
    """Make a veth pair between a bridge and a namespace of ours, both ends up and marked."""

    action: ClassVar[str] = "attach {0.link} to bridge {0.bridge}"
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

    action: ClassVar[str] = "delete link {0.link}"
    network: ClassVar[None] = None

    link: str


@dataclass(frozen=True, slots=True)
class SetLink:
    """Change a device; `namespace` is `None` for the host's own.

    Attributes:
        up: Set it up; false leaves it as it is.
        mtu: In bytes, `None` to leave it.
        bridge: Make it a port of this bridge, `None` to leave it.
    """

    action: ClassVar[str] = "set up device {0.device}"
    network: NetworkId
    namespace: str | None
    device: str
    up: bool = False
    mtu: int | None = None
    bridge: str | None = None


@dataclass(frozen=True, slots=True)
class AddAddress:
    """Put an address on a device, without duplicate address detection, marked with `protocol`."""

    action: ClassVar[str] = "add {0.address} on device {0.device}"
    network: NetworkId
    namespace: str | None
    device: str
    address: IpAddress
    prefix: int
    protocol: int


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    """Take an address away again."""

    action: ClassVar[str] = "remove {0.address} on device {0.device}"
    network: ClassVar[None] = None

    namespace: str | None
    device: str
    address: IpAddress
    prefix: int


@dataclass(frozen=True, slots=True)
class AddDefaultRoute:
    """Reach every address of a family directly on a device (scope link, no gateway)."""

    action: ClassVar[str] = "add a route to device {0.device}"
    network: NetworkId
    namespace: str
    device: str
    family: Family


HostOp: TypeAlias = (
    CreateNamespace
    | DeleteNamespace
    | CreateVeth
    | DeleteLink
    | SetLink
    | AddAddress
    | RemoveAddress
    | AddDefaultRoute
)


@dataclass(frozen=True, slots=True)
class OpFailure:
    """An op that the host refused, in words for the operator."""

    op: HostOp
    reason: str
    hint: str = ""
