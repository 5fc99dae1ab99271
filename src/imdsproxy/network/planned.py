"""Values that plans of listeners consist of: endpoints, networks that are not served, and operations on the host."""

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Interface
from typing import ClassVar, Final, TypeAlias

from imdsproxy.host.names import Naming
from imdsproxy.host.state import Effect, Family, ListeningSocket, NamespaceRef
from imdsproxy.model.entities import IpAddress, MacAddress, NetworkId
from imdsproxy.sources.ovn.ports import BridgePort, IpInterface, devices_of, namespace_of

LOOPBACK = "lo"

ENSLAVING: Final = frozenset({"bridge", "bond", "team", "openvswitch"})
"""Kinds of devices that take over the packets of their ports."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address and port that HAProxy can bind now.

    Attributes:
        device: Device to bind to (`interface DEV`); always set for IPv6, whose address is link-local.
        device_index: Index of the device, 0 without a device. If another device gets the name later, the index differs,
            and a socket bound to the old device receives nothing.
    """

    network: NetworkId
    address: IpAddress
    port: int
    device: str | None
    namespace: NamespaceRef | None
    device_index: int = 0


class NotServedCode(StrEnum):
    PENDING = "pending"
    NAMESPACE_MISSING = "namespace-missing"
    NAMESPACE_UNUSABLE = "namespace-unusable"
    DEVICE_MISSING = "device-missing"
    DEVICE_DOWN = "device-down"
    DEVICE_ENSLAVED = "device-enslaved"
    NOT_A_BRIDGE = "not-a-bridge"
    NAME_TAKEN = "name-taken"
    ADDRESS_MISSING = "address-missing"
    ADDRESS_ON_LOOPBACK = "address-on-loopback"
    ADDRESS_TENTATIVE = "address-tentative"
    ADDRESS_DUPLICATE = "address-duplicate"
    PORT_BUSY = "port-busy"
    BIND_REFUSED = "bind-refused"
    LISTENER_SHARED = "listener-shared"
    HOST_METADATA = "host-metadata"
    FOREIGN_LISTENER = "foreign-listener"
    NETWORK_CONFLICT = "network-conflict"
    HOST_REFUSED = "host-refused"

    @property
    def silent(self) -> bool:
        """Whether no event reports the end of the problem, so that it must be polled.

        There are events for namespaces, devices and addresses, and none for sockets and refusals.
        """
        return self in {
            NotServedCode.PORT_BUSY,
            NotServedCode.BIND_REFUSED,
            NotServedCode.NAMESPACE_UNUSABLE,
            NotServedCode.NAME_TAKEN,
            NotServedCode.HOST_REFUSED,
        }


@dataclass(frozen=True, slots=True)
class NotServed:
    """Network that is not served now.

    Attributes:
        reason: Problem, in one sentence without a full stop.
        hint: Correction, and who can make it; empty if the problem ends by itself.
        sockets: Sockets of other programs at its address and port, as far as known.
    """

    network: NetworkId
    family: Family | None
    code: NotServedCode
    reason: str
    hint: str = ""
    sockets: tuple[ListeningSocket, ...] = ()

    def __str__(self) -> str:
        over = "" if self.family is None else f" over IPv{self.family.value}"
        alone = " by imdsproxy alone" if self.code is NotServedCode.FOREIGN_LISTENER else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"network {self.network} is not served{over}{alone}: {self.reason}{hint}"


@dataclass(frozen=True, slots=True)
class Foreign:
    """Listening socket of another program at a network's address and port."""

    network: NetworkId
    family: Family
    effect: Effect
    socket: ListeningSocket


@dataclass(frozen=True, slots=True)
class MetadataPlace:
    """Planned namespace and devices of a network on this host.

    Attributes:
        port: Id of the network's metadata port, to which the device on the bridge belongs.
        mtu: MTU in bytes; `None` leaves the MTU unchanged.
        interfaces: Addresses of the metadata port in subnets that have ports here, its link-local address, and the
            metadata addresses.
        in_user_space: Whether Open vSwitch forwards packets in user space, and needs their checksums.
    """

    network: NetworkId
    port: str
    mac: MacAddress
    mtu: int | None
    interfaces: frozenset[IpInterface]
    bridge: str
    in_user_space: bool

    @property
    def namespace(self) -> str:
        return namespace_of(self.network)

    @property
    def outer(self) -> str:
        return devices_of(self.network)[0]

    @property
    def inner(self) -> str:
        return devices_of(self.network)[1]

    @property
    def plugged(self) -> BridgePort:
        return BridgePort(self.bridge, self.port, self.network)

    def addresses(self, *, ipv6: bool) -> frozenset[IpInterface]:
        if ipv6:
            return self.interfaces
        return frozenset(one for one in self.interfaces if isinstance(one, IPv4Interface))


