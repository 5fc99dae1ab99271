"""Observed state of the host: namespaces, devices, addresses and listening sockets. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Final

from imdsproxy.model.entities import METADATA_IPV4, METADATA_IPV6, IpAddress

REDIRECTED: Final = "*"
"""Stands in place of a device: the port of redirected requests, at every address."""


class Family(IntEnum):
    IPV4 = 4
    IPV6 = 6

    @property
    def metadata_address(self) -> IpAddress:
        return METADATA_IPV4 if self is Family.IPV4 else METADATA_IPV6

    @property
    def any_address(self) -> IpAddress:
        return IPv4Address(0) if self is Family.IPV4 else IPv6Address(0)


@dataclass(frozen=True, slots=True, order=True)
class NamespaceRef:
    """Network namespace: its name in `/run/netns`, and its nsfs inode, which identifies it."""

    name: str
    inode: int


@dataclass(frozen=True, slots=True)
class ObservedDevice:
    """Network interface.

    Attributes:
        index: Kernel's number of the interface within its namespace.
        up: Whether the interface is administratively up (IFF_UP), with or without carrier.
        alias: The ifalias, empty if there is none.
        master: Index of its bridge, bond or VRF; 0 for none.
        kind: `veth`, `bridge`, `dummy`, … ; empty for hardware and loopback.
        mac: MAC from the kernel, empty if the device has none.
    """

    name: str
    index: int
    up: bool
    mtu: int
    alias: str = ""
    master: int = 0
    kind: str = ""
    mac: str = ""


class AddressState(StrEnum):
    USABLE = "usable"
    TENTATIVE = "tentative"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class ObservedAddress:
    """Metadata address on a device; `protocol` is IFA_PROTO, the program that added the address, 0 if unknown."""

    device: str
    address: IpAddress
    prefix: int
    state: AddressState = AddressState.USABLE
    protocol: int = 0


class Effect(StrEnum):
    BLOCKS = "blocks"
    """Our socket cannot be bound."""

    SHARES = "shares"
    """Both are bound (SO_REUSEPORT), and the foreign socket gets some or all of the guests' connections."""

    YIELDS = "yields"
    """Both are bound, and the kernel gives every connection to ours: the foreign socket is bound less precisely."""


@dataclass(frozen=True, slots=True)
class SocketOwner:
    pid: int
    command: str


class SocketState(StrEnum):
    MISSING = "missing"
    STALE = "stale"
    """Socket without a listener."""

    OURS = "ours"
    FOREIGN = "foreign"
    """Socket of another running process."""

    OCCUPIED = "occupied"
    """A file that is not a socket."""


@dataclass(frozen=True, slots=True)
class SeenSocket:
    """State of a socket's path at one moment.

    Attributes:
        owners: Processes that listen, for `FOREIGN`, as far as visible.
        orphaned: Whether HAProxy listens on a socket that is no longer at the path: no client can connect to it, and
            the next worker would inherit it.
    """

    state: SocketState
    owners: tuple[SocketOwner, ...] = ()
    orphaned: bool = False


@dataclass(frozen=True, slots=True)
class ListeningSocket:
    """TCP socket in state LISTEN that covers a metadata address.

    Attributes:
        address: Bound address; `0.0.0.0` and `::` are the wildcards.
        device: Name of the device to which it is bound, `None` for all.
        inode: The socket's inode, as `/proc/PID/fd` shows it.
        v6_only: Whether an IPv6 wildcard does not also accept IPv4.
        owners: All processes that hold the socket; empty if they could not be determined.
    """

    address: IpAddress
    port: int
    device: str | None
    inode: int
    v6_only: bool = False
    owners: tuple[SocketOwner, ...] = ()
    ours: bool = False


