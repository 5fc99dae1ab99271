"""Sets of path rules that records refer to: every HAProxy worker has a set before a record has its id.

A set never changes, so there is nothing to synchronise: a new set is added, and then the record is changed. A set that
no record uses is removed later, when every request that began with it has ended.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from imdsproxy.errors import HostRefused
from imdsproxy.haproxy.records import RecordApplier, write_table
from imdsproxy.haproxy.rules.maps import parse_map
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import write_atomic
from imdsproxy.model.path_rules import PathRules, group_sets, render_set
from imdsproxy.model.policy import rule_set_of

_KEPT_S: Final = 60.0
"""Time for which unused sets stay, in seconds: longer than any request takes from its look-up to its answer."""

_Entries: TypeAlias = Mapping[str, str]


@dataclass(slots=True)
class RuleSets:
    applier: RecordApplier
    clock: Clock
    _sets: dict[str, _Entries] = field(default_factory=dict)
    _needed_at: dict[str, float] = field(default_factory=dict)
    _sent: bool = False

    @property
    def path(self) -> Path:
        return self.applier.layout.path_rules_map

    def load(self) -> None:
        """Load the sets of an earlier controller, and create the file if it is missing: HAProxy needs it to load.

        Raises:
            HostRefused: The file cannot be read or written.
        """
        try:
            _, entries = parse_map(self.path.read_text())
        except FileNotFoundError:
            entries = {}
            write_atomic(self.path, b"")
        except (OSError, UnicodeDecodeError) as error:
            raise HostRefused(f"cannot read {self.path}: {error}") from error
        self._sets = dict(group_sets(entries))
        self._needed_at = dict.fromkeys(self._sets, self.clock.monotonic())

    def preload(self, wanted: Mapping[str, PathRules]) -> None:
        """Write these sets to the file, for a HAProxy that has not started yet.

        Raises:
            HostRefused: The file system refuses.
        """
        self._sets |= _entries_of(wanted)
        self._needed_at |= dict.fromkeys(wanted, self.clock.monotonic())
        write_table(self.path, _flat(self._sets))
        self._sent = True

    async def ensure(self, wanted: Mapping[str, PathRules], *, sweep: bool) -> None:
        """Wait until every current and future worker knows these sets.

        Args:
            sweep: Also remove sets that no record needs; otherwise they are removed only together with another change.

        Raises:
            HostRefused: The file cannot be written; nothing has changed.
            RuntimeUnavailable: HAProxy's master does not answer.
            CommandRefused: A worker refused.
        """
        if self._sent and not sweep and wanted.keys() <= self._sets.keys():
            return
        now = self.clock.monotonic()
        in_force: set[str | None] = set()
        if self._sets:
            in_force = {rule_set_of(value) for _, value in self.applier.state.entries()}
        needed = wanted.keys() | self._sets.keys() & in_force
        self._needed_at |= dict.fromkeys(needed, now)
        late = {name for name, at in self._needed_at.items() if now - at >= _KEPT_S}
        sets = {name: one for name, one in self._sets.items() if name not in late}
        sets |= _entries_of(wanted)
        if sets == self._sets and (self._sent or not sets):
            return
        self._sent = False
        await self.applier.apply_table(self.path, _flat(sets))
        self._sets, self._sent = sets, True
        self._needed_at = {name: self._needed_at[name] for name in sets}


def _flat(sets: Mapping[str, _Entries]) -> dict[str, str]:
    return {key: value for one in sets.values() for key, value in one.items()}


def _entries_of(wanted: Mapping[str, PathRules]) -> dict[str, _Entries]:
    return {name: render_set(rules) for name, rules in wanted.items()}
