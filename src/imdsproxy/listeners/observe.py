"""Looks at the host for `listeners.plan`: namespaces, devices, addresses, who listens, what can be bound.

One look at a namespace costs about 0.2 ms, in the namespace thread. A look at some networks only
is a part that `core.hoststate.merge_observed` lays over what was known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeAlias

from imdsproxy.core.endpoints import LOOPBACK
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import (
    AddressState,
    BindTrial,
    Family,
    ListeningSocket,
    NamespaceRef,
    ObservedAddress,
    ObservedDevice,
    ObservedHost,
    ObservedNamespace,
)
from imdsproxy.core.model import METADATA_IPV4
from imdsproxy.errors import DataplaneError, host_refused, refusing
from imdsproxy.host import netlink
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.sockets import SOCK_DIAG, SocketOwners, listening_sockets, try_bind
from imdsproxy.listeners.plan import ManagedPlace, Place

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


@dataclass(eq=False)
class HostObserver:
    """Looks at the host.

    Attributes:
        thread: Where namespaces are entered.
        naming: How our own objects are named.
        owners: Finds who holds a socket.
        dmi: Where the kernel shows SMBIOS.
    """

    thread: NamespaceThread
    naming: Naming
    owners: SocketOwners = field(default_factory=SocketOwners)
    dmi: Path = DMI

    async def observe(
        self,
        places: Collection[Place],
        our_pids: Collection[int] = (),
        *,
        everything: bool = False,
        managed: Collection[ManagedPlace] | None = None,
    ) -> ObservedHost:
        """Look at what listeners at these places need.

        Args:
            places: Those of interest; for a part, also those where something has just been removed.
            our_pids: HAProxy's master and workers: whose listening sockets are ours.
            everything: Look at all namespaces and the host's own devices, for what earlier
                processes may have left there.
            managed: Where they have put addresses: other namespaces that are not ours by their name, of which a
                host may have thousands, are not looked at then. `None`: unknown.

        Raises:
            HostRefused: The host's own namespace cannot be looked at. (Trouble in another one is
                reported as its `problem`.)
        """
        wanted: dict[str | None, set[str | None]] = {}
        for place in places:
            wanted.setdefault(place.namespace, set()).add(place.device)
        asked = frozenset(name for name in wanted if name is not None)
        near = {name for place in places for name in place.host_devices}

        def look() -> ObservedHost:
            left = self._left_over(managed) - asked if everything else frozenset()
            names = (*asked, *left)
            seen = {name: self._namespace(name, wanted.get(name, set())) for name in names}
            namespaces = {name: one for name, one in seen.items() if one is not None}
            root = ObservedNamespace(None)
            if everything or near:
                with refusing("look at the host's devices"):
                    some = () if everything else near
                    root = self._look(None, wanted.get(None, set()), some)
            sockets = (one for place in (root, *namespaces.values()) for one in place.sockets)
            owned = self.owners.resolve(sockets, our_pids)
            return ObservedHost(
                root=_with_owners(root, owned),
                namespaces={name: _with_owners(one, owned) for name, one in namespaces.items()},
                asked=None if everything else asked,
                devices=frozenset(near),
            )

        return await self.thread.run(look)

    async def peek(self, places: Collection[str | None]) -> dict[str | None, Peek | None]:
        """Only which sockets listen in these namespaces (`None`: the host's own).

        A fifth of the cost of a proper look. `None` where there is no namespace, or no way into it.
        """

        def look(place: str | None) -> Peek | None:
            try:
                return self.thread.enter(
                    place, lambda ref: (0 if ref is None else ref.inode, _listening_inodes())
                )
            except (DataplaneError, OSError):
                # The proper look, due as soon as this differs from the last one, says why.
                return None

        given = tuple(places)
        return await self.thread.run(lambda: {name: look(name) for name in given})

    def _left_over(self, managed: Collection[ManagedPlace] | None) -> frozenset[str]:
        """Namespaces in which an earlier process may have left something."""
        put = None if managed is None else {name for name, _ in managed}
        return frozenset(
            name
            for name in self.thread.directory.names()
            if (put is None or name in put or self.naming.is_namespace(name))
            # A name for the host's own namespace shows what `root` shows: nothing there is left over.
            and not self.thread.is_home(name)
        )

    def _namespace(self, name: str, wanted: set[str | None]) -> ObservedNamespace | None:
        try:
            seen = self.thread.enter(name, lambda ref: self._look(ref, wanted))
        except DataplaneError as error:
            return ObservedNamespace(None, problem=error.message)
        except OSError as error:
            problem = host_refused(f"look into namespace {name}", error).message
            return ObservedNamespace(None, problem=problem)
        half_made = self.naming.is_namespace(name) and (self.thread.directory.path / name).exists()
        return ObservedNamespace(None) if seen is None and half_made else seen

    def _look(
        self, ref: NamespaceRef | None, wanted: set[str | None], near: Collection[str] = ()
    ) -> ObservedNamespace:
        """Look at the thread's namespace.

        Args:
            ref: Which it is.
            wanted: Devices of interest; without one, only what may be ours in there is looked at.
            near: Only these devices are looked at, and what belongs together with them; without one, all are.
        """
        with NetlinkSocket() as channel:
            devices, addresses = _devices_and_addresses(channel, near)
            own = ref is not None and self.naming.is_namespace(ref.name)
            routes = netlink.default_routes(channel, devices.values()) if own else frozenset()
            metadata = own_metadata(channel, self.dmi) if ref is None else ""
        sockets: list[ListeningSocket] = []
        if wanted or near:
            with NetlinkSocket(SOCK_DIAG) as channel:
                sockets = listening_sockets(channel)
        return ObservedNamespace(
            ref=ref,
            devices=devices,
            addresses=addresses,
            default_routes=routes,
            sockets=tuple(sockets),
            trials=tuple(_trials(wanted, addresses, devices)),
            own_metadata=metadata,
        )


def _listening_inodes() -> frozenset[int]:
    with NetlinkSocket(SOCK_DIAG) as channel:
        return frozenset(one.inode for one in listening_sockets(channel))


def _with_owners(seen: ObservedNamespace, owned: dict[int, ListeningSocket]) -> ObservedNamespace:
    if not seen.sockets:
        return seen
    return replace(seen, sockets=tuple(owned[one.inode] for one in seen.sockets))


def _devices_and_addresses(
    channel: NetlinkSocket, near: Collection[str]
) -> tuple[dict[str, ObservedDevice], tuple[ObservedAddress, ...]]:
    """Both of one moment, or nearly: every address is on one of the devices."""
    for _ in range(_TRIES):
        links = netlink.list_links_near(channel, near) if near else netlink.list_links(channel)
        devices = {one.name: one for one in links}
        addresses = tuple(netlink.metadata_addresses(channel, links, only=near))
        known = tuple(one for one in addresses if one.device in devices)
        if len(known) == len(addresses):
            break
        # A device was made between the two questions: ask again.
    return devices, known


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
    if netlink.route_length(channel, METADATA_IPV4) == _HOST_ROUTE:
        return f"it has a route to {METADATA_IPV4}"
    return ""
