"""Which ports have an address: the questions that neutron-metadata-agent asks, and the same rules.

Neutron's own are in `neutron/agent/metadata/agent.py`: in a network by `fixed_ips`, behind a router over all of its
networks, and for an IPv6 link-local address by the MAC that it is made of (RFC 4291, appendix A).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from imdsproxy.core.addresses import mac_of
from imdsproxy.core.model import IpAddress, NetworkId
from imdsproxy.sources.neutron_api import (
    MAX_VALUES,
    ROUTER_OWNERS,
    NeutronPort,
    PortQuery,
)

if TYPE_CHECKING:
    from collections.abc import Hashable

    from imdsproxy.host.clock import Clock
    from imdsproxy.sources.neutron_asking import Asking

__all__ = ["Finder", "Found", "RouterNetworks", "chunks"]

_T = TypeVar("_T")
_HALF: Final = MAX_VALUES // 2


@dataclass(frozen=True, slots=True)
class Found:
    """Each address's ports, all that have it whether they serve or not; asked then (monotonic seconds)."""

    ports: Mapping[IpAddress, tuple[NeutronPort, ...]]
    asked: float


@dataclass(frozen=True, slots=True)
class RouterNetworks:
    """The networks that a router joins, as of then."""

    networks: tuple[NetworkId, ...]
    asked: float


class Finder:
    """Asks for ports by address, and believes of the answer what it can see.

    Args:
        networks_s: How long it is believed which networks a router joins; in seconds.
    """

    def __init__(self, asking: Asking, clock: Clock, *, networks_s: float) -> None:
        self._asking = asking
        self._clock = clock
        self._networks_s = networks_s
        self._routers: dict[NetworkId, RouterNetworks] = {}
        self._pending: dict[NetworkId, asyncio.Task[RouterNetworks]] = {}

    async def find(
        self, networks: Sequence[NetworkId], addresses: Iterable[IpAddress], *, share: Hashable
    ) -> Found:
        """The ports in any of the networks that have the addresses.

        An answer's port counts only if it has the address: a Neutron that does not know a filter leaves it out.

        Raises:
            SourceUnavailable: Neutron cannot be asked.
        """
        asked = self._clock.monotonic()
        found: dict[IpAddress, dict[str, NeutronPort]] = {each: {} for each in addresses}
        by_ip = [each for each in found if not each.is_link_local]
        by_mac = {mac: each for each in found if (mac := mac_of(each)) is not None}
        for some in chunks(networks, _HALF):
            queries = [PortQuery(networks=some, addresses=each) for each in chunks(by_ip, _HALF)]
            queries += [PortQuery(networks=some, macs=each) for each in chunks([*by_mac], _HALF)]
            for query in queries:
                answer = await self._asking.ask(query, share=share)
                asked = min(asked, answer.asked)
                _collect(answer.ports, frozenset(some), found)
        return Found({each: tuple(ports.values()) for each, ports in found.items()}, asked)

    async def networks_of(self, router: NetworkId, *, share: Hashable) -> RouterNetworks:
        """The networks that the router has an interface in; believed for a while.

        Raises:
            SourceUnavailable: Neutron cannot be asked.
        """
        known = self._routers.get(router)
        if known is not None and self._clock.monotonic() - known.asked < self._networks_s:
            return known
        task = self._pending.get(router)
        if task is None:
            task = asyncio.create_task(self._ask_networks(router, share))
            self._pending[router] = task
            task.add_done_callback(partial(self._asked, router))
        return await asyncio.shield(task)

    def _asked(self, router: NetworkId, task: asyncio.Task[RouterNetworks]) -> None:
        self._pending.pop(router, None)
        # Who waited may be gone: then nobody takes note of a failure, and asyncio would complain of that.
        if not task.cancelled():
            task.exception()

    async def _ask_networks(self, router: NetworkId, share: Hashable) -> RouterNetworks:
        query = PortQuery(devices=(router,), owners=ROUTER_OWNERS)
        answer = await self._asking.ask(query, share=share)
        interfaces = (
            port for port in answer.ports if port.device == router and port.owner in ROUTER_OWNERS
        )
        found = RouterNetworks(tuple(sorted({port.network for port in interfaces})), answer.asked)
        if found.networks:
            # Of a router without any it is as likely that Neutron has just started, and shows nothing yet.
            self._routers[router] = found
        return found

    def forget_old(self) -> None:
        """Let go of what is not believed any more."""
        oldest = self._clock.monotonic() - self._networks_s
        for router in [each for each, known in self._routers.items() if known.asked <= oldest]:
            del self._routers[router]

    async def close(self) -> None:
        """Give up what is being asked."""
        pending = tuple(self._pending.values())
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _collect(
    ports: Iterable[NeutronPort],
    networks: frozenset[NetworkId],
    found: Mapping[IpAddress, dict[str, NeutronPort]],
) -> None:
    for port in ports:
        if port.network not in networks:
            continue
        for address, having in found.items():
            if port.has(address):
                having[port.id] = port


def chunks(values: Sequence[_T], size: int) -> list[tuple[_T, ...]]:
    """The values, so many at a time."""
    return [tuple(values[start : start + size]) for start in range(0, len(values), size)]
