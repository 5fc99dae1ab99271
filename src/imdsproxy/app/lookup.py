"""Whose an unknown address is: the inventory first, then the neighbour table, then who can be asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, assert_never

import structlog

from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.addresses import link_local_of, mac_of
from imdsproxy.core.identity import Ambiguous, Found, How, Identity, Learned, Unknown, identify
from imdsproxy.core.inventory import AddressKey, Conflict, Inventory
from imdsproxy.core.model import Instance, IpAddress, MacAddress, Network, Scope, Upstream
from imdsproxy.core.wire import NovaRecord, render_map_value
from imdsproxy.errors import DataplaneError
from imdsproxy.host.clock import Clock
from imdsproxy.serving.resolver import Contested, Known, Missing, Resolution
from imdsproxy.sources.api import (
    LookUp,
    LookUpSource,
    LookUpUnavailable,
    PortAmbiguous,
    PortFound,
    PortMissing,
)

__all__ = ["Lookup", "Neighbours"]


class Neighbours(Protocol):
    """The neighbour tables of all listeners."""

    async def neighbour(self, network: Network, address: IpAddress) -> MacAddress | None:
        """The MAC that the kernel has for an address behind a network's listener, if it has one."""
        ...


@dataclass(slots=True)
class Lookup:
    """The resolver's eyes; what the neighbour table says is kept for a while and checked again.

    Attributes:
        source: Who is asked for an address that nobody told of, if anybody.
    """

    inventory: Inventory
    records: RecordLoop
    neighbours: Neighbours
    clock: Clock
    learned_ttl_s: Callable[[], float]
    source: LookUpSource | None = None

    async def identify(self, key: AddressKey) -> Identity:
        """Whose the address is, and how that was found, by what is known here."""
        network_id, address = key
        identity = identify(self.inventory, network_id, address)
        if not isinstance(identity, Unknown) or not address.is_link_local:
            return identity
        mac = await self._neighbour(key)
        if mac is None:
            return identity
        return identify(self.inventory, network_id, address, neighbour_mac=mac)

    def scope(self, key: AddressKey, said: Scope | None = None) -> Scope:
        """What the key's id stands for: as the network's record has it, else as the request said."""
        network = self.inventory.networks.get(key[0])
        return network.scope if network is not None else said or Scope.NETWORK

    async def ask(self, key: AddressKey, scope: Scope) -> LookUp | None:
        """What the source says of an address that nobody told of; `None` where there is none to ask."""
        if self.source is None:
            return None
        network, address = key
        if scope is Scope.NETWORK and address.is_link_local and mac_of(address) is None:
            # One of privacy (RFC 7217, RFC 8981): who has it, is known by the MAC in the neighbour table.
            mac = await self._neighbour(key)
            if mac is None:
                return PortMissing()
            address = link_local_of(mac)
        return await self.source.look_up(scope, network, address)

    async def look(self, key: AddressKey, scope: Scope | None = None) -> Resolution:
        """What the resolver is to do with a request from this address."""
        identity = await self.identify(key)
        if not isinstance(identity, Unknown):
            return await self._resolve(key, identity)
        scope = self.scope(key, scope)
        match await self.ask(key, scope):
            case PortFound() as found:
                return await self._found(key, scope, found)
            case LookUpUnavailable():
                return Missing(in_sync=False)
            case None | PortMissing() | PortAmbiguous():
                return Missing(in_sync=self.inventory.in_sync)
            case _ as never:
                assert_never(never)

    async def _resolve(self, key: AddressKey, identity: Identity) -> Resolution:
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
                # It was found, and something else is known by now.
                return Missing(in_sync=False)

    async def _found(self, key: AddressKey, scope: Scope, found: PortFound) -> Resolution:
        if scope is Scope.NETWORK:
            await self.records.tickets.wait(self.records.touch(key))
            # By the inventory: another source may claim the address too.
            return await self._resolve(key, await self.identify(key))
        owner = self.inventory.owner((found.network, key[1]))
        if isinstance(owner, Conflict):
            return Contested()
        instance = self.inventory.instances.get(found.instance)
        if instance is None or owner != found.instance:
            return Missing(in_sync=False)
        await self.records.tickets.wait(self.records.learn(key, _behind_router(key, found)))
        return self._known(instance, key)

    def _known(self, instance: Instance, key: AddressKey) -> Resolution:
        if instance.upstream is Upstream.EMBEDDED:
            return Known(instance.id)
        record = self.records.planned(key)
        if isinstance(record, NovaRecord):
            return Known(instance.id, render_map_value(record))
        # No endpoint set takes it: the operator has to say where Nova is.
        return Missing(in_sync=False)

    async def _neighbour(self, key: AddressKey) -> MacAddress | None:
        network = self.inventory.networks.get(key[0])
        if network is None:
            return None
        try:
            return await self.neighbours.neighbour(network, key[1])
        except DataplaneError as error:
            structlog.get_logger().warning(
                "neighbour table not read", network=key[0], code=error.code, error=error.message
            )
            return None

    async def review(self) -> None:
        """Ask again for every learned address whose time is over; forget what is no longer so."""
        self.follow_routes()
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

    def follow_routes(self) -> None:
        """Have addresses behind routers known as the source knows them: no others, and those of before a restart."""
        routes = {} if self.source is None else self.source.routes()
        learned = self.records.learned
        for key in [key for key, entry in learned.items() if entry.via is not None]:
            if key not in routes:
                self.records.forget(key)
        for key, found in routes.items():
            behind = _behind_router(key, found)
            if learned.get(key) != behind:
                self.records.learn(key, behind)


def _behind_router(key: AddressKey, found: PortFound) -> Learned:
    # The source says when it is over, not a time.
    return Learned(found.instance, math.inf, via=(found.network, key[1]))
