"""Looks at the host for `listeners.plan`: namespaces, devices, addresses, who listens, what can be bound.

One look at a namespace costs about 0.2 ms, in the namespace thread. A look at some networks only
is a part that `core.hoststate.merge_observed` lays over what was known.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeAlias

from imdsproxy.core.endpoints import LOOPBACK
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import (
    AddressState,
    BindTrial,
    BridgePort,
    Family,
    ListeningSocket,
    NamespaceRef,
    ObservedAddress,
    ObservedDevice,
    ObservedHost,
    ObservedNamespace,
)
from imdsproxy.core.model import (
    METADATA_IPV4,
    BridgeListener,
    InterfaceListener,
    NamespaceListener,
    Network,
)
from imdsproxy.errors import DataplaneError
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.netlink import (
    bridge_ports,
    default_routes,
    find_link,
    find_link_by_index,
    list_links,
    metadata_addresses,
    route_length,
)
from imdsproxy.host.nlmessages import NetlinkRefused, NetlinkSocket
from imdsproxy.host.refusal import host_refused
from imdsproxy.host.sockets import SOCK_DIAG, SocketOwners, listening_sockets, try_bind
from imdsproxy.listeners.plan import ManagedPlace

Peek: TypeAlias = tuple[int, frozenset[int]]
"""A namespace's inode and those of the sockets that listen in it."""

DMI: Final = Path("/sys/class/dmi/id")

# As cloud-init's ds-identify knows them.
_SIGNS: Final[Mapping[str, tuple[str, ...]]] = {
    "sys_vendor": (
        *("Akamai", "Alibaba Cloud", "Amazon EC2", "DigitalOcean", "Google", "Hetzner"),
        *("OpenStack Foundation", "Vultr", "e24cloud"),
    ),
    "product_name": ("Exoscale", "Google Compute Engine", "OpenStack Compute", "OpenStack Nova"),
    "chassis_asset_tag": (
        "7783-7084-3265-9085-8269-3286-77",  # Microsoft Azure's
        *("HUAWEICLOUD", "OpenTelekomCloud", "OracleCloud.com"),
    ),
}
_HOST_ROUTE: Final = 32

_TRIES = 3

_FEW_DEVICES = 32
"""Up to so many devices are asked for one by one; all are listed when more are of interest."""


@dataclass(slots=True)
class _Interest:
    """What to look at: which devices are listened on in which namespace (`None`: on any)."""

    namespaces: dict[str, set[str | None]] = field(default_factory=dict)
    interfaces: set[str | None] = field(default_factory=set)
    bridges: set[str] = field(default_factory=set)
    host_devices: set[str] = field(default_factory=set)


