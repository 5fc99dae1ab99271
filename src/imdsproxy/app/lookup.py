"""Whose an unknown address is: the inventory first, then the neighbour table for link-local ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.identity import Ambiguous, Found, How, Identity, Learned, Unknown, identify
from imdsproxy.core.inventory import AddressKey, Inventory
from imdsproxy.core.model import Instance, IpAddress, MacAddress, Network, Scope, Upstream
from imdsproxy.core.wire import NovaRecord, render_map_value
from imdsproxy.errors import DataplaneError
from imdsproxy.host.clock import Clock
from imdsproxy.serving.resolver import Contested, Known, Missing, Resolution

__all__ = ["Lookup", "Neighbours"]


class Neighbours(Protocol):
    """The neighbour tables of all listeners."""

    async def neighbour(self, network: Network, address: IpAddress) -> MacAddress | None:
        """The MAC that the kernel has for an address behind a network's listener, if it has one."""
        ...


@dataclass(slots=True)
class Lookup:
    """The resolver's eyes; what the neighbour table says is kept for a while and checked again."""

    inventory: Inventory
    records: RecordLoop
    neighbours: Neighbours
    clock: Clock
    learned_ttl_s: Callable[[], float]

    async def identify(self, key: AddressKey) -> Identity:
        """Whose the address is, and how that was found."""
        network_id, address = key
        identity = identify(self.inventory, network_id, address)
        network = self.inventory.networks.get(network_id)
        if not isinstance(identity, Unknown) or network is None or not address.is_link_local:
            return identity
        try:
            mac = await self.neighbours.neighbour(network, address)
        except DataplaneError as error:
            structlog.get_logger().warning(
                "neighbour table not read", network=network_id, code=error.code, error=error.message
            )
            return identity
        if mac is None:
            return identity
        return identify(self.inventory, network_id, address, neighbour_mac=mac)

    async def look(self, key: AddressKey, scope: Scope | None = None) -> Resolution:
        """What the resolver is to do with a request from this address."""
        identity = await self.identify(key)
        match identity:
            case Found(instance=instance, how=how):
                if how is How.NEIGHBOUR:
                    until = self.clock.monotonic() + self.learned_ttl_s()
                    ticket = self.records.learn(key, Learned(instance.id, until))
                    await self.records.tickets.wait(ticket)
                return self._known(instance, key)
            case Ambiguous():
                return Contested()
            case Unknown():
                return Missing(in_sync=self.inventory.in_sync)

    def _known(self, instance: Instance, key: AddressKey) -> Resolution:
        if instance.upstream is Upstream.EMBEDDED:
            return Known(instance.id)
        record = self.records.planned(key)
        if isinstance(record, NovaRecord):
            return Known(instance.id, render_map_value(record))
        # No endpoint set takes it: the operator has to say where Nova is.
        return Missing(in_sync=False)

    async def review(self) -> None:
        """Ask again for every learned address whose time is over; forget what is no longer so."""
        now = self.clock.monotonic()
        for key in [key for key, entry in self.records.learned.items() if entry.until <= now]:
            entry = self.records.learned[key]
            identity = await self.identify(key)
            if (
                isinstance(identity, Found)
                and identity.how is How.NEIGHBOUR
                and identity.instance.id == entry.instance
            ):
                self.records.learned[key] = Learned(entry.instance, now + self.learned_ttl_s())
            else:
                self.records.forget(key)
