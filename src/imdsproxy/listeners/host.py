"""The host as loops and look-up use it: observer, applier, nft(8), links, neighbour tables and a journal."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import ObservedHost
from imdsproxy.core.model import IpAddress, MacAddress, Network
from imdsproxy.errors import HostRefused
from imdsproxy.host.files import write_atomic
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.netlink import find_link, neighbour_mac
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.listeners.apply import HostApplier
from imdsproxy.listeners.leftovers import ManagedPlace
from imdsproxy.listeners.namespace_links import apply_links
from imdsproxy.listeners.nft_scripts import Diversion
from imdsproxy.listeners.nft_tables import ArpGuard, Diverter
from imdsproxy.listeners.observe import HostObserver
from imdsproxy.listeners.ops import AddAddress, HostOp, OpFailure, RemoveAddress
from imdsproxy.listeners.places import place_of


class SystemHost:
    """This host.

    Args:
        links: The directory of symbolic links to namespaces, for HAProxy.
        journal: Where we have added addresses: `[[namespace or null, device], …]` as JSON.
    """

    def __init__(
        self,
        thread: NamespaceThread,
        naming: Naming,
        *,
        observer: HostObserver,
        applier: HostApplier,
        links: Path,
        journal: Path,
    ) -> None:
        self.observer = observer
        self.thread = thread
        self._applier = applier
        self.naming = naming
        self._links = links
        self._journal = journal
        self._arp_guard = ArpGuard(naming.prefix)
        self._diverter = Diverter(naming.prefix)

    async def observe(
        self, networks: Iterable[Network], our_pids: Collection[int], *, everything: bool
    ) -> ObservedHost:
        """Look at what these networks' listeners need; with `everything`, at the whole host.

        Raises:
            HostRefused: The host's own namespace cannot be looked at.
        """
        managed = self.managed() if everything else None
        return await self.observer.observe(
            networks, our_pids, everything=everything, managed=managed
        )

    async def apply(self, ops: Iterable[HostOp]) -> tuple[OpFailure, ...]:
        """Do these things; returns what the host refused, the others are done all the same."""
        given = tuple(ops)
        # Before anything is done: what a killed process has added is known to the next one.
        self._note({(one.namespace, one.device) for one in given if isinstance(one, AddAddress)})
        failures = await self._applier.apply(given)
        done = set(given) - {one.op for one in failures}
        self._strike_out(
            {(one.namespace, one.device) for one in done if isinstance(one, RemoveAddress)}
        )
        return failures

    def managed(self) -> frozenset[ManagedPlace]:
        """Where we have added addresses, in this process or an earlier one.

        Raises:
            HostRefused: Our journal of it cannot be read.
        """
        try:
            places = json.loads(self._journal.read_bytes())
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError) as error:
            raise HostRefused(
                f"cannot read {self._journal}: {error}",
                hint="remove it; addresses that are no longer needed are then yours to remove",
            ) from error
        return frozenset((place[0], place[1]) for place in places)

    def _note(self, places: set[ManagedPlace]) -> None:
        known = self.managed() if places else frozenset()
        if places - known:
            self._write(known | places)

    def _strike_out(self, places: set[ManagedPlace]) -> None:
        known = self.managed() if places else frozenset()
        if places & known:
            self._write(known - places)

    def _write(self, places: frozenset[ManagedPlace]) -> None:
        listed = sorted(places, key=lambda place: (place[0] or "", place[1]))
        write_atomic(self._journal, json.dumps(listed).encode(), mode=0o600)

    def apply_links(self, links: Mapping[str, str]) -> None:
        """Create exactly these symbolic links, by which HAProxy opens namespaces.

        Raises:
            HostRefused: The file system refused.
        """
        base = str(self.thread.directory.path)
        apply_links(
            self._links,
            {name: os.path.join(base, target) for name, target in links.items()},  # noqa: PTH118 - a Path for each network takes ten times as long
        )

    async def apply_arp_guard(self, devices: frozenset[str]) -> None:
        """Make the host answer ARP for the metadata address on these devices only.

        Raises:
            HostRefused: It cannot be kept from answering elsewhere.
        """
        await self._arp_guard.apply(devices)

    async def apply_diversions(self, diversions: tuple[Diversion, ...]) -> None:
        """Redirect frames for the metadata address to our veths on these bridges, and on no others.

        Raises:
            HostRefused: They still go to the guests' gateways.
        """
        await self._diverter.apply(diversions)

    async def neighbour(self, network: Network, address: IpAddress) -> MacAddress | None:
        """See `Neighbours.neighbour`."""
        place = place_of(network, self.naming)
        if place.namespace is None:
            return await self.thread.run(lambda: _ask(address, place.device))
        return await self.thread.inside(place.namespace, lambda _: _ask(address, place.device))


def _ask(address: IpAddress, device: str | None) -> MacAddress | None:
    with NetlinkSocket() as channel:
        link = None if device is None else find_link(channel, device)
        if device is not None and link is None:
            return None
        return neighbour_mac(channel, address, index=0 if link is None else link.index)
