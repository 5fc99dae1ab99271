"""Where lines of the audit log go: a file, or systemd's journal."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from imdsproxy.core.haproxy.audit import left_out_line
from imdsproxy.host.files import open_log

JOURNAL: Final = "journal"
_JOURNAL_SOCKET: Final = Path("/run/systemd/journal/socket")
_IDENTIFIER: Final = "imdsproxy-audit"
_PER_SECOND: Final = 300
"""The journal takes 10,000 lines in 30 seconds from a unit; beyond that it leaves out what else we say as well."""

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_PLACE: Final = frozenset({errno.ENOENT, errno.ENOTDIR})


@dataclass(frozen=True, slots=True)
class Written:
    """What became of lines.

    Attributes:
        rest: Those that are still to be written.
        left_out: How many are not to be: the journal would not take them.
    """

    rest: bytes = b""
    left_out: int = 0


class Sink(Protocol):
    """Where lines go."""

    def write(self, lines: bytes) -> Written:
        """Write whole lines; with none, only try that they could be written.

        Raises:
            OSError: None of them could.
        """
        ...

    def hint(self, error: OSError) -> str:
        """Who must do what, so that lines can be written."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def open_sink(destination: str) -> Sink:
    """For `audit.destination`."""
    return JournalSink() if destination == JOURNAL else FileSink(Path(destination))


@dataclass(slots=True)
class FileSink:
    """A file that is begun anew when it was renamed or removed."""

    path: Path
    _descriptor: int = -1

    def write(self, lines: bytes) -> Written:
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
        return Written()

    def hint(self, error: OSError) -> str:
        """See `Sink.hint`."""
        if error.errno in _NO_ROOM:
            return f"free space for {self.path.parent}"
        if error.errno in _NO_PLACE:
            return f"make the directory {self.path.parent}"
        if error.errno == errno.ELOOP:
            return "name the file itself in audit.destination: links are not followed"
        return (
            f"have {self.path} be a file that root may write, or name another in audit.destination"
        )

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

    def write(self, lines: bytes) -> Written:
        """See `Sink.write`."""
        if not lines:
            self._reach()
        left_out, waiting = 0, lines.splitlines(keepends=True)
        for number, line in enumerate(waiting):
            try:
                left_out += not self._take(line.rstrip())
            except OSError:
                if number == 0:
                    raise
                return Written(b"".join(waiting[number:]), left_out)
        return Written(left_out=left_out)

    def hint(self, error: OSError) -> str:
        """See `Sink.hint`."""
        del error
        return "start systemd-journald, or name a file in audit.destination"

    def close(self) -> None:
        """See `Sink.close`."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _take(self, line: bytes) -> bool:
        second = int(self.clock())
        if second != self._second:
            if self._left_out:
                self._send(left_out_line(self._left_out, time.time()))
            self._second, self._written, self._left_out = second, 0, 0
        if self._written >= self.per_second:
            self._left_out += 1
            return False
        self._send(line)
        self._written += 1
        return True

    def _reach(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.connect(os.fspath(self.address))

    def _send(self, line: bytes) -> None:
        if self._channel is None:
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            channel.settimeout(1)
            self._channel = channel
        entry = b"PRIORITY=6\nSYSLOG_IDENTIFIER=%s\nMESSAGE=%s\n" % (_IDENTIFIER.encode(), line)
        self._channel.sendto(entry, os.fspath(self.address))
