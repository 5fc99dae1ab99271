"""The observed state of the host: namespaces, devices, addresses and listening sockets. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from imdsproxy.core.model import METADATA_IPV4, METADATA_IPV6, IpAddress


class Family(IntEnum):
    """An address family by its version number."""

    IPV4 = 4
    IPV6 = 6

    @property
    def metadata_address(self) -> IpAddress:
        """The address at which guests of this family read metadata."""
        return METADATA_IPV4 if self is Family.IPV4 else METADATA_IPV6


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


@dataclass(frozen=True, slots=True, order=True)
class BridgePort:
    """A port of a bridge; `kind` as a device's."""

    name: str
    kind: str = ""


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
class BindTrial:
    """The kernel's answer to a bind just like HAProxy's, made and dropped at once.

    Attributes:
        error: The errno, 0 when it went through.
    """

    family: Family
    device: str | None
    error: int


@dataclass(frozen=True, slots=True)
class ObservedNamespace:
    """The observed state of one namespace; the host's own when `ref` is `None` and there is no problem.

    Attributes:
        devices: By name. In the host's own namespace perhaps only those that were asked for.
        addresses: Where the metadata addresses are.
        default_routes: (family, device) of every default route in the main table.
        sockets: Who listens on a metadata address and the metadata port, ours included.
        trials: One for each (family, device) that was of interest.
        problem: Why it could not be looked at; everything else is empty then.
        ports: Those of each bridge that is listened on, by its name; in the order of their names.
        own_metadata: By what it shows that the host reads metadata of its own at the same address;
            empty when nothing shows it.
    """

    ref: NamespaceRef | None
    devices: Mapping[str, ObservedDevice] = field(default_factory=dict)
    addresses: tuple[ObservedAddress, ...] = ()
    default_routes: frozenset[tuple[Family, str]] = frozenset()
    sockets: tuple[ListeningSocket, ...] = ()
    trials: tuple[BindTrial, ...] = ()
    problem: str = ""
    ports: Mapping[str, tuple[BridgePort, ...]] = field(default_factory=dict)
    own_metadata: str = ""


@dataclass(frozen=True, slots=True)
class ObservedHost:
    """The host as it was seen.

    Attributes:
        root: The namespace that the daemon runs in.
        namespaces: By name, those that were looked at and are there.
        half_made: Names in our form in `/run/netns` without a namespace behind them.
        asked_namespaces: Every name that was looked for; `None` when the whole directory was.
        asked_devices: Every device of `root` that was looked for; `None` when all were.
    """

    root: ObservedNamespace = field(default_factory=lambda: ObservedNamespace(None))
    namespaces: Mapping[str, ObservedNamespace] = field(default_factory=dict)
    half_made: frozenset[str] = frozenset()
    asked_namespaces: frozenset[str] | None = None
    asked_devices: frozenset[str] | None = None


def merge_observed(before: ObservedHost, part: ObservedHost) -> ObservedHost:
    """Replace in `before` everything that `part` asked for."""
    return ObservedHost(
        root=_merge_root(before, part),
        namespaces=_merge_namespaces(before, part),
        half_made=part.half_made | _unasked(before.half_made, part.asked_namespaces),
        asked_namespaces=_widest(before.asked_namespaces, part.asked_namespaces),
        asked_devices=_widest(before.asked_devices, part.asked_devices),
    )


@dataclass(frozen=True, slots=True)
class ChangedPlaces:
    """Places in which a part differs from what was known.

    Attributes:
        namespaces: Names.
        devices: Of the host's own namespace.
        sockets: Who listens in the host's own namespace has changed.
    """

    namespaces: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()
    sockets: bool = False

    def __bool__(self) -> bool:
        return bool(self.namespaces or self.devices or self.sockets)


def changed_places(before: ObservedHost, part: ObservedHost) -> ChangedPlaces:
    """Compare what a part asked for with what was known; our own sockets may come and go."""
    asked = part.asked_namespaces
    if asked is None:
        asked = frozenset(before.namespaces) | frozenset(part.namespaces)
    namespaces = (
        name
        for name in asked
        if _telling(before.namespaces.get(name)) != _telling(part.namespaces.get(name))
    )
    devices = part.asked_devices
    if devices is None:
        devices = frozenset(before.root.devices) | frozenset(part.root.devices)
    changed = frozenset(
        name for name in devices if _of_device(before.root, name) != _of_device(part.root, name)
    )
    sockets = bool(devices) and _foreign_in(before.root) != _foreign_in(part.root)
    return ChangedPlaces(frozenset(namespaces), changed, sockets)


def _foreign_in(seen: ObservedNamespace) -> frozenset[ListeningSocket]:
    return frozenset(one for one in seen.sockets if not one.ours)


def _telling(seen: ObservedNamespace | None) -> object:
    if seen is None:
        return None
    rest = (seen.ref, seen.devices, seen.addresses, seen.default_routes, seen.trials, seen.problem)
    return (*rest, _foreign_in(seen))


def _of_device(seen: ObservedNamespace, name: str) -> object:
    addresses = tuple(one for one in seen.addresses if one.device == name)
    trials = tuple(one for one in seen.trials if one.device == name)
    return seen.devices.get(name), addresses, trials, seen.ports.get(name, ())


def _widest(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    return None if one is None or other is None else one | other


def _unasked(names: frozenset[str], asked: frozenset[str] | None) -> frozenset[str]:
    return frozenset() if asked is None else names - asked


def _merge_namespaces(before: ObservedHost, part: ObservedHost) -> dict[str, ObservedNamespace]:
    kept = _unasked(frozenset(before.namespaces), part.asked_namespaces)
    return {name: before.namespaces[name] for name in sorted(kept)} | dict(part.namespaces)


def _merge_root(before: ObservedHost, part: ObservedHost) -> ObservedNamespace:
    asked = part.asked_devices
    if asked is None:
        return part.root
    if not asked:
        return before.root
    old, new = before.root, part.root
    devices = {name: device for name, device in old.devices.items() if name not in asked}
    return ObservedNamespace(
        ref=None,
        devices=devices | dict(new.devices),
        addresses=tuple(a for a in old.addresses if a.device not in asked) + new.addresses,
        default_routes=new.default_routes,
        sockets=new.sockets,
        trials=tuple(t for t in old.trials if t.device not in asked) + new.trials,
        problem=new.problem,
        ports={name: them for name, them in old.ports.items() if name not in asked}
        | dict(new.ports),
        own_metadata=new.own_metadata,
    )
