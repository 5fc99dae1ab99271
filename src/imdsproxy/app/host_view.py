"""The host as the loops see it: observer, applier, links and neighbour tables behind one face."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hostops import HostOp
from imdsproxy.core.hoststate import ObservedHost
from imdsproxy.core.model import (
    BridgeListener,
    InterfaceListener,
    IpAddress,
    MacAddress,
    NamespaceListener,
    Network,
)
from imdsproxy.errors import Problem
from imdsproxy.host.apply import HostApplier, OpOutcome
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.netlink import find_link, neighbour_mac
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.nslinks import apply_links
from imdsproxy.host.observe import HostObserver

__all__ = ["SystemHost"]


@dataclass(slots=True)
class SystemHost:
    """This host."""

    thread: NamespaceThread
    observer: HostObserver
    applier: HostApplier
    naming: Naming
    links: Path
    namespaces: Path

    async def observe(
        self, networks: Iterable[Network], our_pids: Collection[int], *, everything: bool
    ) -> ObservedHost:
        """See `HostView.observe`."""
        return await self.observer.observe(networks, our_pids, everything=everything)

    async def apply(self, ops: Iterable[HostOp]) -> tuple[Problem, ...]:
        """See `HostView.apply`."""
        results = await self.applier.apply(ops)
        return tuple(
            Problem("host", result.error.message, result.error.hint)
            for result in results
            if result.outcome is OpOutcome.FAILED and result.error is not None
        )

    def apply_links(self, links: Mapping[str, str]) -> None:
        """See `HostView.apply_links`."""
        apply_links(self.links, {name: self.namespaces / target for name, target in links.items()})

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
