"""The observed state of the host: namespaces, devices, addresses and listening sockets. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from imdsproxy.core.model import METADATA_IPV4, METADATA_IPV6, IpAddress

REDIRECTED: Final = "*"
"""In place of a device: the port that requests are redirected to, at every address."""


class Family(IntEnum):
    """An address family by its version number."""

    IPV4 = 4
    IPV6 = 6

    @property
    def metadata_address(self) -> IpAddress:
        """The address at which guests of this family read metadata."""
        return METADATA_IPV4 if self is Family.IPV4 else METADATA_IPV6

    @property
    def any_address(self) -> IpAddress:
        """The address that stands for every one."""
        return IPv4Address(0) if self is Family.IPV4 else IPv6Address(0)


@dataclass(frozen=True, slots=True, order=True)
class NamespaceRef:
    """A network namespace: the name in `/run/netns` and the nsfs inode, which is its identity."""

    name: str
    inode: int


@dataclass(frozen=True, slots=True)
class ObservedDevice:
    """A network interface.

    Attributes:
        index: The kernel's number of it within its namespace.
        up: Administratively up (IFF_UP), with or without carrier.
        mtu: Bytes.
        alias: Its ifalias, empty when there is none.
        master: Index of the bridge, bond or VRF that it belongs to; 0 for none.
        kind: `veth`, `bridge`, `dummy`, … ; empty for hardware and loopback.
        mac: As the kernel gives it, empty when the device has none.
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
    """Whether an address can be bound."""

    USABLE = "usable"
    TENTATIVE = "tentative"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class ObservedAddress:
    """An address on a device. Only the two metadata addresses are ever observed.

    Attributes:
        protocol: The kernel's IFA_PROTO: who added it; 0 when unknown.
    """

    device: str
    address: IpAddress
    prefix: int
    state: AddressState = AddressState.USABLE
    protocol: int = 0


class Effect(StrEnum):
    """Effect of a foreign listening socket on ours (see `host.sockets`)."""

    BLOCKS = "blocks"
    """Ours cannot be bound."""

    SHARES = "shares"
    """Both are bound (SO_REUSEPORT) and it takes some or all of the guests' connections."""

    YIELDS = "yields"
    """Both are bound and the kernel gives every connection to ours: it is bound less precisely."""


@dataclass(frozen=True, slots=True)
class SocketOwner:
    """A process that holds a socket."""

    pid: int
    command: str


class SocketState(StrEnum):
    """What is at the path."""

    MISSING = "missing"
    STALE = "stale"
    """A socket without a listener any more."""

    OURS = "ours"
    FOREIGN = "foreign"
    """Another running process's."""

    OCCUPIED = "occupied"
    """Something that is no socket."""


@dataclass(frozen=True, slots=True)
class SeenSocket:
    """A socket's path at one moment.

    Attributes:
        owners: The processes that listen, for `FOREIGN`, as far as that can be seen.
        orphaned: HAProxy listens on a socket that was at the path, and is not any more: no client can connect to it,
            and the next worker would be handed the same one.
    """

    state: SocketState
    owners: tuple[SocketOwner, ...] = ()
    orphaned: bool = False


@dataclass(frozen=True, slots=True)
class ListeningSocket:
    """A TCP socket in state LISTEN that covers a metadata address.

    Attributes:
        address: As bound; `0.0.0.0` and `::` are the wildcards.
        device: The name of the device it is bound to, `None` for all.
        inode: The socket's inode, as `/proc/PID/fd` shows it.
        v6_only: An IPv6 wildcard that does not also take IPv4.
        owners: Everybody who holds it; empty when that could not be found out.
        ours: One of the owners is a process of ours.
    """

    address: IpAddress
    port: int
    device: str | None
    inode: int
    v6_only: bool = False
    owners: tuple[SocketOwner, ...] = ()
    ours: bool = False


@dataclass(frozen=True, slots=True)
class ObservedNamespace:
    """The observed state of one namespace; the host's own when `ref` is `None` and there is a device.

    Attributes:
        ref: Also `None` of a name of ours without a namespace behind it, whose maker was killed.
        devices: By name.
        addresses: Where the metadata addresses are.
        default_routes: (family, device) of every default route in the main table; only of namespaces of ours.
        sockets: Who listens on a metadata address and the metadata port, ours included; where requests are redirected,
            on a port that they are redirected to.
        trials: The kernel's answer (errno, 0 when it went through) to a bind just like HAProxy's, made and dropped at
            once, for each family and device that was of interest, or `REDIRECTED`.
        problem: Why it could not be looked at; everything else is empty then.
        own_metadata: By what it shows that the host reads metadata of its own at the same address;
            empty when nothing shows it.
    """

    ref: NamespaceRef | None
    devices: Mapping[str, ObservedDevice] = field(default_factory=dict)
    addresses: tuple[ObservedAddress, ...] = ()
    default_routes: frozenset[tuple[Family, str]] = frozenset()
    sockets: tuple[ListeningSocket, ...] = ()
    trials: Mapping[tuple[Family, str | None], int] = field(default_factory=dict)
    problem: str = ""
    own_metadata: str = ""


@dataclass(frozen=True, slots=True)
class ObservedHost:
    """The host as it was seen.

    Attributes:
        root: The namespace that the daemon runs in.
        namespaces: By name, those that were looked at and are there.
        asked: Every name that was looked for; `None` when the whole directory was.
        devices: Of a part, the devices in `root` that were looked for.
    """

    root: ObservedNamespace = field(default_factory=lambda: ObservedNamespace(None))
    namespaces: Mapping[str, ObservedNamespace] = field(default_factory=dict)
    asked: frozenset[str] | None = None
    devices: frozenset[str] = frozenset()


def merge_observed(before: ObservedHost, part: ObservedHost) -> ObservedHost:
    """Replace in `before` everything that `part` looked for."""
    asked = part.asked
    if asked is None:
        return part
    kept = {name: seen for name, seen in before.namespaces.items() if name not in asked}
    root = _merge_root(before.root, part.root, part.devices) if part.devices else before.root
    # Other networks than those that were looked for may listen on other devices of a namespace.
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
    # All ports of a bridge that was looked for are in the part. A device of another name may be the same one.
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
