"""Interface between sources of records and the controller.

The controller creates a source and runs it once, as one task. The source reports by calling `publish` in the event
loop's thread. Its first complete observation is full and in sync: all records, once all are read. Earlier pieces are
out of sync, and announce that more follows. Later observations may contain only changes. A source that cannot read its
records reports itself out of sync, with the reason among the problems, and keeps trying. Its published records stay. A
source never ends by itself.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, Protocol, TypeAlias

from imdsproxy.errors import Problem
from imdsproxy.model.entities import InstanceId, IpAddress, NetworkId, Scope
from imdsproxy.model.observation import AddressKey, Observation, SourceName, StrandedPort
from imdsproxy.model.packed import PackedInstances

Publish: TypeAlias = Callable[[Observation], object]

_PIECE: Final = 200


class Source(Protocol):
    @property
    def name(self) -> SourceName:
        """Name of the source in settings, status and conflicts."""

    async def run(self, publish: Publish) -> None:
        """Report until cancelled, then close everything that was opened."""

    def explain_stranded(self, port: StrandedPort) -> Problem:
        """Return the problem of a port of this source in a network that no source has, with the port's place."""


@dataclass(frozen=True, slots=True)
class PortFound:
    """Result of a look-up: one port has the address, and its instance is published already.

    `network`: network of the port. Behind a router it differs from the id in the question.
    """

    network: NetworkId
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class PortMissing:
    """Result of a look-up: no served port has the address."""


@dataclass(frozen=True, slots=True)
class PortAmbiguous:
    """Result of a look-up: `count` ports have the address, and none is chosen."""

    count: int


@dataclass(frozen=True, slots=True)
class LookUpUnavailable:
    """Result of a look-up: the address is unknown and cannot be looked up now."""

    reason: str


LookUp: TypeAlias = PortFound | PortMissing | PortAmbiguous | LookUpUnavailable


class LookUpSource(Source, Protocol):
    """Source that does not report everything by itself, but can look up an address.

    It is in sync even while it cannot: then look-ups of unknown addresses return `LookUpUnavailable`.
    """

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> LookUp:
        """Look up the instance that has the address of a requesting guest; never raises.

        `scope`: kind of `network`: a network or a router.
        """

    def routes(self) -> Mapping[AddressKey, PortFound]:
        """Return all valid addresses behind routers that were looked up; the key has the router's id."""

    def explain_freshness(self, network: NetworkId, address: IpAddress) -> str | None:
        """Describe the freshness of the information about an address in its own network; `None` without any."""


@dataclass(slots=True)
class Reports:
    """Reports of a source: the first report in sync is full, later ones contain only changes."""

    source: str
    defers: bool = False
    _last: tuple[object, ...] = (False, (), frozenset(), False)
    _begun: bool = False
    _complete: bool = False

    def next(
        self,
        changes: Observation,
        everything: Callable[[], Observation],
        *,
        in_sync: bool = True,
        problems: tuple[Problem, ...] = (),
        implied: frozenset[NetworkId] = frozenset(),
        expired: bool = False,
    ) -> Observation | None:
        """Return the next report, or `None` if it would repeat the last report.

        `in_sync`: whether the source has all its records.
        """
        full = in_sync and not self._complete
        state = (in_sync, problems, implied, expired)
        if not (full or changes.has_records or state != self._last):
            return None
        records = changes if self._begun and not full else everything()
        self._last, self._begun, self._complete = state, True, self._complete or full
        return replace(
            records,
            source=self.source,
            full=full,
            in_sync=in_sync,
            problems=problems,
            implied_networks=implied,
            defers=self.defers,
            expired=expired,
        )


async def publish_in_pieces(publish: Publish, observation: Observation) -> None:
    """Publish many packed instances a few at a time, so that the event loop does other work in between.

    `observation`: an observation that moves an address between instances, and is not full, is published at once.
    """
    instances, at_once = observation.instances, observation.moves and not observation.full
    if isinstance(instances, PackedInstances) and len(instances) > _PIECE and not at_once:
        first = replace(
            observation,
            full=False,
            instances={},
            in_sync=observation.in_sync and not observation.full,
            networks_removed=(),
            instances_removed=(),
            more=True,
        )
        publish(first)
        piece = replace(first, networks={})
        keys = iter(instances)
        while part := tuple(islice(keys, _PIECE)):
            publish(replace(piece, instances=instances.part(part)))
            await asyncio.sleep(0)
    publish(observation)
