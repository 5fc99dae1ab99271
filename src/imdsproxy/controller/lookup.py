"""Lookup of an unknown address's owner: in the inventory, the neighbour table, then a source that can be queried.

Where the network checks MACs, a request arrives here as `unverified` until its address has a MAC pair
(`network.anti_spoofing.plan`). The lookup puts the owner in force, and the answer goes only to the MAC that identified
the owner.
"""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Final, assert_never

import structlog

from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.documents.resolver import Outcome
from imdsproxy.errors import DataplaneError
from imdsproxy.host.clock import Clock
from imdsproxy.model.addresses import link_local_of, mac_of
from imdsproxy.model.entities import Instance, IpAddress, MacAddress, Network, Scope
from imdsproxy.model.identity import (
    Denial,
    Found,
    How,
    Identity,
    Learned,
    Mismatch,
    Unknown,
    checks_macs,
    deny,
    identify,
)
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Conflict, Expired
from imdsproxy.model.wire import MapRecord
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.anti_spoofing.plan import ANY_MAC, excess_learned
from imdsproxy.sources import api

_REFUSED: Final = 1000
"""Maximum number of addresses whose last refused MAC is kept for `explain`."""

_REFUSED_S: Final = 300.0
"""Time for which `explain` uses a refused MAC, in seconds."""

_NOTE_S: Final = 1.0
"""Minimum time between two reads of the neighbour table for an address that is refused repeatedly, in seconds."""

_LOOKS: Final = 3
"""Attempts at an address whose owner changes during the lookup."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Request that was refused because of its MAC."""

    mac: MacAddress
    neighbour: MacAddress | None
    at: float


