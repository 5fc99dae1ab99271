"""The source `neutron`: ports of OpenStack's network service, asked for when their guests ask."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imdsproxy.core.addresses import normalise_address
from imdsproxy.core.model import InstanceId, IpAddress, NetworkId, Scope
from imdsproxy.core.observation import AddressKey
from imdsproxy.sources.api import (
    Confirmation,
    LookUp,
    LookUpUnavailable,
    Origin,
    PortFound,
    Publish,
)
from imdsproxy.sources.neutron_asking import QueryResult
from imdsproxy.sources.neutron_kept import KeptPorts
from imdsproxy.sources.neutron_lookups import LookUpResult
from imdsproxy.sources.neutron_running import NeutronPace, Running

if TYPE_CHECKING:
    from pathlib import Path

    from imdsproxy.host.clock import Clock
    from imdsproxy.sources.neutron_api import NeutronClient

__all__ = ["NeutronFigures", "NeutronSource"]


@dataclass(frozen=True, slots=True)
class NeutronFigures:
    """What `/metrics` tells of the source.

    Attributes:
        queries: By result.
        look_ups: By result.
        ports: Known now, in force or aside.
        stale_s: Seconds since Neutron last answered (if it ever did), while it does not; else 0.
        backoff_s: Seconds until it is asked again, while it does not answer; else 0.
    """

    queries: Mapping[QueryResult, int] = field(default_factory=dict)
    look_ups: Mapping[LookUpResult, int] = field(default_factory=dict)
    ports: int = 0
    stale_s: float = 0.0
    backoff_s: float = 0.0


class NeutronSource:
    """Ports as instances whose documents Nova has; see `api.LookUpSource`.

    Args:
        connect: Makes the client; called each time the source is run.
        kept: A file of ours that keeps what is known over a restart.
        pace: How Neutron is asked.
        clock: Time.
        random: Numbers from 0 to 1.
        sleep: Lets seconds pass.
        begin: Waited for before Neutron is asked for anything that no guest waits for; what it takes to ask is
            loaded then. A list without which the source knows nothing is read at once.
        name: The source's name.
    """

    def __init__(
        self,
        connect: Callable[[], NeutronClient],
        kept: Path,
        pace: NeutronPace,
        *,
        clock: Clock,
        random: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        begin: Callable[[], Awaitable[object]] | None = None,
        name: str = "neutron",
    ) -> None:
        self._connect = connect
        self._kept = kept
        self._pace = pace
        self._clock = clock
        self._random = random
        self._sleep = sleep
        self._begin = begin
        self._name = name
        self._running: Running | None = None

    @property
    def name(self) -> str:
        """The source's name."""
        return self._name

    def origin_of_port(self, instance: InstanceId, number: int) -> Origin | None:
        """The port's id in Neutron."""
        ports = () if self._running is None else self._running.known.of(instance)
        return Origin(f"ports.{ports[number].port.id}") if number < len(ports) else None

    async def run(self, publish: Publish) -> None:
        """Report what is known, and keep it up to date, until cancelled.

        While Neutron does not answer what was told stays, and the source tells of that as a problem. It stays in
        sync: to know more than it does it needs a guest's question, not time.
        """
        running = Running(
            self._name,
            self._connect(),
            KeptPorts(self._kept),
            self._pace,
            publish,
            clock=self._clock,
            random=self._random,
            sleep=self._sleep,
        )
        try:
            await running.start()
            self._running = running
            if self._begin is not None and running.complete:
                await self._begin()
            await running.work()
        finally:
            self._running = None
            await running.close()

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> LookUp:
        """Whose the address is; asks Neutron unless it is known."""
        if self._running is None:
            return LookUpUnavailable("the source has not started yet")
        key = (scope, network, normalise_address(address))
        return await self._running.look_ups.look_up(key)

    def routes(self) -> Mapping[AddressKey, PortFound]:
        """Every address behind a router that was looked up and holds now."""
        if self._running is None:
            return {}
        return {
            key: PortFound(known.port.network, known.port.instance)
            for key, known in self._running.routes.in_force()
        }

    def confirmation(self, network: NetworkId, address: IpAddress) -> Confirmation | None:
        """How fresh it is what is known of an address."""
        running = self._running
        known = None if running is None else running.known.at(network, normalise_address(address))
        if known is None or running is None:
            return None
        age = self._clock.monotonic() - known.confirmed
        return Confirmation(known.port.id, age, running.asking.outage is not None)

    @property
    def figures(self) -> NeutronFigures:
        """What is so now."""
        if self._running is None:
            return NeutronFigures()
        asking, now = self._running.asking, self._clock.monotonic()
        outage = asking.outage
        return NeutronFigures(
            queries=dict(asking.results),
            look_ups=dict(self._running.look_ups.results),
            ports=len(self._running.known),
            stale_s=0.0
            if outage is None
            else now - (outage.since if asking.answered is None else asking.answered),
            backoff_s=0.0 if outage is None else max(0.0, outage.until - now),
        )
