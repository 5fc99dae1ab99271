"""Replication of etcd into a hub's copy: read once, then watched. The copy keeps values that etcd loses.

A hub writes two keys for itself: its URL, and a beat every few seconds, by which all watches show that they are alive.
Module `restores` writes claims of a restored backup.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final
from uuid import UUID

import structlog

from imdsproxy.errors import EtcdUnavailable, Problem, SourceCorrupt
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import attempt
from imdsproxy.fleet.layout import (
    Beat,
    HostId,
    HubPlace,
    Meta,
    parse_beat,
    parse_value,
    render_beat,
    render_hub,
)
from imdsproxy.fleet.restores import LASTING, Evidence
from imdsproxy.fleet.stream import ItemKey
from imdsproxy.host.clock import Clock
from imdsproxy.host.process import garbage_left
from imdsproxy.hub.hosts.streams import Streams
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import (
    Behind,
    Committed,
    Compacted,
    Conflict,
    Deleted,
    KeyValue,
    Snapshot,
    absent,
    prefix_end,
    unchanged,
)
from imdsproxy.hub.store.journal import Position
from imdsproxy.hub.store.restores import Restores
from imdsproxy.hub.store.state import Change, FleetState, change_of
from imdsproxy.hub.store.upkeep import keep_hub_records
from imdsproxy.reconcile.reconciler import Reconciler

BEAT_S: Final = 5.0
LEASE_S: Final = 15
SILENT_S: Final = 30.0
"""Seconds without an answer after which etcd counts as gone; a beat is due every five seconds."""

COMPARE_S: Final = 600.0
AT_ONCE: Final = 500
"""Number of keys to apply before the event loop does other work for waiting hosts: 10 ms."""

_LATE_S: Final = 1.0
"""Maximum delay of the watch after a write."""

_MOST_BEHIND: Final = 1000
"""Maximum number of beats that a hub's journal may lag behind; it is written every five seconds."""

_MOST_RECOVERED: Final = 100
_VERSIONS: Final = 5
"""Number of older versions of an unreadable key to try."""

_LEAVE_S: Final = 2.0
_REVIEWED: Final = (layout.BEAT, layout.HUBS, *LASTING)

_log = structlog.get_logger()


