"""The source `fleet`: follows one hub at a time, and serves the items on disk while no hub is reached.

One task reads the stream, another brings changes into force, a third acknowledges them. Changes that arrive meanwhile
are merged. A fourth task fetches user data that could not be fetched at once. Only the task that holds the lock may
use `known`: a thread changes it, and hubs get a copy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

import structlog

from imdsproxy.errors import ImdsproxyError, Problem, SourceError, SourceUnavailable
from imdsproxy.fleet.guests import FleetPolicies, FleetReport
from imdsproxy.fleet.layout import UserData
from imdsproxy.fleet.stream import (
    CONNECT_S,
    SILENCE_S,
    Ack,
    Answer,
    Ask,
    Batch,
    Bye,
    ByeCode,
    FromHub,
    ItemKey,
    Ping,
)
from imdsproxy.host.clock import Clock, Moment
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.observation import Observation, StrandedPort
from imdsproxy.reconcile.part import Gauge, Part
from imdsproxy.reconcile.progress import Backoff
from imdsproxy.reconcile.reconciler import Reconciler
from imdsproxy.sources.api import Publish, Reports, publish_in_pieces
from imdsproxy.sources.fleet.client import HubClient, HubStream, UserDataFetcher
from imdsproxy.sources.fleet.kept import KeptItems
from imdsproxy.sources.fleet.known import FleetKnown, LeavingNetworks, merge

_T = TypeVar("_T")

Confirm: TypeAlias = Callable[
    [Collection[ItemKey], Collection[ItemKey]], Awaitable[Mapping[ItemKey, str]]
]
"""Waits until published items, present and removed ones, are in force. Returns the items that are not, with reasons."""

Renew: TypeAlias = Callable[[], Awaitable[float | None]]
"""Renews this host's certificate if renewal is due, and returns the end of the current one, in Unix time."""

TakePasswords: TypeAlias = Callable[[Mapping[InstanceId, bytes | None]], Awaitable[None]]
"""Stores passwords of guests for the document server; see `fleet.guests`."""

AnswerTo: TypeAlias = Callable[[Ask], Awaitable[tuple[int, Any]]]
"""Answers a hub's GET of this host's admin API with status and body."""

_LOOK_EVERY_S: Final = 1.0
_NOTE_EVERY_S: Final = 60.0
_AGAIN_S: Final = 2.0
"""Seconds after which failed work, such as items that are not in force, is tried again."""

_RENEW_EVERY_S: Final = 3600.0
_GRACE_S: Final = 5.0
"""Seconds for which the source stays in sync after a stream ended: while a hub restarts, another takes over. Not after
silence, because the time at which the hub was lost is unknown then.
"""

_STALE_S: Final = 15.0
"""Maximum age in seconds of a hub's last answer from etcd; a hub with an older one does not know the latest changes."""

_STAY_S: Final = 60.0
"""Seconds for which most clients keep an idle connection."""

_COMPARE_EVERY_S: Final = 600.0
_SKEW_S: Final = 1.0
_SPREAD_S: Final = 1.0
"""Seconds over which hosts spread their connections to other hubs after their hub ended."""

_FINAL: Final = frozenset({ByeCode.REVOKED, ByeCode.REPLACED, ByeCode.FORMAT, ByeCode.OTHER_FLEET})
"""Codes for which other hubs would give the same answer."""

_HINTS: Final = {
    ByeCode.AHEAD: "etcd was restored to an earlier state: check `imdsproxy fleet status`, then `imdsproxy fleet "
    "accept-restore`"
}

_log: Final = structlog.get_logger()


class _Left(Exception):
    """The hub ended the stream, or this host has to leave the hub."""

    def __init__(self, code: ByeCode, reason: str) -> None:
        super().__init__(reason or code.value)
        self.code = code


async def _confirm_nothing(
    _items: Collection[ItemKey], _gone: Collection[ItemKey]
) -> Mapping[ItemKey, str]:
    return {}


async def _take_nothing(_: Mapping[InstanceId, bytes | None]) -> None:
    pass


async def _renew_nothing() -> float | None:
    return None


async def _answer_nothing(_: Ask) -> tuple[int, Any]:
    return 503, None


