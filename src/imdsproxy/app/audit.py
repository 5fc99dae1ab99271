"""Takes the lines of the audit log from HAProxy's workers and writes them where the settings say.

HAProxy does not wait for this. What is not read yet stays in its ring; what the ring has no room for it leaves out
and counts. So a disk that hangs holds up nothing but the log itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import structlog

from imdsproxy.host.files import open_log

__all__ = ["Audit", "FileSink", "JournalSink", "left_out_line", "tell_left_out"]

JOURNAL: Final = "journal"
_JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")
_IDENTIFIER: Final = "imdsproxy-audit"
_PER_SECOND: Final = 300
"""The journal takes 10,000 lines in 30 seconds from a unit; beyond that it leaves out what else we say as well."""

_CHUNK: Final = 256 * 1024
_PAUSE_S: Final = 0.25
"""Between two looks. HAProxy sends more at a time then, which costs it less (ADR 36)."""

_BATCH: Final = 64 * 1024
_AGAIN_S: Final = 5.0
_LAST_S: Final = 1.0
"""For the last lines, when the controller ends."""

_LEFT_OUT: Final = re.compile(rb"(\d+) events? dropped")


class Sink(Protocol):
    """Where lines go."""

    def write(self, lines: bytes) -> None:
        """Whole lines.

        Raises:
            OSError: They could not be written.
        """
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@dataclass(slots=True)
class FileSink:
    """A file that is begun anew when somebody has renamed or removed it."""

    path: Path
    _descriptor: int = -1

    def write(self, lines: bytes) -> None:
        """See `Sink.write`; the file is there with mode 0640 before the first line is."""
        self._follow()
        before = os.fstat(self._descriptor).st_size
        left = memoryview(lines)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            # They come again, all of them.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise

    def close(self) -> None:
        """See `Sink.close`."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _follow(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(self.path.stat(), os.fstat(self._descriptor)):
                    return
            self.close()
        self._descriptor = open_log(self.path)


@dataclass(slots=True)
class JournalSink:
    """Systemd's journal, by its own protocol; no more lines a second than leave room for our messages.

    Source: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
    """

    address: Path = _JOURNAL_SOCKET
    clock: Callable[[], float] = time.monotonic
    per_second: int = _PER_SECOND
    _channel: socket.socket | None = None
    _second: int = 0
    _written: int = 0
    _left_out: int = 0

    def write(self, lines: bytes) -> None:
        """See `Sink.write`."""
        for line in lines.splitlines():
            second = int(self.clock())
            if second != self._second:
                self._second, self._written = second, 0
                if self._left_out:
                    left_out, self._left_out = self._left_out, 0
                    self._send(left_out_line(left_out).rstrip())
            if self._written >= self.per_second:
                self._left_out += 1
                continue
            self._written += 1
            self._send(line)

    def close(self) -> None:
        """See `Sink.close`."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _send(self, line: bytes) -> None:
        if self._channel is None:
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            channel.settimeout(1)
            self._channel = channel
        entry = b"PRIORITY=6\nSYSLOG_IDENTIFIER=%s\nMESSAGE=%s\n" % (_IDENTIFIER.encode(), line)
        self._channel.sendto(entry, os.fspath(self.address))


def left_out_line(count: int) -> bytes:
    """The line that stands for `count` lines which are not there."""
    return b'{"time":%.3f,"left_out":%d}\n' % (time.time(), count)


@dataclass(slots=True)
class Audit:
    """The one who writes.

    Args:
        destination: What the settings say now.
    """

    destination: Callable[[], str]
    failure: str | None = None
    _named: str = ""
    _sink: Sink | None = None
    _workers: dict[asyncio.Task[None], socket.socket] = field(default_factory=dict)
    _ending: bool = False
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, listener: socket.socket, last: socket.socket) -> None:
        """`serve` and `serve_last`, beside one another; until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.serve(listener))
            group.create_task(self.serve_last(last))

    async def serve(self, listener: socket.socket) -> None:
        """Take what workers send; until cancelled, and then what they have sent so far.

        Args:
            listener: Not blocking.
        """
        loop = asyncio.get_running_loop()
        try:
            while True:
                worker, _ = await loop.sock_accept(listener)
                taking = loop.create_task(self._take(worker))
                self._workers[taking] = worker
                taking.add_done_callback(lambda done: self._workers.pop(done, None))
        finally:
            self._ending = True
            for worker in self._workers.values():
                # HAProxy keeps from now on what comes, for the next controller.
                with contextlib.suppress(OSError):
                    worker.shutdown(socket.SHUT_RD)
            if self._workers:
                await asyncio.wait(list(self._workers), timeout=_LAST_S)
            for taking in list(self._workers):
                taking.cancel()

    async def serve_last(self, listener: socket.socket) -> None:
        """Take what workers that are being replaced send, a line a datagram; until cancelled.

        Args:
            listener: For datagrams, not blocking.
        """
        loop = asyncio.get_running_loop()
        while True:
            line = await loop.sock_recv(listener, _CHUNK)
            await self._write(tell_left_out(line))

    async def _take(self, worker: socket.socket) -> None:
        """All that one worker sends, whole lines at a time: several workers share the file."""
        loop = asyncio.get_running_loop()
        begun = b""
        with contextlib.closing(worker):
            # No stream of asyncio's: that reads on while nobody asks, and then HAProxy sends line by line.
            while chunk := await loop.sock_recv(worker, _CHUNK):
                lines, end, begun = (begun + chunk).rpartition(b"\n")
                if end:
                    await self._write(tell_left_out(lines + end))
                if len(chunk) < _BATCH and not self._ending:
                    await asyncio.sleep(_PAUSE_S)

    async def _write(self, lines: bytes) -> None:
        """Keep trying: meanwhile lines wait with HAProxy, or are left out there and counted."""
        async with self._lock:
            while True:
                try:
                    await asyncio.to_thread(self._write_now, self.destination(), lines)
                except OSError as error:
                    self._fail(f"{self.destination()}: {error.strerror or error}")
                    await asyncio.sleep(_AGAIN_S)
                else:
                    self._fail(None)
                    return

    def _write_now(self, destination: str, lines: bytes) -> None:
        if self._sink is None or self._named != destination:
            if self._sink is not None:
                self._sink.close()
            self._named = destination
            self._sink = JournalSink() if destination == JOURNAL else FileSink(Path(destination))
        self._sink.write(lines)

    def _fail(self, reason: str | None) -> None:
        if reason is not None and reason != self.failure:
            structlog.get_logger().warning("audit log not written", reason=reason)
        self.failure = reason


def tell_left_out(lines: bytes) -> bytes:
    """HAProxy's lines without those that tell of itself; how many it had no room for is said in our words."""
    return b"".join(_ours(lines.splitlines(keepends=True)))


def _ours(lines: Iterable[bytes]) -> Iterator[bytes]:
    for line in lines:
        if line.startswith(b"{"):
            yield line
        # Else HAProxy tells of itself: `Proxy guests stopped`.
        elif (told := _LEFT_OUT.search(line)) is not None:
            yield left_out_line(int(told[1]))
