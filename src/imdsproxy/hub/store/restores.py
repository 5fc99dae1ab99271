"""Reaction of a hub to a restored etcd: claims of a restore, and lost values written back to etcd.

The hub writes lasting values (`fleet.restores`) back at once, since a revocation may not wait for an operator.
Records wait for `fleet accept-restore`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

import structlog

from imdsproxy.errors import EtcdUnavailable, SourceRefused
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import attempt
from imdsproxy.fleet.layout import (
    Claim,
    HostId,
    Meta,
    StoredHost,
    Suspicion,
    parse_beat,
    parse_suspicion,
    render_suspicion,
)
from imdsproxy.fleet.restores import Evidence, describe_regained, is_lasting, member_in
from imdsproxy.host.clock import Clock
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Committed, Compacted, Compare, Snapshot, unchanged
from imdsproxy.hub.store.journal import Journal, Position
from imdsproxy.hub.store.state import Change, FleetState, change_of
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import OperatorOverride

_AGAIN_S: Final = 1.0
_MOST_PENDING: Final = 1000
"""Maximum number of claims that wait to be written; more witnesses would change nothing."""

_PUT_BACK: Final = 50

Fold: TypeAlias = "Callable[[Sequence[Change]], None]"
"""Function that applies an answer of etcd to the copy."""

_log = structlog.get_logger()


@dataclass(slots=True)
class Restores:
    """Claims and repairs of this hub; `incarnation` is the fleet's at the last read of etcd."""

    etcd: Etcd
    state: FleetState
    name: str
    journal: Journal
    clock: Clock
    incarnation: int = 0
    _evidence: dict[HostId | None, tuple[Evidence, int]] = field(default_factory=dict)
    _noticed: asyncio.Event = field(default_factory=asyncio.Event)
    _settled: asyncio.Event = field(default_factory=asyncio.Event)

    def known(self) -> Meta:
        """Return the fleet's metadata known to this hub; incarnation 0 if only the journal has the fleet."""
        return self.state.meta if self.state.meta.fleet else Meta(self.journal.position.fleet, 0)

    def look_back(self, found: Position) -> None:
        """Suspect a restore if etcd is behind this hub's journal, which survives restarts of the hub."""
        why = self.journal.position.lacks(found)
        if why is not None:
            self.suspect(Evidence(why))

    def review(self, keys: Sequence[str], *, accepted: bool) -> None:
        """Journal lasting values of changed keys, and schedule writing lost values back to etcd.

        If an operator has `accepted` the contents of etcd, values that etcd lacks are not suspicious.
        """
        self._write_down(keys)
        ahead = [key for key in keys if key in self.state.ahead]
        if ahead:
            self._noticed.set()
            self._settled.clear()
        if ahead and not accepted:
            regained = self._regained(ahead)
            whose, what = next(iter(regained.items()))
            why = f"etcd has lost the newest value of {whose}, which {what}"
            self.suspect(Evidence(why, regained=regained))

    def _write_down(self, keys: Iterable[str]) -> None:
        """Journal lasting values and hub names among these keys, and etcd's position."""
        state, values = self.state, dict[str, bytes]()
        for key in keys:
            found = state.value(key)
            if found is not None and is_lasting(key):
                values[key] = found[0]
            elif found is not None and key.startswith(layout.HUBS):
                self.journal.note_name(key.removeprefix(layout.HUBS), "a hub")
        self.journal.note(values)
        beat = state.value(layout.BEAT)
        beats = 0 if beat is None else parse_beat(beat[0]).count
        fleet = state.meta.fleet
        self.journal.advance(Position(fleet, self.incarnation, state.revision, beats))

    def _regained(self, keys: Iterable[str]) -> dict[str, str]:
        state = self.state
        found = ((key, state.value(key)) for key in keys)
        return dict(
            describe_regained(key, value[0], absent=state.ahead.get(key) == 0)
            for key, value in found
            if value is not None
        )

    def suspect(self, evidence: Evidence) -> None:
        # Only the last evidence of each host is kept: a host may send a hello as often as it likes.
        host, before = evidence.host, self._evidence.get(evidence.host)
        self.state.doubted |= host is None
        if before is None and host is not None and len(self._evidence) >= _MOST_PENDING:
            return
        regained = {**(before[0].regained if before else {}), **evidence.regained}
        evidence = replace(evidence, why=codec.plain(evidence.why), regained=regained)
        self._evidence[host] = evidence, self.incarnation
        self._settled.clear()
        self._noticed.set()

    def raise_overrides(
        self, host: HostId, overrides: Mapping[InstanceId, OperatorOverride]
    ) -> None:
        """Join overrides that a host has in force, and put overrides back that etcd has lost."""
        raised = self.state.raise_overrides(host, overrides, self.clock.now().timestamp())
        if raised:
            self._write_down(raised)
            regained = self._regained(raised)
            why = f"{host} has a newer value of {next(iter(regained))} than etcd"
            self.suspect(Evidence(why, host, regained=regained))

    async def run(self, fold: Fold) -> None:
        """Write claims, and put back values that etcd has lost, until cancelled."""
        while True:
            while not (self._evidence or self.state.ahead):
                self._settled.set()
                self._noticed.clear()
                await self._noticed.wait()
            if self._evidence:
                # Operators can see the lost values before the hub puts them back.
                host = next(iter(self._evidence))
                await self._note_at_last(*self._evidence.pop(host))
            else:
                await self._put_back(fold)
                # Wait for the watch to show the write; this also limits the pace of a captured host.
                await asyncio.sleep(_AGAIN_S)

    async def _note_at_last(self, evidence: Evidence, incarnation: int) -> None:
        noted = False
        while not noted:
            try:
                noted = await self._note(evidence, incarnation)
            except (EtcdUnavailable, Compacted) as error:
                _log.warning("suspicion not written yet", reason=str(error))
                await asyncio.sleep(_AGAIN_S)
            except SourceRefused as error:
                # Another attempt would be refused as well.
                _log.error("suspicion not written", host=evidence.host, reason=error.message)
                return

    async def _note(self, evidence: Evidence, incarnation: int) -> bool:
        """Add evidence to the suspicion in etcd; return whether the evidence is written or has become unnecessary.

        `incarnation` is that of this hub's copy when the hub noticed the evidence.
        """
        found, meta = await self.etcd.read(layout.SUSPECT), await self.etcd.read(layout.META)
        meta_now = _meta_in(meta)
        if evidence.is_refuted(found.revision, meta_now):
            return True
        if meta_now is not None and self.known().fleet not in {"", meta_now.fleet}:
            return True
        # An operator may have accepted the restore since the hub noticed the evidence.
        if meta_now is not None and meta_now.incarnation > incarnation > 0:
            return True
        at, known = 0, None
        for one in found.kvs:
            at, known = one.mod_revision, attempt(parse_suspicion, one.value)
        before = None if known is None else known.of_members(self._member)
        now = self._add(evidence, before or Suspicion(evidence.why))
        if now is None or now == before:
            return True
        who = self.name if evidence.host is None else evidence.host
        _log.error("a restored backup is suspected", claimed_by=who, reason=evidence.why)
        same = [unchanged(layout.SUSPECT, at)]
        same += [unchanged(layout.META, one.mod_revision) for one in meta.kvs]
        done = await self.etcd.commit(same, {layout.SUSPECT: render_suspicion(now)})
        return isinstance(done, Committed)

    def _add(self, evidence: Evidence, before: Suspicion) -> Suspicion | None:
        """Return the suspicion with the evidence; `None` if no claim counts."""
        if evidence.host is None:
            incarnation = max(self.journal.position.incarnation, self.state.meta.incarnation)
            return before.regain(evidence.regained).add_hub(self.name, incarnation)
        member = self._member(evidence.host)
        revocations = 0 if member is None else member.revocations
        claim = Claim(evidence.incarnation, revocations)
        after = before.regain(evidence.regained).add_host(evidence.host, claim)
        return after.of_members(self._member)

    def _member(self, host: HostId) -> StoredHost | None:
        return member_in(self.state.value, host)

    async def _put_back(self, fold: Fold) -> None:
        """Write lasting values that etcd lacks or has in an older version, so that a restore undoes none."""
        try:
            meta = await self.etcd.read(layout.META)
            now = _meta_in(meta)
            if meta.kvs and (now is None or now.fleet != self.known().fleet):
                return
            same = unchanged(layout.META, meta.kvs[0].mod_revision if meta.kvs else 0)
            keys = sorted(self.state.ahead)
            for begin in range(0, len(keys), _PUT_BACK):
                await self._put_back_some(keys[begin : begin + _PUT_BACK], same, fold)
        except (EtcdUnavailable, Compacted) as error:
            _log.warning("not put back yet", keys=len(self.state.ahead), reason=str(error))

    async def _put_back_some(self, keys: Sequence[str], same: Compare, fold: Fold) -> None:
        state = self.state
        found = ((key, state.value(key)) for key in keys if key in state.ahead)
        puts = {key: value[0] for key, value in found if value is not None}
        compares = [unchanged(key, state.ahead[key]) for key in puts]
        regained = self._regained(puts)
        done = await self.etcd.commit([same, *compares], puts)
        if isinstance(done, Committed):
            for whose, what in regained.items():
                _log.warning("put back into etcd", whose=whose, what=what)
            return
        # Another hub was first, or etcd's value differs from this hub's copy.
        there = {one.key: change_of(one) for one in done.kvs}
        fold([there.get(key, Change(key, None, done.revision)) for key in puts])

    async def settle(self, within_s: float) -> None:
        """Wait until all claims are written and all lost values are put back, for at most `within_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._settled.wait()


def _meta_in(found: Snapshot) -> Meta | None:
    return next((attempt(layout.parse_meta, one.value) for one in found.kvs), None)
