"""What a source of records is, seen from who consumes it, and how it reports.

A source is made by the controller, runs once, as one task, and reports by calling `publish` in the
event loop's thread. Its first observation is full: everything that it has, in sync, once it has read all of
it; pieces of it that come before are out of sync, and say that more follows. Later ones may hold only changes.
Where it cannot read its records, it reports itself out of sync with the reason among the problems, keeps trying,
and what it published before stays; it never ends by itself.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, Protocol, TypeAlias

from imdsproxy.core.model import InstanceId, IpAddress, NetworkId, Scope
from imdsproxy.core.observation import AddressKey, Observation, SourceName, StrandedPort
from imdsproxy.core.packed import PackedInstances
from imdsproxy.errors import Problem

Publish: TypeAlias = Callable[[Observation], object]

_PIECE: Final = 200


class Source(Protocol):
    """Where networks, ports and instances come from."""

    @property
    def name(self) -> SourceName:
        """Its name in settings, status and conflicts."""

    async def run(self, publish: Publish) -> None:
        """Report until cancelled; everything opened is closed again when that is over."""

    def explain_stranded(self, port: StrandedPort) -> Problem:
        """What is wrong with a port of its own in a network that no source has, and where it was written."""


@dataclass(frozen=True, slots=True)
class PortFound:
    """One port has the address; its instance was published before.

    Attributes:
        network: The port's own: behind a router it is not the id that was asked for.
    """

    network: NetworkId
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class PortMissing:
    """No port that serves has the address."""


@dataclass(frozen=True, slots=True)
class PortAmbiguous:
    """So many ports have it, and none is chosen."""

    count: int


@dataclass(frozen=True, slots=True)
class LookUpUnavailable:
    """It cannot be looked up now, and nothing is known of the address."""

    reason: str


LookUp: TypeAlias = PortFound | PortMissing | PortAmbiguous | LookUpUnavailable


class LookUpSource(Source, Protocol):
    """A source that does not report everything by itself, but can look an address up.

    It is in sync also while it cannot: then look-ups of unknown addresses give `LookUpUnavailable`.
    """

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> LookUp:
        """The instance that has the address, for a guest that asks; never raises.

        Args:
            scope: What `network` stands for.
            network: A network's id, or a router's.
            address: The guest's.
        """

    def routes(self) -> Mapping[AddressKey, PortFound]:
        """Every address behind a router (the router's id in the key) that was looked up and holds now."""

    def explain_freshness(self, network: NetworkId, address: IpAddress) -> str | None:
        """How fresh the information about an address in its own network is, in words; `None` if there is none."""


@dataclass(slots=True)
class Reports:
    """What a source has reported: the first report in sync is full, later ones hold changes only.

    Attributes:
        source: The source's name.
        defers: As `Observation.defers`.
    """

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
        """The report that is due; `None` where it would repeat the one before.

        Args:
            changes: The records since this was called last.
            everything: All records in force.
            in_sync: Everything is known.
            problems: All of them.
            implied: As `Observation.implied_networks`.
            expired: As `Observation.expired`.
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

    Args:
        publish: Takes each piece; the last one is the observation itself.
        observation: One that moves an address between instances, and is not full, is published at once.
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