class HostObserver:
    """Looks at the host.

    Args:
        thread: Where namespaces are entered.
        naming: How our own objects are named.
        owners: Finds who holds a socket; handed in by tests.
        dmi: Where the kernel shows SMBIOS.
    """

    def __init__(
        self,
        thread: NamespaceThread,
        naming: Naming,
        owners: SocketOwners | None = None,
        *,
        dmi: Path = DMI,
    ) -> None:
        self._dmi = dmi
        self._thread = thread
        self._naming = naming
        self._owners = owners or SocketOwners()

    async def observe(
        self,
        networks: Iterable[Network],
        our_pids: Collection[int] = (),
        *,
        everything: bool = False,
        managed: Collection[ManagedPlace] | None = None,
    ) -> ObservedHost:
        """Look at what these networks need.

        Args:
            networks: Those of interest; for a part, also those that have just gone.
            our_pids: HAProxy's master and workers: whose listening sockets are ours.
            everything: Look at all namespaces and all devices of the host, for what earlier
                processes may have left there.
            managed: Where they have put addresses: other namespaces that are not ours by their name, of which a
                host may have thousands, are not looked at then. `None`: unknown.

        Raises:
            HostRefused: The host's own namespace cannot be looked at. (Trouble in another one is
                reported as its `problem`.)
        """
        given = list(networks)
        pids = frozenset(our_pids)
        left_in = None if managed is None else frozenset(name for name, _ in managed)
        return await self._thread.run(
            lambda: self._observe(given, pids, everything=everything, left_in=left_in)
        )

    async def peek(self, places: Collection[str | None]) -> dict[str | None, Peek | None]:
        """Only which sockets listen in these namespaces (`None`: the host's own).

        A fifth of the cost of a proper look. `None` where there is no namespace, or no way into it.
        """
        given = tuple(places)
        return await self._thread.run(lambda: {name: self._peek(name) for name in given})

    def _peek(self, place: str | None) -> Peek | None:
        try:
            if place is None:
                return 0, _listening_inodes()
            return self._thread.enter(place, lambda ref: (ref.inode, _listening_inodes()))
        except (DataplaneError, OSError):
            # The proper look, due as soon as this differs from the last one, says why.
            return None

    def _observe(
        self,
        networks: list[Network],
        our_pids: frozenset[int],
        *,
        everything: bool,
        left_in: frozenset[str | None] | None,
    ) -> ObservedHost:
        interest = _interest(networks, self._naming)
        namespaces: dict[str, ObservedNamespace] = {}
        for name, devices in sorted(interest.namespaces.items()):
            seen = self._namespace(name, devices)
            if seen is not None:
                namespaces[name] = seen
        present = self._thread.directory.names() if everything else sorted(interest.namespaces)
        for name in present if everything else ():
            if not (left_in is None or name in left_in or self._naming.is_namespace(name)):
                continue
            # A name for the host's own namespace shows what `root` shows: nothing there is left over.
            known = name in namespaces or self._thread.is_home(name)
            seen = None if known else self._namespace(name, set())
            if seen is not None:
                namespaces[name] = seen
        root = self._root(interest, everything=everything)
        owned = self._find_owners((root, *namespaces.values()), our_pids)
        return ObservedHost(
            root=_with_owners(root, owned),
            namespaces={name: _with_owners(seen, owned) for name, seen in namespaces.items()},
            half_made=frozenset(self._half_made(present, namespaces)),
            asked_namespaces=None if everything else frozenset(interest.namespaces),
            asked_devices=None if everything else frozenset(interest.host_devices),
        )

    def _find_owners(
        self, places: Iterable[ObservedNamespace], our_pids: frozenset[int]
    ) -> dict[int, ListeningSocket]:
        return self._owners.resolve((one for place in places for one in place.sockets), our_pids)

    def _half_made(self, names: Iterable[str], usable: Collection[str]) -> Iterator[str]:
        for name in names:
            if name in usable or not self._naming.is_namespace(name):
                continue
            if (self._thread.directory.path / name).exists():
                yield name

    def _namespace(self, name: str, devices: set[str | None]) -> ObservedNamespace | None:
        """Look at a namespace; with no devices of interest, only at what may be ours in there."""

        def work(ref: NamespaceRef) -> ObservedNamespace:
            return self._inside(ref, devices)

        try:
            return self._thread.enter(name, work)
        except DataplaneError as error:
            return ObservedNamespace(None, problem=error.message)
        except OSError as error:
            problem = host_refused(f"look into namespace {name}", error).message
            return ObservedNamespace(None, problem=problem)

    def _inside(self, ref: NamespaceRef, wanted: set[str | None]) -> ObservedNamespace:
        with NetlinkSocket() as channel:
            devices, addresses = _devices_and_addresses(channel)
            own = self._naming.is_namespace(ref.name)
            routes = default_routes(channel, devices.values()) if own else frozenset()
        if not wanted:
            return ObservedNamespace(ref, devices, addresses, routes)
        names = {one.index: one.name for one in devices.values()}
        with NetlinkSocket(SOCK_DIAG) as channel:
            sockets = listening_sockets(channel, names)
        return ObservedNamespace(
            ref=ref,
            devices=devices,
            addresses=addresses,
            default_routes=routes,
            sockets=tuple(sockets),
            trials=tuple(_trials(wanted, addresses, devices)),
        )

    def _root(self, interest: _Interest, *, everything: bool) -> ObservedNamespace:
        if not everything and not interest.host_devices:
            return ObservedNamespace(None)
        try:
            with NetlinkSocket() as channel:
                if everything or len(interest.host_devices) > _FEW_DEVICES:
                    devices, addresses = _devices_and_addresses(channel)
                else:
                    devices = _some_devices(channel, interest.host_devices)
                    addresses = tuple(_addresses_on(channel, devices))
                ports = _ports(channel, devices, interest.bridges)
                own = own_metadata(channel, self._dmi)
            names = {one.index: one.name for one in devices.values()}
            with NetlinkSocket(SOCK_DIAG) as channel:
                sockets = listening_sockets(channel, names) if interest.interfaces else []
        except OSError as error:
            raise host_refused("look at the host's devices", error) from error
        return ObservedNamespace(
            ref=None,
            devices=devices,
            addresses=addresses,
            sockets=tuple(sockets),
            trials=tuple(_trials(interest.interfaces, addresses, devices)),
            ports=ports,
            own_metadata=own,
        )


def _listening_inodes() -> frozenset[int]:
    with NetlinkSocket(SOCK_DIAG) as channel:
        return frozenset(one.inode for one in listening_sockets(channel, {}))