@dataclass(slots=True)
class Replica:
    """Replication of etcd into the copy, and delivery of changes to hosts.

    `complete` is set once the copy is complete.
    """

    etcd: Etcd
    state: FleetState
    streams: Streams
    name: str
    url: str
    clock: Clock
    random: Random
    restores: Restores
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    _at: int = 0
    _last: frozenset[KeyValue | Deleted] = frozenset()
    _incarnation: int = 0
    _beat_seen: float = 0.0
    _doubtful: bool = False
    _expected: int = 0
    _limit: asyncio.Timeout | None = None
    _following: Reconciler = field(init=False)

    def __post_init__(self) -> None:
        jitter = partial(self.random.uniform, 0.5, 1.0)
        self._following = Reconciler("hub.etcd", "etcd not followed", 0.1, 5.0, jitter=jitter)

    @property
    def failure(self) -> Problem | None:
        return self._following.failure

    async def run(self) -> None:
        """Follow etcd until cancelled; the copy stays during an outage.

        Raises `SourceCorrupt` if the fleet has an unknown format, or its own key is missing.
        """
        reading = True
        while True:
            try:
                if reading or self._doubtful:
                    await self._read()
                    reading, self._last = False, frozenset()
                # The watch repeats the last events, unless etcd has another history with the same revision numbers.
                expected = self._last
                begin = self._at if expected else self._at + 1
                async with (
                    asyncio.timeout(None) as self._limit,
                    aclosing(self.etcd.follow(layout.PREFIX, begin)) as following,
                ):
                    async for changes in following:
                        self._following.succeed()
                        if reading := not expected.issubset(changes.events):
                            break
                        expected = frozenset()
                        folded = [change_of(one) for one in changes.events]
                        # A new incarnation is read together with all its other keys.
                        if reading := self._doubtful or self._begins_anew(folded):
                            break
                        self._at = changes.revision
                        self._last = frozenset(
                            one for one in changes.events if one.mod_revision == self._at
                        )
                        self._fold(changes.revision, folded)
            except TimeoutError:
                self.etcd.leave("its watch does not show recent writes")
            except Compacted:
                reading = True
            except Behind as error:
                self.restores.suspect(Evidence(error.message))
                self.etcd.accept_older()
                reading = True
            except EtcdUnavailable as error:
                await asyncio.sleep(self._following.fail(error))

    def _begins_anew(self, changes: Iterable[Change]) -> bool:
        """Return whether the changes have another fleet or incarnation; an accepted restore raises the latter."""
        metas = [_meta_of(one, self.state.meta) for one in changes if one.key == layout.META]
        known = self.state.meta.fleet, self._incarnation
        return any((one.fleet, one.incarnation) != known for one in metas)

    async def _read(self) -> None:
        """Read all keys; create the fleet if etcd is empty and this hub knows no fleet."""
        snapshot = await self.etcd.read(layout.PREFIX, prefix_end(layout.PREFIX))
        known = self.restores.known()
        if not known.fleet and not snapshot.kvs:
            await self._found_fleet()
            snapshot = await self.etcd.read(layout.PREFIX, prefix_end(layout.PREFIX))
        found = next((one for one in snapshot.kvs if one.key == layout.META), None)
        # If the fleet's own key was deleted, this hub goes on with the fleet that it knows.
        meta_now = known if found is None else _meta_of(change_of(found), known)
        if found is not None and not meta_now.fleet:
            older = await self._last_good(layout.META, found.mod_revision)
            meta_now = known if older is None else _meta_of(older, known)
        # If the key is unreadable, this hub reports that, and serves no host until it is repaired.
        if found is None and not meta_now.fleet:
            raise SourceCorrupt(
                "etcd has records of a fleet, but the fleet's own key was deleted",
                hint=f"restore etcd from a backup; or put {layout.META} back as a running hub knows the key",
            )
        if known.fleet not in {"", meta_now.fleet}:
            self._refuse_fleet(known.fleet, meta_now.fleet)
        self._doubtful = False
        self._at, count = snapshot.revision, len(snapshot.kvs)
        if meta_now.format != layout.FORMAT:
            raise SourceCorrupt(
                f"etcd has a fleet of format {meta_now.format}, but this hub supports {layout.FORMAT}",
                hint="upgrade this hub",
            )
        if found is None or attempt(layout.parse_meta, found.value) is not None:
            # An unreadable beat does not count as one that went back.
            beats = self._beats_in(snapshot)
            at = Position(meta_now.fleet, meta_now.incarnation, snapshot.revision, beats)
            self.restores.look_back(at)
        before = self._incarnation or self.restores.journal.position.incarnation
        self._incarnation = meta_now.incarnation
        if not self.state.meta.fleet:
            # Until the fleet's own key is applied; hosts take no fleet without an incarnation for an acceptance.
            self.state.meta = known
        if meta_now.incarnation > before:
            # First read, or an operator accepted a restored backup: drop all values that were held back.
            draft = self.state.successor()
            await self._replace(draft, snapshot.revision, snapshot.kvs, accepted=True)
        else:
            self.restores.incarnation = meta_now.incarnation
            await self._fold_all(snapshot)
            if meta_now.incarnation < before:
                self.streams.renew_all()
        await self._recover()
        self.complete.set()
        _log.info("etcd read", revision=snapshot.revision, keys=count)

    def _beats_in(self, snapshot: Snapshot) -> int:
        for one in snapshot.kvs:
            if one.key == layout.BEAT:
                beat = attempt(parse_beat, one.value)
                return self.restores.journal.position.beats if beat is None else beat.count
        return 0

    async def _recover(self) -> None:
        """Search etcd's history for last good values of unreadable keys for which this hub has none."""
        unread = [one for one in self.state.unreadable.items() if self.state.value(one[0]) is None]
        for key, now in unread[:_MOST_RECOVERED]:
            older = await self._last_good(key, now.mod_revision)
            if older is not None:
                garbage = Change(key, now.value, now.mod_revision)
                self.streams.deliver(self.state.apply(self.state.revision, [older, garbage]))
                _log.info("last good value found", key=key, revision=older.mod_revision)

    async def _last_good(self, key: str, revision: int) -> Change | None:
        """Return the last readable value of a key before a revision, if etcd still has it."""
        for _ in range(_VERSIONS):
            try:
                kvs = (await self.etcd.read(key, revision=revision - 1)).kvs
            except Compacted:
                return None
            if not kvs:
                return None
            (found,) = kvs
            if attempt(partial(parse_value, key), found.value) is not None:
                return change_of(found)
            revision = found.mod_revision
        return None

    async def _found_fleet(self) -> None:
        fleet = UUID(int=self.random.getrandbits(128), version=4)
        meta = layout.render_meta(Meta(str(fleet)))
        await self.etcd.commit([absent(layout.META)], {layout.META: meta})

    def _refuse_fleet(self, known: str, found: str) -> None:
        """Refuse another fleet's records: the hosts would refuse them, and lose their hub."""
        self.state.lost[layout.META] = f"of another fleet, {found}"
        raise EtcdUnavailable(
            f"etcd has fleet {found}, but this hub belongs to fleet {known}",
            hint="hub.etcd.endpoints names etcd: restore a backup of this hub's fleet there. A hub begins with another "
            f"fleet once {self.restores.journal.path} is moved away",
        )

    async def _fold_all(self, snapshot: Snapshot) -> None:
        """Apply a complete snapshot: keys that are not in the snapshot were deleted."""
        changes = await self._differing(snapshot, max(snapshot.revision, self.state.revision))
        if len(changes) <= AT_ONCE:
            self._fold(snapshot.revision, changes)
        else:
            draft = self.state.copy()
            await self._replace(draft, snapshot.revision, changes, accepted=False)

    async def _differing(self, snapshot: Snapshot, newest: int) -> list[Change]:
        """Return the changes between the copy and a snapshot, except values newer than `newest`; empty the snapshot."""
        found, differing = set[str](), list[Change]()
        async for part in _slices(snapshot.kvs):
            found.update(one.key for one in part)
            differing += (one for one in part if self.state.differs(one, newest))
        gone = (Change(key, None, snapshot.revision) for key in self.state.keys_beyond(found))
        return differing + [one for one in gone if self.state.differs(one, newest)]

    async def _replace(
        self,
        draft: FleetState,
        revision: int,
        changes: list[KeyValue] | list[Change],
        *,
        accepted: bool,
    ) -> None:
        """Apply changes to a draft in slices, then replace the state with the draft at once."""
        touched: dict[HostId, set[ItemKey]] = {}
        keys: list[str] = []
        with garbage_left():
            async for part in _slices(changes):
                for host, items in draft.apply(revision, part).items():
                    touched.setdefault(host, set()).update(items)
                keys += (one.key for one in part if one.key.startswith(_REVIEWED))
            # Hosts may have reported overrides between two slices.
            draft.regain(self.state)
            draft.doubted |= self.state.doubted and not accepted
            self.state.become(draft)
            # Set the incarnation last: until here the revision belonged to the old incarnation.
            self.restores.incarnation = self._incarnation
        if accepted:
            # End streams before waits look again: earlier acknowledgements do not cover the new incarnation.
            self.streams.renew_all()
        keys += [*draft.unreadable, *draft.lost, *draft.ahead]
        self._take(touched, keys, accepted=accepted)

    async def repair(self) -> None:
        """Write claims of a restore, and put back values that etcd has lost, until cancelled."""
        await self.restores.run(partial(self._fold, 0))

    def _fold(self, revision: int, changes: Sequence[Change]) -> None:
        touched = self.state.apply(revision, changes)
        self._take(touched, [one.key for one in changes])

    def _take(
        self,
        touched: Mapping[HostId, set[ItemKey]],
        keys: Sequence[str],
        *,
        accepted: bool = False,
    ) -> None:
        """Process changed keys, and the result of `FleetState.apply`; for `accepted` see `Restores.review`."""
        self.streams.heard, self._following.failure = self.clock.monotonic(), None
        self.restores.review(keys, accepted=accepted)
        for key in keys:
            if key == layout.BEAT:
                self._beat_seen = self.streams.heard
            if (unread := self.state.unreadable.get(key)) is not None:
                _log.warning(
                    "value not taken",
                    key=codec.plain(key),
                    revision=unread.mod_revision,
                    reason=unread.why,
                )
        # Only the first lost key becomes evidence, since each evidence costs a read of etcd.
        lost = min((key for key in keys if key in self.state.lost), key=_weight, default=None)
        if lost is not None:
            self.restores.suspect(Evidence(f"{lost} is {self.state.lost[lost]}"))
        self.streams.deliver(touched)
        of_hosts = (key for key in keys if key.startswith(layout.HOSTS))
        self.streams.review(HostId(key.removeprefix(layout.HOSTS)) for key in of_hosts)

    # Keys that hubs write for themselves

    async def beat(self) -> None:
        """Write this hub's URL, and the beat if no other hub does, until cancelled; then remove the URL."""
        lease = 0
        await self.complete.wait()
        try:
            while True:
                try:
                    if not lease or not await self.etcd.keep_alive(lease):
                        lease, granted = 0, await self.etcd.grant(LEASE_S)
                        await self._say_where(granted)
                        # Set the lease last: a lease without its key would be kept alive for ever.
                        lease = granted
                    elif layout.HUBS + self.name in self.state.unreadable:
                        await self._say_where(lease)
                    if self.clock.monotonic() - self._beat_seen > BEAT_S:
                        await self._beat_once()
                    await keep_hub_records(self.etcd, self.state, self.name, self.url, self.clock)
                except EtcdUnavailable as error:
                    # `run` reports the outage, since the watch is silent too.
                    _log.debug("beat not written", reason=error.message)
                await asyncio.sleep(BEAT_S * self.random.uniform(0.5, 1.0))
        finally:
            if lease:
                await self._leave(lease)

    async def _say_where(self, lease: int) -> None:
        where = render_hub(HubPlace(self.url))
        await self.etcd.commit([], {layout.HUBS + self.name: where}, lease=lease)

    async def _leave(self, lease: int) -> None:
        """Remove this hub's URL, so that other hubs stop asking this hub."""
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self.etcd.revoke(lease)
        except (EtcdUnavailable, TimeoutError) as error:
            # The lease ends by itself after `LEASE_S`.
            _log.info("lease not ended", reason=str(error))

    async def _beat_once(self) -> int:
        """Write a beat unless another hub does; return the beat's revision."""
        found, stored = self.state.value(layout.BEAT), self.state.stored(layout.BEAT)
        count = 0 if found is None else parse_beat(found[0]).count
        # Replace an unreadable beat: without beats all watches are silent.
        revision = 0 if stored is None else stored[1]
        if found is None and stored is not None:
            # Start above the count in any hub's journal.
            count = self.restores.journal.position.beats + _MOST_BEHIND
        value = render_beat(Beat(count + 1, self.name))
        done = await self.etcd.commit([unchanged(layout.BEAT, revision)], {layout.BEAT: value})
        if isinstance(done, Conflict) and any(one.mod_revision < revision for one in done.kvs):
            # A newer beat is another hub's, and the watch shows it. A watch would not show an older one.
            self._doubtful = True
        if isinstance(done, Committed):
            return done.revision
        return max((one.mod_revision for one in done.kvs), default=0)

    def expect(self, revision: int) -> None:
        """Check whether the watch hangs if it does not show a revision within `_LATE_S`."""
        self._expected = max(self._expected, revision)
        asyncio.get_running_loop().call_later(_LATE_S, self._look_for_expected)

    def _look_for_expected(self) -> None:
        if self.state.revision < self._expected:
            self.etcd.doubted.set()

    async def prove_watch(self) -> None:
        """Leave a member whose watch does not show a beat that etcd has, until cancelled.

        A member that hangs accepts connections, so the hub would follow it until the silence of two beats.
        """
        while True:
            await self.etcd.doubted.wait()
            self.etcd.doubted.clear()
            self._expected = 0
            try:
                beat = await self._beat_once()
            except EtcdUnavailable as error:
                _log.debug("watch not proven", reason=error.message)
                continue
            await asyncio.sleep(_LATE_S)
            if self.state.revision < beat and self._limit is not None:
                _log.warning("watch shows nothing", expected=beat, revision=self.state.revision)
                self._limit.reschedule(asyncio.get_running_loop().time())

    async def compare(self) -> None:
        """Compare the copy with etcd regularly, until cancelled: a watch does not show changes by a restore.

        If the copy differs, `run` reads etcd again between two changes.
        """
        await self.complete.wait()
        while True:
            await asyncio.sleep(COMPARE_S * self.random.uniform(0.8, 1.2))
            known = self.state.revision
            try:
                snapshot = await self.etcd.read(layout.PREFIX, prefix_end(layout.PREFIX))
            except (EtcdUnavailable, Compacted) as error:
                _log.debug("not compared", reason=str(error))
                continue
            # Keys that changed since are newer in the copy than in the snapshot.
            if differing := await self._differing(snapshot, max(known, snapshot.revision)):
                _log.info("etcd differs", keys=len(differing))
                self._doubtful = True


def _meta_of(change: Change, known: Meta) -> Meta:
    return known if change.value is None else attempt(layout.parse_meta, change.value) or known


def _weight(key: str) -> tuple[bool, bool, str]:
    """Return the sort key of a lost key: the fleet first, then records, then the beat."""
    return key != layout.META, key == layout.BEAT, key


async def _slices(of: list[KeyValue] | list[Change]) -> AsyncIterator[list[Change]]:
    """Yield parts of a list from its end, with pauses for the event loop; the list is empty afterwards.

    The order is backwards, so that token keys come before the instances that they touch.
    """
    while of:
        yield [one if isinstance(one, Change) else change_of(one) for one in of[-AT_ONCE:]]
        del of[-AT_ONCE:]
        await asyncio.sleep(0)