@dataclass(slots=True)
class FleetSource(Part):
    """Source of the items that a fleet places on this host.

    Args:
        hubs: Returns the current URLs of hubs; raises `SourceUnavailable` if there are none.
        silent_s: Seconds of silence after which this host leaves a hub.
        serve_s: Seconds for which instances are served after a hub last vouched for them; `None` for no limit.
        random: Returns numbers from 0 to 1, for the order of hubs and the length of pauses.
        fetch_s: Seconds for which changes wait for their user data: an address that moves always has an instance.

    Attributes:
        take_passwords: Called with the passwords of all instances here, before changed passwords are stored on disk.
        take_policies: Called with policies and token keys before the records of the same batch are published.
        hub: URL of the followed hub; `None` without a hub.
        alone: Whether every hub failed since one was last followed, so that this host has only its items on disk.
        failing: Items that are not in force, or not in their newest version, with reasons; as acknowledged.
        acknowledged: Revision up to which all other items are in force.
        skew_s: Seconds by which the hub's clock is ahead of this host's.
        certificate_end: End of this host's certificate, in Unix time; `None` if unknown.
    """

    name: ClassVar = "fleet"
    client: HubClient
    hubs: Callable[[], tuple[str, ...]]
    path: Path
    silent_s: float = SILENCE_S
    serve_s: float | None = None
    clock: Clock = field(default_factory=Clock)
    random: Callable[[], float] = lambda: 0.5
    backoff: Backoff = field(default_factory=lambda: Backoff(0.5, 30.0))
    fetch_s: float = 1.0
    fetching: Reconciler = field(init=False)
    leaving: LeavingNetworks = field(default_factory=lambda: LeavingNetworks(_STAY_S))
    take_passwords: TakePasswords = _take_nothing
    take_policies: Callable[[FleetPolicies], object] = lambda _: None
    confirm: Confirm = _confirm_nothing
    answer: AnswerTo = _answer_nothing
    renew: Renew = _renew_nothing
    hub: str | None = None
    alone: bool = False
    failing: Mapping[ItemKey, str] = field(default_factory=dict)
    acknowledged: int = 0
    skew_s: float = 0.0
    certificate_end: float | None = None
    kept: KeptItems = field(init=False)
    known: FleetKnown = field(init=False)
    _fetcher: UserDataFetcher = field(init=False)
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="imdsproxy-fleet")
    )
    _reports: Reports = field(default_factory=partial(Reports, name))
    _publishing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _stream: HubStream | None = None
    _greeted: HubStream | None = None
    _partial: Batch | None = None
    _pending: Batch | None = None
    _whole: bool = False
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _missing: frozenset[UserData] = frozenset()
    _awaits: bool = False
    _sweepable: bool = False
    _published: int = 0
    _unconfirmed: set[ItemKey] = field(default_factory=set)
    _to_confirm: asyncio.Event = field(default_factory=asyncio.Event)
    _last_ack: Ack = field(default_factory=lambda: Ack(0))
    _answering: set[asyncio.Task[None]] = field(default_factory=set)
    _applying: bool = False
    _compare_at: float = 0.0
    _complete: bool = False
    _connect_s: float = CONNECT_S
    _heard_at: float = 0.0
    _lost_at: float | None = None
    _expired: bool = False
    _vouched: Moment | None = None
    _hub_at: Moment | None = None
    _hub_age_s: float = 0.0
    _disk_problem: Problem | None = None
    _hub_problem: Problem | None = None
    _certificate_problem: Problem | None = None

    def __post_init__(self) -> None:
        self.kept = KeptItems(self.path)
        self.known = FleetKnown(self.kept.stored)
        self._fetcher = UserDataFetcher(self._keep_user_data)
        self.fetching = Reconciler(
            "user data",
            "",
            self.backoff.first_s,
            self.backoff.longest_s,
            retried=SourceUnavailable,
            jitter=lambda: 0.5 + self.random(),
        )

    def explain_stranded(self, port: StrandedPort) -> Problem:
        return port.problem()

    @property
    def age_s(self) -> float:
        """Seconds since a followed hub got an answer from etcd; 0 if unknown."""
        return self._age() or 0.0

    def _age(self) -> float | None:
        return None if self._vouched is None else self.clock.moment().since(self._vouched)

    @property
    def serves_for_s(self) -> float | None:
        """Seconds for which instances are still served without a hub; `None` for no limit."""
        if self.serve_s is None or self.known.position.fleet is None:
            return None
        # A clock that was set back before a reboot proves nothing.
        age = self._age()
        return 0.0 if age is None else max(0.0, self.serve_s - age)

    @property
    def expired(self) -> bool:
        """Whether no hub has vouched for the instances here within `serve_s`."""
        return self.serves_for_s == 0

    @property
    def in_sync(self) -> bool:
        """Whether this host has all items that the fleet places here."""
        if self._complete:
            return not self._awaits and self._hub_age_s < _STALE_S
        return self._lost_at is not None and self.clock.monotonic() - self._lost_at < _GRACE_S

    @property
    def stale_s(self) -> float:
        """Age of the items if they may be out of date, else 0."""
        return 0.0 if self.in_sync else self.age_s

    async def report(self) -> Mapping[str, object]:
        report = FleetReport(
            self.hub or "",
            self.age_s,
            self.acknowledged,
            len(self.known.items),
            tuple(sorted(self.known.held)),
            self.failing,
            self.skew_s,
            self.certificate_end,
            self.serves_for_s,
        )
        return {"fleet": report}

    def fleet_connected(self) -> Gauge:
        """1 while this host follows a hub of the fleet. Without a hub, guests are served from disk."""
        return bool(self.hub)

    def fleet_age_seconds(self) -> Gauge:
        """Seconds since a followed hub last knew the state of the fleet."""
        return self.age_s

    def fleet_expired(self) -> Gauge:
        """1 while guests of the fleet's instances get 503, because sources.fleet.serve_without_hubs_s is over."""
        return self.expired

    def fleet_revision(self) -> Gauge:
        """Revision of the fleet's store up to which all items for this host are in force, except failing items."""
        return self.acknowledged

    def fleet_failing(self) -> Gauge:
        """Items of the fleet whose newest version is not in force; `imdsproxy status` has the reasons."""
        return len(self.failing)

    def fleet_held(self) -> Gauge:
        """Items that this host still serves although the fleet's store lacks them, as after a restore from a backup."""
        return len(self.known.held)

    def fleet_clock_difference_seconds(self) -> Gauge:
        """Seconds by which the hub's clock is ahead of this host's."""
        return self.skew_s

    def fleet_certificate_end_seconds(self) -> Gauge:
        """Unix time when this host's certificate in the fleet ends; the host renews the certificate ten days before.

        No series if another program renews the certificate.
        """
        return self.certificate_end

    async def run(self, publish: Publish) -> None:
        try:
            await self._load(publish)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_hubs(publish))
                group.create_task(self._apply_all(publish))
                group.create_task(self._fetch_all())
                group.create_task(self._acknowledge_all())
                group.create_task(self._look(publish))
                group.create_task(self._keep_renewed())
        finally:
            await self._in_thread(self.kept.close)
            self._thread.shutdown(wait=False)

    async def _load(self, publish: Publish) -> None:
        kept = await self._on_disk(publish, self.kept.open)
        self._vouched = self.kept.vouched
        if kept.position.fleet is None:
            return
        await self._in_thread(lambda: self.known.load(kept.position, kept.items, kept.damaged))
        self.take_policies(self.known.policies())
        await self.take_passwords(self.known.passwords())
        await self._report(publish, self.known.everything())

    async def _look(self, publish: Publish) -> None:
        """Report changes that need no event, and store the age of the items."""
        noted = self.clock.monotonic()
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = self.clock.monotonic()
            if self.kept.damaged_user_data() - self._missing:
                async with self._publishing:
                    self._note_lacking()
            await self._report(publish, self.leaving.due(now))
            if self._complete and self._vouched is not None and now - noted > _NOTE_EVERY_S:
                noted = now
                await self._on_disk(publish, partial(self.kept.note, self._vouched))

    async def _keep_renewed(self) -> None:
        """Renew this host's certificate in time; `_look` reports failures."""
        while True:
            try:
                self.certificate_end = await self.renew()
                self._certificate_problem = None
            except ImdsproxyError as error:
                self._certificate_problem = _problem_of("certificate", error)
                _log.warning("certificate not renewed", reason=error.message, hint=error.hint)
            await asyncio.sleep(_RENEW_EVERY_S * (0.5 + self.random()))

    async def _report(self, publish: Publish, changes: Observation) -> None:
        in_sync, expired = self.in_sync, self.expired
        found = (
            self._expiry() if expired else None,
            self._disk_problem,
            self._certificate_problem,
            None if in_sync else self._hub_problem,
            self._skew(),
            *(_damaged_problem(self.path, data) for data in self.kept.damaged_user_data()),
        )
        async with self._publishing:
            problems = (*(one for one in found if one is not None), *self.known.problems())
            # Expired instances are served again only after those removed meanwhile are gone.
            states = (True, False) if self._expired and not expired else (expired,)
            for state in states:
                observation = self._reports.next(
                    changes,
                    self.known.everything,
                    in_sync=in_sync,
                    problems=problems,
                    expired=state,
                )
                if observation is not None:
                    await publish_in_pieces(publish, observation)
                changes = Observation()
            self._expired = expired

    def _expiry(self) -> Problem:
        return Problem(
            "fleet",
            f"no hub has vouched for the fleet's instances for {self.serve_s:g} s: they may be removed, and get 503",
            "sources.fleet.serve_without_hubs_s is the limit; `imdsproxy fleet status` on a hub",
        )

    def _skew(self) -> Problem | None:
        if self.hub is None or abs(self.skew_s) <= _SKEW_S:
            return None
        return Problem(
            "clock",
            f"this host's clock and that of {self.hub} differ by {abs(self.skew_s):.0f} s",
            "the clock decides when tokens expire and a boot ends: check the time service of both",
        )

    # One hub after another

    async def _follow_hubs(self, publish: Publish) -> None:
        left: list[str] = []
        last: str | None = None
        while True:
            try:
                # Pop from the end: the hub that has just ended is tried last.
                left = left or sorted(self.hubs(), key=lambda one: (one != last, self.random()))
            except SourceError as error:
                self._hub_problem = _problem_of("hubs", error)
                await self._report(publish, Observation())
                await asyncio.sleep(self.backoff.fail())
                continue
            last = hub = left.pop()
            good, final = await self._follow(hub)
            await self._report(publish, Observation())
            if final:
                left = []
                await asyncio.sleep(self.backoff.longest_s * (0.5 + self.random()))
            elif good:
                left = []
                self._connect_s = CONNECT_S
                self.backoff.succeed()
                await asyncio.sleep(_SPREAD_S * self.random())
            elif not left:
                self.alone = self.known.position.fleet is not None
                # A hub to which thousands of hosts connect at once needs longer than the limit for a hub that hangs.
                self._connect_s = min(2 * self._connect_s, self.client.timeout_s)
                await asyncio.sleep(self.backoff.fail() * (0.5 + self.random()))

    async def _follow(self, hub: str) -> tuple[bool, bool]:
        """Follow a hub until it is lost. Return whether it sent all items, and whether other hubs would do the same."""
        final = False
        try:
            async with self.client.stream(hub, self._connect_s) as stream:
                async with self._publishing:
                    # Changes of an earlier stream are known by now, or this hub sends them again.
                    hello, self._greeted = self.known.hello(), stream
                    self._partial = self._pending = None
                    self._whole, self._hub_at = True, None
                await stream.send(hello)
                self._stream, self.hub = stream, hub
                # The hub has just compared the items. Spread the next comparison: thousands of hosts connect at once.
                self._compare_at = self.clock.monotonic() + _COMPARE_EVERY_S * self.random()
                while True:
                    message = await stream.read(self.silent_s)
                    self._heard_at = self.clock.monotonic()
                    await self._take(stream, message)
        except _Left as left:
            final = left.code in _FINAL
            hint = _HINTS.get(left.code, "")
            self._hub_problem = Problem("hub", f"the hub ended the stream: {left}", hint, hub)
        except SourceError as error:
            self._hub_problem = _problem_of(hub, error)
        finally:
            good, self._stream, self.hub = self._complete, None, None
            if good:
                now = self.clock.monotonic()
                heard = now - self._heard_at < self.silent_s
                self._lost_at = now if heard and self.in_sync else None
            self._complete = False
        _log.info("hub lost", hub=hub, reason=self._hub_problem.reason)
        return good, final

    async def _take(self, stream: HubStream, message: FromHub) -> None:
        match message:
            case Batch() as batch:
                self._check(batch)
                self._partial = merge(self._partial, batch)
                if not batch.more:
                    self._pending = merge(self._pending, self._partial)
                    self._partial = None
                    self._arrived.set()
            case Ping() as ping:
                self.skew_s = ping.time - self.clock.now().timestamp()
                self._hub_age_s = ping.age_s
                self._hub_at = self.clock.moment().before(ping.age_s)
                if self._complete and not (self._applying or self._partial or self._pending):
                    self._vouched = self._newest()
                await stream.send(replace(self._last_ack, digest=self._digest_in_time()))
            case Ask() as ask:
                task = asyncio.create_task(self._answer(stream, ask))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            case Bye(code, reason):
                raise _Left(code, reason)

    def _newest(self) -> Moment | None:
        """Return the later moment: a hub that lost etcd vouches for an earlier one than the previous hub."""
        before, now = self._vouched, self._hub_at
        if before is None or now is None or before.boot != now.boot:
            return now or before
        return max(before, now, key=lambda one: one.up_s)

    def _digest_in_time(self) -> str:
        """Return a digest, now and then, for the hub to compare; empty while items are pending or held."""
        now, known, ack = self.clock.monotonic(), self.known, self._last_ack
        moving = self._applying or self._partial or self._pending
        settled = self._complete and not moving and ack.revision == known.position.revision
        if now < self._compare_at or not settled or known.held:
            return ""
        self._compare_at = now + _COMPARE_EVERY_S * (0.8 + 0.4 * self.random())
        return known.digest(ack.failed)

    def _check(self, batch: Batch) -> None:
        at = self.known.position
        if at.fleet not in {None, batch.fleet}:
            raise _Left(ByeCode.OTHER_FLEET, f"the hub is of fleet {batch.fleet}, not {at.fleet}")
        if (batch.incarnation, batch.revision) < (at.incarnation, at.revision):
            raise _Left(
                ByeCode.BEHIND, f"the hub has revision {batch.revision}, this host {at.revision}"
            )
        before = self._pending or self._partial
        if before is not None and before.incarnation != batch.incarnation:
            raise _Left(ByeCode.STOPPING, "the fleet has another incarnation")

    async def _answer(self, stream: HubStream, ask: Ask) -> None:
        status, body = await self.answer(ask)
        # If the stream has ended, no hub waits for the answer.
        with contextlib.suppress(SourceUnavailable):
            await stream.send(Answer(ask.number, status, body))

    # Applying changes

    async def _apply_all(self, publish: Publish) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            batch, stream = self._pending, self._stream
            self._applying = True
            if batch is not None and stream is not None:
                whole, self._pending, self._whole = self._whole, None, False
                # Items whose user data is late are refused until it arrives; the rest is not delayed.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.fetch_s):
                        await self._fetcher.fetch(stream, self.known.missing_user_data(batch))
                await self._apply(publish, batch, stream, whole=whole)
            async with self._publishing:
                supplied = self.known.supplied()
            if supplied.put:
                await self._apply(publish, supplied, self._greeted)
            self._applying, self._awaits = False, self._has_to_wait()
            # Records that are coming into force need the old user data until they are confirmed.
            if self._sweepable and not self._to_confirm.is_set():
                await self._sweep()

    async def _fetch_all(self) -> None:
        """Retry fetching user data that could not be fetched at once, until cancelled."""
        await self.fetching.run(self._fetch_missing)

    async def _fetch_missing(self) -> None:
        if self._stream is not None:
            await self._fetcher.fetch(self._stream, self._missing)
        async with self._publishing:
            self._note_lacking()
        self._arrived.set()
        if self._missing:
            raise SourceUnavailable("user data is missing")

    def _note_lacking(self) -> None:
        """Update which user data is missing and why. The caller holds the lock."""
        lacking, damaged = self.known.missing_user_data(), self.kept.damaged_user_data()
        missing = lacking | damaged
        self._fetcher.forget(missing)
        self.known.explain_lacking(self._fetcher.reasons())
        # Only records in force make an end to it: until then their guests must not count as unknown.
        self._awaits = self._awaits or self._has_to_wait()
        if missing - self._missing:
            self.fetching.wake()
        self._missing = missing

    def _has_to_wait(self) -> bool:
        """Return whether an item waits for user data, or for the round that brings it into force."""
        lacking = self.known.missing_user_data()
        refused = all(map(self._fetcher.is_refused, lacking))
        return not refused or bool(self.known.supplied().put)

    async def send_password(self, instance: InstanceId, password: bytes) -> None:
        """Send the hub a password that a guest posted; raises as `HubStream.give_password`."""
        if self._stream is None:
            raise SourceUnavailable("no hub is followed")
        await self._stream.give_password(instance, password)

    async def _keep_user_data(self, data: bytes) -> None:
        await self._in_thread(partial(self.kept.keep_user_data, data))

    async def _apply(
        self, publish: Publish, batch: Batch, stream: HubStream | None, *, whole: bool = False
    ) -> None:
        """Bring a stream's set of changes into force; `whole` if the set is the hub's full answer to `hello`."""
        known = self.known
        async with self._publishing:
            if stream is not self._greeted:
                # Another hub got the state without this batch, and sends the batch again.
                return
            applied = await self._in_thread(lambda: known.apply(batch, whole=whole))
            self._note_lacking()
            passwords = known.passwords()
        # Remove cleared passwords before the disk is updated: a password found after a crash was then posted later.
        await self.take_passwords(passwords)
        complete = self._complete or (whole and stream is self._stream)
        vouched = self._newest() if complete else self._vouched
        keep = partial(
            self.kept.keep, known.position, applied.stored, vouched, renumbered=applied.renumbered
        )
        await self._on_disk(publish, keep, batch)
        if applied.policies:
            self.take_policies(known.policies())
        if whole and stream is self._stream:
            self._complete, self._lost_at, self._hub_problem = True, None, None
            self.alone = False
            self._vouched = vouched
        delayed = self.leaving.delay(applied.records, self.clock.monotonic())
        self._awaits = self._has_to_wait()
        await self._report(publish, delayed)
        self._published = known.position.revision
        self._unconfirmed.update(applied.stored)
        self._to_confirm.set()

    async def _on_disk(
        self, publish: Publish, work: Callable[[], _T], batch: Batch | None = None
    ) -> _T:
        """Use the file, retrying until it succeeds. A batch that waits is reported to the hub as failing."""
        while True:
            try:
                done = await self._in_thread(work)
            except SourceError as error:
                if self._disk_problem is None:
                    _log.error("items not stored", code=error.code, error=error.message)
                self._disk_problem = _problem_of(str(self.path), error)
                await self._report(publish, Observation())
                if batch is not None:
                    items = (*batch.put, *batch.remove)
                    await self._send(Ack(batch.revision, dict.fromkeys(items, error.message)))
                await asyncio.sleep(_AGAIN_S)
                continue
            self._disk_problem = None
            return done

    # Acknowledgements

    async def _acknowledge_all(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S if self.failing else None):
                    await self._to_confirm.wait()
            news = self._to_confirm.is_set()
            self._to_confirm.clear()
            async with self._publishing:
                revision, changed = self._published, {*self._unconfirmed, *self.failing}
                self._unconfirmed = set()
                here = changed & self.known.items.keys()
            pending = await self.confirm(here, changed - here)
            async with self._publishing:
                self.failing = {**pending, **self.known.failed()}
            self.acknowledged = revision
            ack = Ack(revision, self.failing)
            if news or ack != self._last_ack:
                await self._send(ack)
            if news:
                self._sweepable = True
                self._arrived.set()

    async def _sweep(self) -> None:
        self._sweepable = False
        async with self._publishing:
            needed = self.known.needed_user_data()
        try:
            await self._in_thread(partial(self.kept.sweep, needed))
        except SourceError as error:
            _log.warning("user data not swept", error=error.message)

    async def _send(self, ack: Ack) -> None:
        self._last_ack = ack
        if self._stream is not None:
            # If the stream has ended, the next hub gets the acknowledgement.
            with contextlib.suppress(SourceUnavailable):
                await self._stream.send(ack)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _damaged_problem(path: Path, data: UserData) -> Problem:
    return Problem(
        "user_data",
        f"user data {data.sha256} on disk is damaged: the host fetches the data again",
        "check the disk and the kernel's log",
        str(path),
    )


def _problem_of(where: str, error: ImdsproxyError) -> Problem:
    return Problem("fleet", error.message, error.hint, where)