def _with_owners(seen: ObservedNamespace, owned: dict[int, ListeningSocket]) -> ObservedNamespace:
    if not seen.sockets:
        return seen
    return replace(seen, sockets=tuple(owned[one.inode] for one in seen.sockets))


def _interest(networks: Iterable[Network], naming: Naming) -> _Interest:
    found = _Interest()
    for network in networks:
        place = place_of(network, naming)
        if place.namespace is not None:
            found.namespaces.setdefault(place.namespace, set()).add(place.device)
        else:
            found.interfaces.add(place.device)
        found.host_devices.update(place.host_devices)
        if place.bridge is not None:
            found.bridges.add(place.bridge)
    return found


def _devices_and_addresses(
    channel: NetlinkSocket,
) -> tuple[dict[str, ObservedDevice], tuple[ObservedAddress, ...]]:
    """Both of one moment, or nearly: every address is on one of the devices."""
    for _ in range(_TRIES):
        devices = {one.name: one for one in list_links(channel)}
        addresses = tuple(metadata_addresses(channel, devices.values()))
        known = tuple(one for one in addresses if one.device in devices)
        if len(known) == len(addresses):
            break
        # A device was made between the two questions: ask again.
    return devices, known


def _some_devices(channel: NetlinkSocket, names: Iterable[str]) -> dict[str, ObservedDevice]:
    found: dict[str, ObservedDevice] = {}
    for name in sorted(names):
        device = find_link(channel, name)
        if device is None:
            continue
        found[name] = device
        # Whether it is a port of a bridge takes a look at its master.
        master = find_link_by_index(channel, device.master) if device.master else None
        if master is not None:
            found[master.name] = master
    return found


def _addresses_on(
    channel: NetlinkSocket, devices: dict[str, ObservedDevice]
) -> Iterator[ObservedAddress]:
    for device in devices.values():
        try:
            yield from metadata_addresses(channel, (device,), index=device.index)
        except NetlinkRefused as error:
            if error.errno != errno.ENODEV:  # it has gone since it was looked for
                raise


def _ports(
    channel: NetlinkSocket, devices: dict[str, ObservedDevice], bridges: Iterable[str]
) -> dict[str, tuple[BridgePort, ...]]:
    there = (devices[name] for name in sorted(bridges) if name in devices)
    return {one.name: bridge_ports(channel, one.index) for one in there}


def _trials(
    wanted: set[str | None],
    addresses: tuple[ObservedAddress, ...],
    devices: dict[str, ObservedDevice],
) -> Iterator[BindTrial]:
    usable = [one for one in addresses if one.state is AddressState.USABLE]
    if any(one.address == Family.IPV4.metadata_address for one in usable):
        for device in sorted(wanted, key=str):
            if device is None or device in devices:
                yield BindTrial(Family.IPV4, device, try_bind(Family.IPV4, device))
    for one in usable:
        carries = one.address == Family.IPV6.metadata_address and one.device != LOOPBACK
        if carries and (None in wanted or one.device in wanted):
            index = devices[one.device].index
            error = try_bind(Family.IPV6, one.device, index)
            yield BindTrial(Family.IPV6, one.device, error)


def own_metadata(channel: NetlinkSocket, dmi: Path = DMI) -> str:
    """By what it shows, in words; empty when nothing shows it.

    Args:
        channel: Of the host's own namespace.
        dmi: Where the kernel shows SMBIOS.
    """
    for name, known in _SIGNS.items():
        try:
            value = (dmi / name).read_text(errors="replace").strip()
        except OSError:
            continue  # not every machine has SMBIOS, and not every field may be read
        if value in known:
            return f"its SMBIOS says {value}"
    if route_length(channel, METADATA_IPV4) == _HOST_ROUTE:
        return f"it has a route to {METADATA_IPV4}"
    return ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a network is listened for.

    Attributes:
        namespace: By name; `None` for the host's own.
        device: In that namespace; `None` for all.
        host_devices: The devices of the host's own namespace that it depends on.
        bridge: The one of them that is a bridge to attach to, if any.
    """

    namespace: str | None
    device: str | None
    host_devices: tuple[str, ...] = ()
    bridge: str | None = None


def place_of(network: Network, naming: Naming) -> Place:
    """Where a network is listened for, whether or not it is there."""
    match network.listener:
        case NamespaceListener(namespace=namespace, device=device):
            return Place(namespace, device)
        case InterfaceListener(device=device):
            return Place(None, device, (device,))
        case BridgeListener(bridge=bridge):
            link = naming.link(network.id)
            inside = naming.namespace(network.id)
            return Place(inside, naming.inner_device, (bridge, link), bridge)