@dataclass(frozen=True, slots=True)
class ObservedEnd:
    """Further properties of the device in a namespace of OVN's networks.

    Attributes:
        interfaces: All addresses, with prefixes.
        ipv6: Whether the device accepts IPv6 addresses: IPv6 is enabled, and the MTU is large enough.
        has_checksums: Whether the kernel computes checksums for the device, instead of leaving them to a NIC.
    """

    interfaces: frozenset[IPv4Interface | IPv6Interface]
    ipv6: bool = True
    has_checksums: bool = False


@dataclass(frozen=True, slots=True)
class ObservedNamespace:
    """Observed state of one namespace. It is the host's own if `ref` is `None` and there is a device.

    Attributes:
        ref: Also `None` for a name of ours without a namespace, left by a process that was killed.
        default_routes: (family, device) of every default route in the main table; only for namespaces of ours.
        sockets: Sockets on a metadata address and the metadata port, ours included; if requests are redirected, sockets
            on the port of the redirection.
        trials: Result (errno, 0 for success) of a bind just like HAProxy's, made and closed at once, for each family
            and device of interest, or `REDIRECTED`.
        problem: Reason why the namespace could not be observed; all other fields are empty then.
        own_metadata: Sign that the host reads metadata of its own at the same address; empty if there is none.
        end: Device of OVN's network, if this is the namespace of one.
        tables: Names of our tables, current in form, in the namespace of a router.
    """

    ref: NamespaceRef | None
    devices: Mapping[str, ObservedDevice] = field(default_factory=dict)
    addresses: tuple[ObservedAddress, ...] = ()
    default_routes: frozenset[tuple[Family, str]] = frozenset()
    sockets: tuple[ListeningSocket, ...] = ()
    trials: Mapping[tuple[Family, str | None], int] = field(default_factory=dict)
    problem: str = ""
    own_metadata: str = ""
    end: ObservedEnd | None = None
    tables: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ObservedHost:
    """Observed state of the host.

    Attributes:
        asked: Names of a partial observation; `None` for all names in the directory.
        devices: Devices in `root` that a partial observation covers.
    """

    root: ObservedNamespace = field(default_factory=lambda: ObservedNamespace(None))
    namespaces: Mapping[str, ObservedNamespace] = field(default_factory=dict)
    asked: frozenset[str] | None = None
    devices: frozenset[str] = frozenset()

    def inode_of(self, namespace: str) -> int | None:
        """Return the inode of a namespace; `None` if there is no such namespace."""
        seen = self.namespaces.get(namespace)
        return None if seen is None or seen.ref is None else seen.ref.inode


def merge_observed(before: ObservedHost, part: ObservedHost) -> ObservedHost:
    """Replace in `before` everything that `part` covers."""
    asked = part.asked
    if asked is None:
        return part
    kept = {name: seen for name, seen in before.namespaces.items() if name not in asked}
    root = _merge_root(before.root, part.root, part.devices) if part.devices else before.root
    # Networks outside the part may listen on other devices of the namespace: keep their trials.
    for name, seen in part.namespaces.items():
        known = before.namespaces.get(name, seen)
        others = known.trials.keys() - seen.trials.keys()
        same = known.ref == seen.ref
        trials = {**known.trials, **seen.trials}
        kept[name] = replace(seen, trials=trials) if others and same else seen
    return ObservedHost(root, kept)


def _merge_root(
    before: ObservedNamespace, part: ObservedNamespace, asked: frozenset[str]
) -> ObservedNamespace:
    both = (before.devices, part.devices)
    indexes = {devices[name].index for devices in both for name in asked & devices.keys()}
    taken = indexes | {one.index for one in part.devices.values()}
    # The part has all ports of each bridge that it covers. A device under another name may be a renamed one.
    kept = {
        name: replace(one, master=0) if one.master in indexes else one
        for name, one in before.devices.items()
        if name not in asked and one.index not in taken
    }
    return replace(
        part,
        devices=kept | dict(part.devices),
        addresses=(*(one for one in before.addresses if one.device not in asked), *part.addresses),
        trials={
            **{one: error for one, error in before.trials.items() if one[1] not in asked},
            **part.trials,
        },
    )
