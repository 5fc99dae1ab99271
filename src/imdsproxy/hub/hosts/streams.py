"""Streams to hosts: the hub sends each host its items, and the host acknowledges the items in force.

A host that reads slowly costs a set of item keys, not a queue: it gets the current items when it reads again.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import structlog

from imdsproxy.errors import SourceUnavailable
from imdsproxy.fleet.layout import HostId, HostState
from imdsproxy.fleet.members import Role, read_identity
from imdsproxy.fleet.restores import Evidence
from imdsproxy.fleet.stream import (
    MAX_LINE,
    PING_S,
    SILENCE_S,
    STREAM_PATH,
    UPGRADE,
    Ack,
    Answer,
    Ask,
    Batch,
    Broken,
    Bye,
    ByeCode,
    FromHub,
    Hello,
    ItemKey,
    Ping,
    parse_from_host,
    render_line,
)
from imdsproxy.host.clock import Clock
from imdsproxy.hub.store.state import FleetState
from imdsproxy.hub.store.write_checks import fit_item
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records.levels import SCHEMA, Schema

_BACKLOG: Final = 4096
"""Backlog of the listener: when another hub fails, thousands of hosts connect at once."""

_HEAD_BYTES: Final = 16 * 1024
_TURNS: Final = 100
"""Number of groups of streams; the hub pings one group after another."""

WAITING: Final = 4
"""Maximum streams of one host without a hello: each may buffer a long unfinished line."""

AT_A_TIME_S: Final = 0.005
"""Maximum time for the lines of one host until other hosts have their turn, in seconds."""

SHARE: Final = 10
"""Pause until a host's next turn, as a multiple of the time that its lines took."""

_UNANSWERED_S: Final = SILENCE_S - 1.5 * PING_S
"""Age of an unanswered ping at which the hub ends the stream, so that a host is silent for `SILENCE_S` at most.

Time counts from a ping, so that a hub that hung does not blame its hosts.
"""

_UNREAD_S: Final = SILENCE_S - PING_S / 2
"""Time without reading after which the hub ends a stream; a host that does not read gets no pings."""

AT_ONCE: Final = 200
"""Number of hosts to send to before the event loop does other work: 10 ms."""

_BATCH_BYTES: Final = 256 * 1024
_HELLO_S: Final = 30.0
_SHOWN_S: Final = 3600.0
_ALL: Final = HostId("*")

