"""What a source reports: everything first, then what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId
from imdsproxy.core.observation import Observation
from imdsproxy.errors import Problem


@dataclass(frozen=True, slots=True)
class RecordSet:
    """Records by id; among changes, `None` stands for one that is gone."""

    networks: Mapping[NetworkId, Network | None] = field(default_factory=dict)
    instances: Mapping[InstanceId, Instance | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.networks or self.instances)


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
        in_sync: bool,
        problems: tuple[Problem, ...] = (),
        implied: frozenset[NetworkId] = frozenset(),
    ) -> Observation | None:
        """The report that is due; `None` where it would say what the one before said.

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
        networks, instances = records.networks, records.instances
        return Observation(
            self.source,
            full=full,
            networks={key: value for key, value in networks.items() if value},
            instances={key: value for key, value in instances.items() if value},
            networks_removed=[key for key, value in networks.items() if not value],
            instances_removed=[key for key, value in instances.items() if not value],
            in_sync=in_sync,
            problems=problems,
            implied_networks=implied,
            defers=self.defers,
        )