@dataclass(frozen=True, slots=True)
class AttachBridge:
    """Create the missing parts of a bridge's listener, with our mark: namespace, veth pair, addresses, routes."""

    action: ClassVar[str] = "attach a namespace to bridge {0.bridge}"
    network: NetworkId
    bridge: str
    mtu: int
    naming: Naming


@dataclass(frozen=True, slots=True)
class AddAddress:
    """Put an address on a device, without duplicate address detection, marked with `protocol`."""

    action: ClassVar[str] = "add {0.address} on device {0.device}"
    network: NetworkId
    namespace: str | None
    device: str
    address: IpAddress
    protocol: int


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    action: ClassVar[str] = "remove {0.address} on device {0.device}"
    network: ClassVar[None] = None
    namespace: str | None
    device: str
    address: IpAddress
    prefix: int


@dataclass(frozen=True, slots=True)
class DeleteNamespace:
    """Remove one of our namespaces and the veth pair that ends there."""

    action: ClassVar[str] = "delete namespace {0.namespace}"
    network: ClassVar[None] = None
    device: ClassVar[None] = None
    namespace: str


@dataclass(frozen=True, slots=True)
class AttachOvn:
    """Create the missing parts of the namespace and veth pair of one of OVN's networks."""

    action: ClassVar[str] = "make the namespace of network {0.network}"
    place: MetadataPlace
    naming: Naming

    @property
    def network(self) -> NetworkId:
        return self.place.network


@dataclass(frozen=True, slots=True)
class DetachOvn:
    """Remove the namespace and veth pair of one of OVN's networks, perhaps made by another program."""

    action: ClassVar[str] = "remove the namespace of network {0.owner}"
    network: ClassVar[None] = None
    owner: NetworkId
    naming: Naming


@dataclass(frozen=True, slots=True)
class ChangePorts:
    """Change Open vSwitch's ports in one transaction.

    Attributes:
        plug: Places whose device Open vSwitch does not have, or has elsewhere.
    """

    network: ClassVar[None] = None
    plug: tuple[MetadataPlace, ...]
    unplug: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeleteLink:
    action: ClassVar[str] = "delete link {0.device}"
    network: ClassVar[None] = None
    namespace: ClassVar[None] = None
    device: str


class RouterTable(StrEnum):
    """Table of nf_tables in a router's namespace (`network.listeners.rules`)."""

    DROP = "drop"
    REDIRECT = "redirect"

    def name_in(self, naming: Naming) -> str:
        return f"{naming.prefix}-{self.value}"


@dataclass(frozen=True, slots=True)
class MakeTable:
    """Create a table in a router's namespace, or replace the table of another version."""

    action: ClassVar[str] = "make table {0.name} in namespace {0.namespace.name}"
    network: ClassVar[None] = None
    namespace: NamespaceRef
    table: RouterTable
    naming: Naming

    @property
    def name(self) -> str:
        return self.table.name_in(self.naming)


@dataclass(frozen=True, slots=True)
class RemoveTable:
    network: ClassVar[None] = None
    namespace: NamespaceRef
    table: RouterTable
    naming: Naming

    @property
    def name(self) -> str:
        return self.table.name_in(self.naming)


Removal: TypeAlias = RemoveAddress | DeleteNamespace | DeleteLink

ThreadOp: TypeAlias = AttachBridge | AddAddress | Removal | AttachOvn | DetachOvn | MakeTable
"""Operation that the namespaces' thread carries out (`network.listeners.apply`)."""

HostOp: TypeAlias = ThreadOp | RemoveTable | ChangePorts
"""Idempotent operation on the host."""