_log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Wait:
    """Wait for a revision to be in force; `hosts` has the hosts that still lack it."""

    revision: int
    hosts: set[HostId]
    items: Collection[ItemKey] | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Streams:
    """All streams of this hub.

    Args:
        admits: Returns whether a host's certificate with this serial number is valid now.
        suspect: Called with evidence that etcd was restored from a backup: a host has items that etcd lacks.
        raise_overrides: Called with a host and the overrides that the host has in force.
        unready: Returns the reason why this hub may not serve hosts.

    Attributes:
        heard: Time of the last change from etcd, by the monotonic clock.
        hosts: Streams of connected hosts, which have sent their hello.
        differed: Number of times that a host's digest differed.
    """

    state: FleetState
    clock: Clock
    admits: Callable[[HostId, str], bool]
    suspect: Callable[[Evidence], object] = lambda _: None
    raise_overrides: Callable[[HostId, Mapping[InstanceId, OperatorOverride]], object] = (
        lambda _host, _overrides: None
    )
    unready: Callable[[], str | None] = lambda: None
    schema: Schema = SCHEMA
    heard: float = 0.0
    hosts: dict[HostId, HostStream] = field(default_factory=dict)
    differed: int = 0
    _differing: dict[HostId, tuple[float, str]] = field(default_factory=dict)
    _refused: dict[HostId, tuple[float, str]] = field(default_factory=dict)
    _waits: dict[HostId, list[_Wait]] = field(default_factory=dict)
    _delivered: int = 0
    _unsent: deque[HostStream] = field(default_factory=deque)
    _opened: dict[HostId, dict[HostStream, None]] = field(default_factory=dict)
    _turns: Sequence[dict[HostStream, None]] = field(
        default_factory=lambda: [{} for _ in range(_TURNS)]
    )
    _next_turn: Iterator[int] = field(default_factory=lambda: itertools.cycle(range(_TURNS)))

    async def run(self, listener: socket.socket) -> None:
        """Serve connections of hosts from HAProxy until cancelled."""
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(
            lambda: HostStream(self), sock=listener, backlog=_BACKLOG
        )
        try:
            for turn in itertools.cycle(range(_TURNS)):
                await asyncio.sleep(PING_S / _TURNS)
                self._ping(turn)
        finally:
            server.close()
            for stream in self._all():
                stream.leave(ByeCode.STOPPING)

    def _all(self) -> list[HostStream]:
        return [stream for opened in self._opened.values() for stream in opened]

    def open(self, stream: HostStream) -> None:
        """Register a stream of an admitted host before its hello, and assign its group for pings."""
        self._refused.pop(stream.host, None)
        opened = self._opened.setdefault(stream.host, {})
        waiting = [one for one in opened if not one.greeted]
        if len(waiting) >= WAITING:
            waiting[0].leave(ByeCode.REPLACED)
            opened = self._opened.setdefault(stream.host, {})
        opened[stream] = None
        stream.turn = next(self._next_turn)
        self._turns[stream.turn][stream] = None

    def add(self, stream: HostStream) -> None:
        self.hosts[stream.host] = stream

    def remove(self, stream: HostStream) -> bool:
        """Remove a stream; return whether it was its host's connection."""
        self._turns[stream.turn].pop(stream, None)
        opened = self._opened.get(stream.host, {})
        opened.pop(stream, None)
        if not opened:
            self._opened.pop(stream.host, None)
        if self.hosts.get(stream.host) is not stream:
            return False
        del self.hosts[stream.host]
        self.progressed(stream.host)
        return True

    def age_s(self) -> float:
        """Return the seconds since the last change received from etcd."""
        return self.clock.monotonic() - self.heard

    def ping(self) -> Ping:
        return Ping(self.state.revision, self.clock.now().timestamp(), round(self.age_s(), 1))

    def _ping(self, turn: int) -> None:
        now, line = self.clock.monotonic(), render_line(self.ping())
        unready = self.unready()
        for stream in tuple(self._turns[turn]):
            if unready is None:
                stream.keep_alive(now, line)
            else:
                stream.leave(ByeCode.STOPPING, unready)

    def deliver(self, touched: Mapping[HostId, Collection[ItemKey]]) -> None:
        """Send the changed items of `FleetState.apply` to connected hosts."""
        everywhere = touched.get(_ALL, ())
        for host in self.hosts if everywhere else touched.keys() & self.hosts.keys():
            self.hosts[host].touch((*touched.get(host, ()), *everywhere))
        for stream in tuple(self.hosts.values()) if touched else ():
            stream.compare_mended()
        before, self._delivered = self._delivered, self.state.revision
        for host, waits in self._waits.items():
            if host not in touched and any(one.revision > before for one in waits):
                self.progressed(host)

    def send_soon(self, stream: HostStream) -> None:
        self._unsent.append(stream)
        if len(self._unsent) == 1:
            asyncio.get_running_loop().call_soon(self._send_some)

    def _send_some(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(min(AT_ONCE, len(self._unsent))):
            loop.call_soon(self._unsent.popleft().flush)
        if self._unsent:
            loop.call_soon(self._send_some)

    def renew_all(self) -> None:
        """End every stream; hosts reconnect and get the items of the fleet's new incarnation."""
        for stream in tuple(self.hosts.values()):
            stream.leave(ByeCode.STOPPING, "the fleet has another incarnation")

    def review(self, hosts: Iterable[HostId]) -> None:
        for host in hosts:
            for stream in tuple(self._opened.get(host, ())):
                if not self.admits(host, stream.serial):
                    stream.leave(ByeCode.REVOKED)

    # Revisions in force

    def note_differing(self, host: HostId, why: str | None) -> None:
        """Record that a host's digest differs, with the reason; `None` records that it matches."""
        self._differing.pop(host, None)
        if why is not None:
            self.differed += 1
            self._differing[host] = self.clock.monotonic(), why
            _log.error("host differs", host=host, reason=why)

    def differing(self) -> dict[HostId, str]:
        """Return hosts whose digest differed within the last hour and has not matched since, with time and reason."""
        since = self.clock.monotonic() - _SHOWN_S
        return {host: why for host, (at, why) in self._differing.items() if at > since}

    def note_refused(self, host: HostId, serial: str) -> None:
        """Record that a member presented an invalid certificate: it was replaced, or renewed since a backup."""
        member = self.state.host(host)
        if member is not None and member.state is HostState.ENROLLED:
            self._refused[host] = self.clock.monotonic(), serial

    def refused(self) -> dict[HostId, str]:
        """Return members that were refused within the last hour and not admitted here since, with the reason."""
        since = self.clock.monotonic() - _SHOWN_S
        return {
            host: f"certificate {serial} is not valid: the host has a newer one, or etcd has lost the renewal; "
            f"`imdsproxy fleet enrol {host}` lets the host join again"
            for host, (at, serial) in self._refused.items()
            if at > since
        }

    def lacks(
        self, host: HostId, revision: int, items: Collection[ItemKey] | None = None
    ) -> str | None:
        """Return the reason why a revision is not in force on a host, as far as this hub knows; `None` if it is.

        Only failures of `items` count; `None` stands for all.
        """
        stream = self.hosts.get(host)
        if stream is None:
            return "not connected"
        if self.state.revision < revision:
            return "not received"
        return stream.lacks(revision, items) or self.state.held_back(host, items)

    async def wait(
        self,
        hosts: Collection[HostId],
        revision: int,
        timeout_s: float,
        items: Collection[ItemKey] | None = None,
    ) -> dict[HostId, str]:
        """Wait until a revision is in force on these hosts; return the others, with reasons (`lacks`)."""
        wait = _Wait(revision, set(self._pending(hosts, revision, items)), items)
        for host in wait.hosts:
            self._waits.setdefault(host, []).append(wait)
        waited = tuple(wait.hosts)
        try:
            async with asyncio.timeout(timeout_s):
                if wait.hosts:
                    await wait.over.wait()
        except TimeoutError:
            pass
        finally:
            for host in waited:
                self._waits[host].remove(wait)
                if not self._waits[host]:
                    del self._waits[host]
        return self._pending(wait.hosts, revision, items)

    def _pending(
        self, hosts: Collection[HostId], revision: int, items: Collection[ItemKey] | None
    ) -> dict[HostId, str]:
        found = {host: self.lacks(host, revision, items) for host in hosts}
        return {host: why for host, why in found.items() if why is not None}

    def progressed(self, host: HostId) -> None:
        """Check again whether a host has the revisions that clients wait for."""
        for wait in self._waits.get(host, ()):
            if host in wait.hosts and self.lacks(host, wait.revision, wait.items) is None:
                wait.hosts.discard(host)
                if not wait.hosts:
                    wait.over.set()

    async def ask(self, host: HostId, path: str, timeout_s: float, method: str = "GET") -> Answer:
        stream = self.hosts.get(host)
        if stream is None:
            raise SourceUnavailable(f"host {host} is not connected", hint="imdsproxy fleet hosts")
        try:
            async with asyncio.timeout(timeout_s):
                return await stream.ask(path, method)
        except TimeoutError as error:
            raise SourceUnavailable(f"host {host} did not answer in {timeout_s:g} s") from error


class HostStream(asyncio.Protocol):
    __slots__ = (
        "_asked",
        "_buffer",
        "_dirty",
        "_next",
        "_paused_at",
        "_scheduled",
        "_searched",
        "_sent",
        "_streams",
        "_transport",
        "_unanswered_at",
        "_unread",
        "acked",
        "failed",
        "greeted",
        "host",
        "level",
        "serial",
        "turn",
    )

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._buffer = bytearray()
        self._searched = 0
        self._next: asyncio.TimerHandle | None = None
        self._dirty: set[ItemKey] = set()
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._sent, self.turn = 0, 0
        self._paused_at: float | None = None
        self._unanswered_at: float | None = None
        self._scheduled = False
        self._unread: frozenset[ItemKey] = frozenset()
        self._transport: asyncio.Transport | None = None
        self.host, self.serial = HostId(""), ""
        self.greeted, self.acked = False, 0
        self.level = 1
        self.failed: Mapping[ItemKey, str] = {}

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._next = asyncio.get_running_loop().call_later(_HELLO_S, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget("closed" if exc is None else str(exc))
        for future in self._asked.values():
            future.cancel()
        self._transport = None
        self._buffer.clear()
        self._plan(None)

    def _plan(self, following: asyncio.TimerHandle | None) -> None:
        if self._next is not None:
            self._next.cancel()
        self._next = following

    def _forget(self, reason: str) -> None:
        if self._streams.remove(self):
            _log.info("host left", host=self.host, reason=reason)

    def pause_writing(self) -> None:
        self._paused_at = self._streams.clock.monotonic()

    def resume_writing(self) -> None:
        self._paused_at = None
        self._schedule()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._unanswered_at = None
        if not self.host and not self._read_head():
            return
        self._take_lines()

    def _take_lines(self) -> None:
        """Process complete lines; after `AT_A_TIME_S` the rest waits for the host's next turn."""
        clock = self._streams.clock
        begin = clock.monotonic()
        try:
            while (end := self._buffer.find(b"\n", self._searched)) >= 0:
                if self._transport is not None and self._transport.is_closing():
                    # Drop lines that follow the line that ended the stream.
                    return
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                self._searched = 0
                self._take(line)
                spent = clock.monotonic() - begin
                if spent > AT_A_TIME_S and self._transport is not None:
                    self._transport.pause_reading()
                    loop = asyncio.get_running_loop()
                    pause = min(SHARE * spent, PING_S)
                    self._plan(loop.call_later(pause, self._go_on))
                    return
        except Broken as error:
            self._give_up(str(error))
        self._searched = len(self._buffer)
        if self._searched > MAX_LINE:
            self._give_up("a line is too long")

    def _go_on(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()
            self._take_lines()

    def _give_up(self, reason: str) -> None:
        _log.warning("stream ended", host=self.host, reason=reason)
        self.leave(ByeCode.FORMAT, reason)

    # The beginning

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if first.split(" ")[:2] != ["GET", STREAM_PATH] or headers.get("upgrade") != UPGRADE:
            self._refuse(b"426 Upgrade Required")
            return False
        who = read_identity(headers)
        if who is None or who.role is not Role.HOST:
            self._refuse(b"403 Forbidden")
            return False
        if self._streams.unready() is not None:
            self._refuse(b"503 Service Unavailable")
            return False
        if not self._streams.admits(HostId(who.name), who.serial):
            self._streams.note_refused(HostId(who.name), who.serial)
            self._refuse(b"403 Forbidden")
            return False
        self.host, self.serial = HostId(who.name), who.serial
        self._streams.open(self)
        self._write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: "
            + UPGRADE.encode()
            + b"\r\n\r\n"
        )
        return True

    def _refuse(self, status: bytes) -> None:
        self._buffer.clear()
        self._write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        if self._transport is not None:
            self._transport.close()

    # Lines

    def _take(self, line: bytes) -> None:
        match parse_from_host(line):
            case Hello() as hello if not self.greeted:
                self._greet(hello)
            case Hello():
                raise Broken("a second hello")
            case Ack(revision, failed, digest) if self.greeted:
                # A higher revision is from before an accepted restore.
                if revision <= self._sent:
                    self.acked = max(self.acked, revision)
                self.failed = failed
                self._streams.progressed(self.host)
                # The digest counts only if the host has received everything sent.
                if digest and not self._dirty and revision >= self._sent:
                    self._compare(digest)
            case Answer() as answer if self.greeted:
                future = self._asked.pop(answer.number, None)
                if future is not None and not future.done():
                    future.set_result(answer)
            case _:
                raise Broken("the first line is no hello")

    def _compare(self, digest: str) -> None:
        """End the stream if the digests differ, so that the host sends a new hello."""
        streams = self._streams
        if streams.state.is_doubted():
            return
        if digest == streams.state.digest(self.host, self.failed):
            streams.note_differing(self.host, None)
            return
        at = streams.clock.now().strftime("%Y-%m-%d %H:%M:%S UTC")
        why = f"at {at} the host had other items than the fleet places on it"
        streams.note_differing(self.host, why)
        self.leave(ByeCode.DIFFERS, why)

    def _greet(self, hello: Hello) -> None:
        streams = self._streams
        if not streams.admits(self.host, self.serial):
            self.leave(ByeCode.REVOKED)
            return
        if (unready := streams.unready()) is not None:
            self.leave(ByeCode.STOPPING, unready)
            return
        if hello.fleet == streams.state.meta.fleet:
            streams.raise_overrides(self.host, hello.overrides)
        found = streams.state.compare(self.host, hello)
        if isinstance(found, Bye):
            if (evidence := _evidence_of(self.host, hello, found.code)) is not None:
                streams.suspect(evidence)
            self.leave(found.code, found.reason)
            return
        if found.suspicious is not None:
            streams.suspect(Evidence(found.suspicious, self.host))
        before = streams.hosts.get(self.host)
        if before is not None:
            before.leave(ByeCode.REPLACED)
        streams.add(self)
        self.level = hello.level
        self.greeted, self._unread = True, streams.state.unread_instances(found.batch.unreadable)
        self._plan(None)
        _log.info("host joined", host=self.host, revision=hello.revision)
        # Send the age of the items before the items.
        self.send(streams.ping())
        self._send_batch(found.batch)

    def _send_batch(self, batch: Batch) -> None:
        """Send a batch in pieces small enough not to delay other hosts."""
        piece: dict[ItemKey, tuple[int, Any]] = {}
        size = 0
        for item, (revision, value) in batch.put.items():
            piece[item] = revision, fit_item(self._streams.schema, item, value, self.level)
            size += self._streams.state.size(item)
            if size > _BATCH_BYTES:
                part = Batch(batch.revision, batch.fleet, batch.incarnation, piece, more=True)
                self.send(part)
                piece, size = {}, 0
        self._sent = batch.revision
        self.send(replace(batch, put=piece))

    # Changes

    def touch(self, items: Collection[ItemKey]) -> None:
        if self.greeted:
            self._dirty.update(items)
            self._schedule()

    def _schedule(self) -> None:
        if self._dirty and not self._scheduled and self._paused_at is None:
            self._scheduled = True
            self._streams.send_soon(self)

    def flush(self) -> None:
        self._scheduled = False
        if self._transport is None or self._paused_at is not None or not self._dirty:
            return
        items, self._dirty = self._dirty, set()
        state = self._streams.state
        batch = state.changes_for(self.host, items, keeps_unread=bool(self._unread))
        self._send_batch(batch)

    def compare_mended(self) -> None:
        """End the stream if an unreadable instance became readable: the instance may have moved meanwhile."""
        if self._unread and self._unread != self._streams.state.unread_instances(self._unread):
            self.leave(ByeCode.DIFFERS, "an instance that the host kept can be read again")

    def lacks(self, revision: int, items: Collection[ItemKey] | None = None) -> str | None:
        """Check a revision that the hub has received; see `Streams.lacks`."""
        if self.acked < revision:
            if self._dirty:
                return "not sent yet"
            if self.acked < self._sent:
                return "not acknowledged yet"
        failed = (one for one in self.failed.items() if items is None or one[0] in items)
        return "; ".join(f"{item}: {why}" for item, why in failed) or None

    async def ask(self, path: str, method: str) -> Answer:
        number = max(self._asked, default=0) + 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        self.send(Ask(number, path, method))
        try:
            return await future
        finally:
            self._asked.pop(number, None)

    def keep_alive(self, now: float, ping: bytes) -> None:
        """Ping, or end the stream of a host that is not admitted, does not read, or does not answer."""
        if not self._streams.admits(self.host, self.serial):
            self.leave(ByeCode.REVOKED)
            return
        if not self.greeted:
            return
        unread = self._paused_at is not None and now - self._paused_at > _UNREAD_S
        silent = self._unanswered_at is not None and now - self._unanswered_at > _UNANSWERED_S
        if unread or silent:
            self.leave(ByeCode.SLOW)
        elif self._paused_at is None:
            # A ping confirms that all earlier changes were sent.
            self.flush()
            if self._unanswered_at is None:
                self._unanswered_at = now
            self._write(ping)

    def leave(self, code: ByeCode, reason: str = "") -> None:
        """End the stream; if the host does not read, unsent data is lost."""
        self.send(Bye(code, reason))
        self._forget(code.value)
        transport = self._transport
        if transport is None:
            return
        if self._paused_at is None:
            transport.close()
        else:
            transport.abort()

    def send(self, message: FromHub) -> None:
        self._write(render_line(message))

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def _evidence_of(host: HostId, hello: Hello, code: ByeCode) -> Evidence | None:
    match code:
        case ByeCode.BEHIND:
            why = f"{host} has revision {hello.revision}, which etcd lacks"
            return Evidence(why, host, revision=hello.revision)
        case ByeCode.AHEAD:
            why = f"{host} has seen incarnation {hello.incarnation} of the fleet, which etcd lacks"
            return Evidence(why, host, incarnation=hello.incarnation)
        case _:
            return None
