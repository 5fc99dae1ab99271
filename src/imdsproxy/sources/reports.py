"""What a source reports: everything first, then what differs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from imdsproxy.core.model import NetworkId
from imdsproxy.core.observation import Observation, RecordSet
from imdsproxy.core.packed import PackedInstances
from imdsproxy.errors import Problem
from imdsproxy.sources.api import Publish

_PIECE: Final = 200


@dataclass(slots=True)
class Reports:
    """What a source has reported: the first report in sync is full, later ones hold changes only.

    Attributes:
        source: The source's name.
        defers: As `Observation.defers`.
    """

    source: str
    defers: bool = False
    _last: tuple[object, ...] = (False, (), frozenset())
    _begun: bool = False
    _complete: bool = False

    def next(
        self,
        changes: RecordSet,
        everything: Callable[[], RecordSet],
        *,
        in_sync: bool = True,
        problems: tuple[Problem, ...] = (),
        implied: frozenset[NetworkId] = frozenset(),
    ) -> Observation | None:
        """The report that is due; `None` where it would repeat the one before.

        Args:
            changes: Since this was called last.
            everything: All that is in force.
            in_sync: Everything is known.
            problems: All of them.
            implied: As `Observation.implied_networks`.
        """
        full = in_sync and not self._complete
        state = (in_sync, problems, implied)
        if not (full or changes or state != self._last):
            return None
        records = changes if self._begun and not full else everything()
        self._last, self._begun, self._complete = state, True, self._complete or full
        return Observation(
            self.source,
            full=full,
            networks=records.networks,
            instances=records.instances,
            networks_removed=records.networks_removed,
            instances_removed=records.instances_removed,
            in_sync=in_sync,
            problems=problems,
            implied_networks=implied,
            defers=self.defers,
        )


async def publish_in_pieces(publish: Publish, observation: Observation) -> None:
    """Publish many packed instances a few at a time, so that the event loop does other work in between.

    Args:
        publish: Takes each piece; the last one is the observation itself.
        observation: No address in it moves from one instance to another.
    """
    instances = observation.instances
    if isinstance(instances, PackedInstances) and len(instances) > _PIECE:
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
