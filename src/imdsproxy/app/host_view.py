"""The host as the loops see it: observer, applier, links and neighbour tables behind one face."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imdsproxy.core.diversion import Diversion
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hostops import AddAddress, HostOp, RemoveAddress
from imdsproxy.core.hoststate import ObservedHost
from imdsproxy.core.leftovers import ManagedPlace
from imdsproxy.core.listeners import OpFailure
from imdsproxy.core.model import (
    BridgeListener,
    InterfaceListener,
    IpAddress,
    MacAddress,
    NamespaceListener,
    Network,
)
from imdsproxy.errors import HostRefused
from imdsproxy.host.apply import HostApplier, OpOutcome
from imdsproxy.host.arpguard import ArpGuard
from imdsproxy.host.diversions import Diverter
from imdsproxy.host.files import write_atomic
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.netlink import find_link, neighbour_mac
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.nslinks import apply_links
from imdsproxy.host.observe import HostObserver


@dataclass(slots=True)
class SystemHost:
    """This host."""

    thread: NamespaceThread
    observer: HostObserver
    applier: HostApplier
    naming: Naming
    links: Path
    namespaces: Path
    journal: Path
    arp_guard: ArpGuard
    diverter: Diverter

    async def observe(
        self, networks: Iterable[Network], our_pids: Collection[int], *, everything: bool
    ) -> ObservedHost:
        """See `HostView.observe`."""
        managed = self.managed() if everything else None
        return await self.observer.observe(
            networks, our_pids, everything=everything, managed=managed
        )

    async def apply(self, ops: Iterable[HostOp]) -> tuple[OpFailure, ...]:
        """See `HostView.apply`."""
        given = tuple(ops)
        # Before anything is done: what a killed process has added is known to the next one.
        self._note({(one.namespace, one.device) for one in given if isinstance(one, AddAddress)})
        results = await self.applier.apply(given)
        self._strike_out(
            {
                (one.op.namespace, one.op.device)
                for one in results
                if isinstance(one.op, RemoveAddress) and one.outcome is OpOutcome.DONE
            }
        )
        return tuple(
            OpFailure(result.op, result.error.message, result.error.hint)
            for result in results
            if result.outcome is OpOutcome.FAILED and result.error is not None
        )

    def managed(self) -> frozenset[ManagedPlace]:
        """See `HostView.managed`."""
        try:
            places = json.loads(self.journal.read_bytes())
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError) as error:
            raise HostRefused(
                f"cannot read {self.journal}: {error}",
                hint="remove it; addresses that nobody needs any more are then yours to remove",
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
        write_atomic(self.journal, json.dumps(listed).encode(), mode=0o600)

    def apply_links(self, links: Mapping[str, str]) -> None:
        """See `HostView.apply_links`."""
        base = str(self.namespaces)
        apply_links(
            self.links,
            {name: os.path.join(base, target) for name, target in links.items()},  # noqa: PTH118 - a Path for each network takes ten times as long
        )

    async def apply_arp_guard(self, devices: frozenset[str]) -> None:
        """See `HostView.apply_arp_guard`."""
        await self.arp_guard.apply(devices)

    async def apply_diversions(self, diversions: tuple[Diversion, ...]) -> None:
        """See `HostView.apply_diversions`."""
        await self.diverter.apply(diversions)

    async def neighbour(self, network: Network, address: IpAddress) -> MacAddress | None:
        """See `Neighbours.neighbour`."""
        listener = network.listener
        match listener:
            case NamespaceListener(namespace=namespace, device=device):
                return await self.thread.inside(namespace, lambda _: _ask(address, device))
            case BridgeListener():
                name, device = self.naming.namespace(network.id), self.naming.inner_device
                return await self.thread.inside(name, lambda _: _ask(address, device))
            case InterfaceListener(device=device):
                return await self.thread.run(lambda: _ask(address, device))


def _ask(address: IpAddress, device: str | None) -> MacAddress | None:
    with NetlinkSocket() as channel:
        link = None if device is None else find_link(channel, device)
        if device is not None and link is None:
            return None
        return neighbour_mac(channel, address, index=0 if link is None else link.index)