@dataclass(slots=True)
class Lookup:
    """Lookup of guests by their MACs in the neighbour table; results stay until the table changes.

    Attributes:
        read_neighbour: Reader of the kernel's MAC for an address behind a network's listener, `None` for no entry.
        source: Source to query for an address that no source has reported.
        is_followed: Whether the kernel reports changes of an address. Otherwise the lookup reads learned addresses
            again after a while.
    """

    inventory: Inventory
    records: RecordLoop
    read_neighbour: Callable[[Network, IpAddress], Awaitable[MacAddress | None]]
    clock: Clock
    learned_ttl_s: Callable[[], float]
    mac_filters: MacFilters
    source: api.LookUpSource | None = None
    is_followed: Callable[[AddressKey], bool] = lambda _: False
    _refused: dict[AddressKey, Refusal] = field(default_factory=dict)

    async def identify(self, key: AddressKey) -> Identity:
        """Return the address's current owner and how it was found, without querying a source."""
        identity, mac = await self._identify(key)
        refusal = self._refusal(key, mac)
        return identity if refusal is None else self._whose(key, refusal.mac)

    async def last_seen(self, key: AddressKey) -> tuple[MacAddress | None, Refusal | None]:
        """Return the address's MAC in the neighbour table, and a newer refusal if there is one."""
        mac = await self.neighbour(key)
        return mac, self._refusal(key, mac)

    def _refusal(self, key: AddressKey, neighbour: MacAddress | None) -> Refusal | None:
        refusal = self._refused.get(key)
        if refusal is None or self.clock.monotonic() - refusal.at > _REFUSED_S:
            return None
        return refusal if neighbour in (None, refusal.neighbour) else None

    async def _note_refused(self, key: AddressKey, mac: MacAddress | None) -> None:
        before = self._refused.get(key)
        now = self.clock.monotonic()
        if before is not None and before.mac == mac and now - before.at < _NOTE_S:
            return
        self._refused.pop(key, None)
        if mac is not None:
            neighbour = await self.neighbour(key)
            self._refused[key] = Refusal(mac, neighbour, now)
        if len(self._refused) > _REFUSED:
            del self._refused[next(iter(self._refused))]

    def _whose(self, key: AddressKey, mac: MacAddress | None = None) -> Identity:
        return identify(self.inventory, *key, neighbour_mac=mac)

    def _known_by(self, key: AddressKey, mac: MacAddress | None) -> Instance | None:
        identity = self._whose(key, mac)
        if isinstance(identity, Found) and identity.how is How.NEIGHBOUR:
            return identity.instance
        return None

    async def _identify(self, key: AddressKey) -> tuple[Identity, MacAddress | None]:
        identity = self._whose(key)
        checked = checks_macs(self.inventory, key[0])
        if not (checked or (isinstance(identity, Unknown) and key[1].is_link_local)):
            return identity, None
        mac = await self.neighbour(key)
        return self._whose(key, mac), mac

    async def ask(self, key: AddressKey, scope: Scope) -> api.LookUp | None:
        """Query the source for an address that was not reported; return `None` if no source can be queried."""
        if self.source is None:
            return None
        network, address = key
        if scope is Scope.NETWORK and address.is_link_local and mac_of(address) is None:
            # A privacy address (RFC 7217, RFC 8981): only the MAC in the neighbour table tells its owner.
            mac = await self.neighbour(key)
            if mac is None:
                return api.PortMissing()
            address = link_local_of(mac)
        return await self.source.look_up(scope, network, address)

    async def look(
        self, key: AddressKey, scope: Scope | None = None, port: int | None = None
    ) -> Outcome:
        """Decide the resolver's answer to a request from this address.

        Args:
            scope: Kind of the id in the request, if the request has it.
            port: The guest's port, if the kernel has not seen the address together with its MAC.
        """
        if port is not None and checks_macs(self.inventory, key[0]):
            return await self._look_at_pair(key, port)
        granted = self.mac_filters.granted(key)
        if granted is None or granted == ANY_MAC:
            identity, mac = await self._identify(key)
        else:
            # The request came with this MAC, whatever the neighbour table holds by now.
            identity, mac = self._whose(key, granted), granted
        if not isinstance(identity, Unknown):
            return await self._resolve(key, identity, mac)
        return await self._look_elsewhere(key, scope)

    async def _look_elsewhere(self, key: AddressKey, scope: Scope | None) -> Outcome:
        network = self.inventory.networks.get(key[0])
        # The network's record takes precedence over the request.
        scope = network.scope if network is not None else scope or Scope.NETWORK
        match await self.ask(key, scope):
            case api.PortFound() as found:
                return await self._found(key, scope, found)
            case api.LookUpUnavailable():
                return Denial.UNAVAILABLE
            case None | api.PortMissing() | api.PortAmbiguous():
                return Denial.UNKNOWN if self.inventory.in_sync else Denial.UNAVAILABLE
            case _ as never:
                assert_never(never)

    async def _look_at_pair(self, key: AddressKey, port: int) -> Outcome:
        """Find the owner of an address by the MAC that the connection came from.

        If that MAC is no longer known, use the neighbour table's MAC.
        """
        for _ in range(_LOOKS):
            mac = await self.mac_filters.sender(key, port) or await self.neighbour(key)
            identity = self._whose(key, mac)
            if isinstance(identity, Unknown):
                outcome = await self._look_elsewhere(key, None)
                if isinstance(outcome, Denial):
                    return outcome
                continue
            await self._note_refused(key, mac if isinstance(identity, Mismatch) else None)
            if not isinstance(identity, Found):
                return await self._resolve(key, identity, mac)
            if mac is None and identity.port.mac is not None:
                return Denial.MISMATCH
            if not self.mac_filters.is_up(key[0]):
                # Without the filter, nothing ensures that the answer goes to the instance.
                return Denial.UNAVAILABLE
            if await self._let_answer(key, port, identity, mac):
                known = self.known(identity.instance, key)
                if not isinstance(known, Denial):
                    return known
        # The address keeps changing hands during the lookup.
        return Denial.UNAVAILABLE

    async def _let_answer(
        self, key: AddressKey, port: int, found: Found, mac: MacAddress | None
    ) -> bool:
        """Put the MAC pair in force and send answers only to its MAC; return false if the address has moved on."""
        expected = found.port.mac
        if found.how is How.NEIGHBOUR and mac is not None:
            expected = mac
            await self._learn(key, found.instance, mac)
        elif self.mac_filters.granted(key) != (expected or ANY_MAC):
            await self.records.tickets.wait(self.records.touch(key))
        if self.mac_filters.granted(key) != (expected or ANY_MAC):
            return False
        if expected is None or mac is None:
            return True
        return await self.mac_filters.bind_answers(key, port, mac)

    async def _learn(self, key: AddressKey, instance: Instance, mac: MacAddress | None) -> None:
        for excess in () if mac is None else excess_learned(self.records.learned, key, mac):
            self.records.forget(excess)
        ticket = self._note_learned(key, instance, mac)
        if ticket is None and mac is not None and self.mac_filters.granted(key) != mac:
            ticket = self.records.touch(key)
        if ticket is not None:
            await self.records.tickets.wait(ticket)

    def _note_learned(
        self, key: AddressKey, instance: Instance, mac: MacAddress | None
    ) -> int | None:
        """Note the address's owner; return the ticket, or `None` if only the expiry of a known entry changes."""
        until = math.inf
        if mac is None or not self.is_followed(key):
            until = self.clock.monotonic() + self.learned_ttl_s()
        learned, before = Learned(instance.id, until, mac=mac), self.records.learned.get(key)
        if before is None or replace(before, until=until) != learned:
            return self.records.learn(key, learned)
        self.records.learned[key] = learned
        return None

    async def _resolve(
        self, key: AddressKey, identity: Identity, mac: MacAddress | None
    ) -> Outcome:
        if not isinstance(identity, Found):
            # The owner was found a moment ago and is unknown now: the guest should retry.
            return deny(identity, in_sync=False)
        if identity.how is How.NEIGHBOUR:
            await self._learn(key, identity.instance, mac)
        elif (
            identity.port.mac is not None
            and checks_macs(self.inventory, key[0])
            and self.mac_filters.is_plain(key[0])
        ):
            # MACs must be checked in this network, but the filter is not in place yet.
            return Denial.UNAVAILABLE
        return self.known(identity.instance, key)

    async def _found(self, key: AddressKey, scope: Scope, found: api.PortFound) -> Outcome:
        if scope is Scope.NETWORK:
            await self.records.tickets.wait(self.records.touch(key))
            # Identify by the inventory: another source may claim the address too.
            return await self._resolve(key, *await self._identify(key))
        owner = self.inventory.owner((found.network, key[1]))
        if isinstance(owner, Conflict):
            return Denial.CONFLICT
        if isinstance(owner, Expired):
            return Denial.UNAVAILABLE
        instance = self.inventory.instances.get(found.instance)
        if instance is None or owner != found.instance:
            return Denial.UNAVAILABLE
        await self.records.tickets.wait(self.records.learn(key, _behind_router(key, found)))
        return self.known(instance, key)

    def known(self, instance: Instance, key: AddressKey) -> Outcome:
        """Return the record by which HAProxy answers the instance at this address, or the denial."""
        record = self.records.planned(key)
        if isinstance(record, MapRecord) and record.instance == instance.id:
            return record
        # No endpoint set takes it, and the operator must configure Nova's; or its record is not on disk yet; or another
        # instance has the address by now.
        return Denial.UNAVAILABLE

    async def neighbour(self, key: AddressKey) -> MacAddress | None:
        """Return the kernel's MAC for an address, or `None` if it has none or the table cannot be read."""
        network = self.inventory.networks.get(key[0])
        if network is None:
            return None
        try:
            return await self.read_neighbour(network, key[1])
        except DataplaneError as error:
            structlog.get_logger().warning(
                "neighbour table not read", network=key[0], code=error.code, error=error.message
            )
            return None

    async def review(self, *, everything: bool = False) -> None:
        """Check learned addresses whose time has expired; forget those that are no longer valid.

        Args:
            everything: Check every learned address, because changes of the neighbour table were lost.
        """
        self.follow_routes()
        now = math.inf if everything else self.clock.monotonic()
        learned = self.records.learned.items()
        for key in [key for key, one in learned if one.via is None and one.until <= now]:
            self._review(key, await self.neighbour(key))

    def on_neighbour(self, key: AddressKey, mac: MacAddress | None) -> None:
        """Follow a change in the neighbour table if the address is a learned one."""
        if key in self.records.learned:
            self._review(key, mac)

    def _review(self, key: AddressKey, mac: MacAddress | None) -> None:
        granted = self.mac_filters.granted(key)
        if mac is not None and granted not in (None, ANY_MAC) and self.mac_filters.is_up(key[0]):
            # Another guest that claims the address does not end the owner's entry. Its first request arrives unverified
            # and is looked up by its own MAC.
            mac = granted
        instance = None if mac is None else self._known_by(key, mac)
        if instance is None:
            self.records.forget(key)
        else:
            self._note_learned(key, instance, mac)

    def recall(self) -> None:
        """Restore learned addresses from the MAC pairs of an earlier controller."""
        # Check the owner first: nearly all addresses have one, and reading one grant costs as much as a network's.
        keys = self.mac_filters.keys()
        for key in (one for one in keys if self.inventory.owner(one) is None):
            mac = self.mac_filters.granted(key)
            if mac is None or mac == ANY_MAC or key in self.records.learned:
                continue
            instance = self._known_by(key, mac)
            if instance is not None:
                # The entry expires at once and is checked soon: it may have changed meanwhile.
                self.records.learn(key, Learned(instance.id, self.clock.monotonic(), mac=mac))

    def follow_routes(self) -> None:
        """Replace the learned addresses behind routers by the source's, also those from before a restart."""
        routes = {} if self.source is None else self.source.routes()
        learned = self.records.learned
        for key in [one for one, entry in learned.items() if entry.via and one not in routes]:
            self.records.forget(key)
        for key, found in routes.items():
            behind = _behind_router(key, found)
            if learned.get(key) != behind:
                self.records.learn(key, behind)


def _behind_router(key: AddressKey, found: api.PortFound) -> Learned:
    # No expiry time: the source reports when the route ends.
    return Learned(found.instance, math.inf, via=(found.network, key[1]))
