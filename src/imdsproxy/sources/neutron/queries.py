"""Queries to Neutron with limits and back-off, and the queries that find an address's ports.

Queries and rules are those of neutron-metadata-agent (`neutron/agent/metadata/agent.py`): in a network by `fixed_ips`,
behind a router in all its networks, and for an IPv6 link-local address by the MAC from which the address is derived
(RFC 4291, appendix A).
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, TypeVar
from weakref import WeakValueDictionary

from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.errors import SourceUnavailable
from imdsproxy.host.clock import Clock
from imdsproxy.model.addresses import mac_of
from imdsproxy.model.entities import IpAddress, NetworkId
from imdsproxy.reconcile.progress import Backoff, Durations
from imdsproxy.sources.neutron.client import NeutronClient, QueryTimedOut
from imdsproxy.sources.neutron.ports import MAX_VALUES, ROUTER_OWNERS, NeutronPort, PortQuery

QueryResult: TypeAlias = Literal["ok", "failed", "timeout"]

_T = TypeVar("_T")
_FIRST_S: Final = 2.0
_LONGEST_S: Final = 30.0
_SETTLES_S: Final = 3.0
"""Seconds for which a Neutron that has just come back may omit ports (see `known`)."""
_MAX_WAITING: Final = 64
_HALF: Final = MAX_VALUES // 2


Answer: TypeAlias = tuple[_T, float]
"""Answer of Neutron and the monotonic time of the query: the answer is not older."""


@dataclass(slots=True)
class Queries:
    """Queries to Neutron, with limits and back-off.

    Each query belongs to a share: a network, a router, or our own work. No share may use more than half of the slots,
    so that a network whose guests invent addresses leaves room for the others.

    After a failure, queries fail at once during a back-off with full jitter (at most 30 s). Then a single query probes
    Neutron; other queries fail at once until it is answered.

    Attributes:
        settings: `max_queries` is the number of slots; a router's networks are cached for half of `refresh_s`.
        outage: Last failure during an outage; `None` while Neutron answers.
        until: Monotonic time of the next query during an outage.
        answered: Monotonic time of Neutron's last answer; initially the time of the start.
        steady: Monotonic time at which the last outage ended.
    """

    client: NeutronClient
    settings: NeutronSourceSettings
    clock: Clock
    random: Callable[[], float]
    on_change: Callable[[], None]
    outage: SourceUnavailable | None = None
    until: float = 0.0
    answered: float = field(init=False)
    steady: float = -math.inf
    results: Counter[QueryResult] = field(default_factory=Counter)
    durations: Durations = field(default_factory=Durations)
    _backoff: Backoff = field(default_factory=lambda: Backoff(_FIRST_S, _LONGEST_S))
    _probing: bool = False
    _waiting: Counter[NetworkId | None] = field(default_factory=Counter)
    _shares: WeakValueDictionary[NetworkId | None, asyncio.Semaphore] = field(
        default_factory=WeakValueDictionary
    )
    _routers: dict[NetworkId, Answer[list[NetworkId]]] = field(default_factory=dict)
    _asking: WeakValueDictionary[NetworkId, asyncio.Lock] = field(
        default_factory=WeakValueDictionary
    )
    _slots: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.settings.max_queries)
        self.answered = self.clock.monotonic()

    @property
    def may_ask(self) -> bool:
        return self.outage is None or not (self._probing or self.backoff_s)

    @property
    def stale_s(self) -> float:
        """Seconds since Neutron's last answer, or since the start, during an outage; else 0."""
        return 0.0 if self.outage is None else self.clock.monotonic() - self.answered

    @property
    def backoff_s(self) -> float:
        """Seconds until the next query during an outage; else 0."""
        return 0.0 if self.outage is None else max(0.0, self.until - self.clock.monotonic())

    @property
    def per_share(self) -> int:
        """Maximum number of running queries of one share."""
        return max(1, self.settings.max_queries // 2)

    @property
    def settling(self) -> bool:
        """Whether an outage has just ended: Neutron may still omit ports that exist."""
        return self.clock.monotonic() - self.steady < _SETTLES_S

    async def ask(
        self, query: PortQuery, share: NetworkId | None = None, *, patient: bool = False
    ) -> Answer[tuple[NeutronPort, ...]]:
        """Make a query.

        Args:
            query: The query. It may contain a guest's address, and no other data from guests.
            patient: Whether the query is our own long query, whose timeout is no outage.

        Raises:
            SourceUnavailable: Neutron does not answer, has not answered a moment ago, or the share is full.
        """
        self._refuse_in_outage()
        slots = self._shares.setdefault(share, asyncio.Semaphore(self.per_share))
        if share is not None and self._waiting[share] >= self.per_share + _MAX_WAITING:
            raise SourceUnavailable("too many questions about this network are waiting for Neutron")
        self._waiting[share] += 1
        try:
            async with slots, self._slots:
                self._refuse_in_outage()
                return await self._ask(query, patient=patient)
        finally:
            self._waiting[share] -= 1
            if not self._waiting[share]:
                del self._waiting[share]

    def _refuse_in_outage(self) -> None:
        if self.outage is not None and not self.may_ask:
            raise SourceUnavailable(self.outage.message, hint=self.outage.hint)

    async def _ask(self, query: PortQuery, *, patient: bool) -> Answer[tuple[NeutronPort, ...]]:
        asked = self.clock.monotonic()
        probe = self.outage is not None
        self._probing = self._probing or probe
        try:
            ports = await self.client.ports(query)
        except SourceUnavailable as error:
            late = isinstance(error, QueryTimedOut)
            self.results["timeout" if late else "failed"] += 1
            # A query that was already running when another failed has met the same failure.
            if not (late and patient) and (probe or self.outage is None):
                begins, self.outage = self.outage is None, error
                self.until = self.clock.monotonic() + self.random() * self._backoff.fail()
                if begins:
                    self.on_change()
            raise
        finally:
            if probe:
                self._probing = False
        self.results["ok"] += 1
        self.answered = self.clock.monotonic()
        self.durations.add(self.answered - asked)
        if self.outage is not None:
            self.outage = None
            self.steady = self.answered
            self._backoff.succeed()
            self.on_change()
        return ports, asked

    # Look-ups of addresses

    async def find(
        self, networks: Sequence[NetworkId], addresses: Iterable[IpAddress], share: NetworkId | None
    ) -> Answer[Mapping[IpAddress, Sequence[NeutronPort]]]:
        """Return all ports in the networks that have the addresses, by address, whether the ports serve or not.

        Each port of an answer is checked for the address: a Neutron that does not know a filter ignores it.
        """
        began = self.clock.monotonic()
        found: dict[IpAddress, dict[str, NeutronPort]] = {each: {} for each in addresses}
        by_ip = [each for each in found if not each.is_link_local]
        by_mac = [mac for each in found if (mac := mac_of(each)) is not None]
        for some in chunks(networks, _HALF):
            queries = [PortQuery(networks=some, addresses=each) for each in chunks(by_ip, _HALF)]
            queries += [PortQuery(networks=some, macs=each) for each in chunks(by_mac, _HALF)]
            for query in queries:
                answer, _ = await self.ask(query, share)
                for port in answer:
                    keys = port.keys if port.network in some else ()
                    for address, ports in found.items():
                        if (port.network, address) in keys:
                            ports[port.id] = port
        return {each: tuple(ports.values()) for each, ports in found.items()}, began

    async def networks_of(
        self, router: NetworkId, share: NetworkId | None
    ) -> Answer[list[NetworkId]]:
        """Return the networks in which the router has an interface; cached for a while."""
        before = self._routers.get(router)
        async with self._asking.setdefault(router, asyncio.Lock()):
            known = self._routers.get(router)
            # A task that waited for another task's query takes its answer in any case. Later, an answer without
            # networks is not reused: a Neutron that has just started may omit ports.
            if known is not None and (known is not before or (known[0] and self._is_fresh(known))):
                return known
            query = PortQuery(devices=(router,), owners=ROUTER_OWNERS)
            ports, asked = await self.ask(query, share)
            joined = {
                port.network
                for port in ports
                if port.device == router and port.owner in ROUTER_OWNERS
            }
            answer = self._routers[router] = sorted(joined), asked
            return answer

    def forget_old(self) -> None:
        self._routers = {key: one for key, one in self._routers.items() if self._is_fresh(one)}

    def _is_fresh(self, joined: Answer[list[NetworkId]]) -> bool:
        return self.clock.monotonic() - joined[1] < self.settings.refresh_s / 2


def chunks(values: Sequence[_T], size: int) -> list[tuple[_T, ...]]:
    """Split the values into tuples of `size`; the last tuple may be shorter."""
    return [tuple(values[start : start + size]) for start in range(0, len(values), size)]
