"""Client of the service manager: the version-independent part of sd_notify(3).

A heartbeat shows the manager's watchdog, and `/livez`, that the event loop makes progress.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Final

import structlog

from imdsproxy.errors import HostRefused, refusing

_PATIENCE_S: Final = 1.0
_FIRST_KEPT: Final = 3
"""First passed descriptor, SD_LISTEN_FDS_START."""


@dataclass(frozen=True, slots=True)
class ServiceNotifier:
    """Sender of states to the manager's socket (`NOTIFY_SOCKET`: a path, or `@name` for an abstract socket).

    Without a manager the address is empty, and every call does nothing.
    """

    address: str = ""

    def ready(self, status: str = "") -> None:
        """Report that the service has started, or has finished its reload."""
        self.send(READY="1", STATUS=status)

    def reloading(self, monotonic_us: int) -> None:
        """Report that the service re-reads its configuration; `monotonic_us` is CLOCK_MONOTONIC in µs."""
        self.send(RELOADING="1", MONOTONIC_USEC=str(monotonic_us))

    def keep(self, name: str, descriptor: int) -> bool:
        """Store an open file with the manager for the next process (`kept_sockets`); return false without a manager.

        The manager closes the file when the other side hangs up.
        """
        return self._deliver(f"FDSTORE=1\nFDNAME={name}", descriptor)

    def send(self, **fields: str) -> None:
        """Send `NAME=value` lines in one datagram, without empty values; raise `HostRefused` if the socket refuses."""
        lines = [f"{name}={value.replace(chr(10), ' ')}" for name, value in fields.items() if value]
        if lines:
            self._deliver("\n".join(lines))

    def _deliver(self, text: str, *descriptors: int) -> bool:
        if not self.address:
            return False
        target = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        with (
            refusing(f"notify the service manager at {self.address}"),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
        ):
            # A timeout, so that a hung manager does not block this process.
            channel.settimeout(_PATIENCE_S)
            channel.connect(target)
            socket.send_fds(channel, [os.fsencode(text)], descriptors)
        return True


def is_journal(stream: IO[str], environment: Mapping[str, str]) -> bool:
    """Return whether a stream leads to systemd's journal (`JOURNAL_STREAM` in systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # the stream has no file
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def kept_sockets(environment: Mapping[str, str], name: str, pid: int) -> list[socket.socket]:
    """Return the sockets that the manager stored under a name for an earlier process, set to non-blocking.

    `environment` describes the passed descriptors (sd_listen_fds(3)); those meant for another pid are ignored.
    """
    if environment.get("LISTEN_PID") != str(pid):
        return []
    found: list[socket.socket] = []
    for number, one in enumerate(environment.get("LISTEN_FDNAMES", "").split(":")):
        if one == name:
            kept = socket.socket(fileno=_FIRST_KEPT + number)
            kept.setblocking(False)
            kept.set_inheritable(False)
            found.append(kept)
    return found


_STUCK_S: Final = 120.0
"""Time without a beat, as `WatchdogSec=` of our unit. Planning 100,000 instances blocks the loop for 3 s, on a busy
host for 17 s."""

_LONGEST_BEAT_S: Final = 5.0


class Heartbeat:
    """Heartbeat of an event loop.

    `environment` has the manager's watchdog timeout (sd_watchdog_enabled(3)). While `starting`, each beat also extends
    the start timeout.
    """

    def __init__(
        self,
        notifier: ServiceNotifier,
        environment: Mapping[str, str],
        monotonic: Callable[[], float],
    ) -> None:
        self.starting = True
        self._notifier = notifier
        self._monotonic = monotonic
        given = environment.get("WATCHDOG_USEC", "")
        self._stuck_s = int(given) / 1e6 if given.isdecimal() else _STUCK_S
        self._last = monotonic()

    def alive(self) -> bool:
        """Return whether the loop has made progress recently; callable from any thread."""
        return self._monotonic() - self._last < self._stuck_s

    async def run(self) -> None:
        while True:
            self._last = self._monotonic()
            extension = str(int(self._stuck_s * 1e6)) if self.starting else ""
            try:
                self._notifier.send(WATCHDOG="1", EXTEND_TIMEOUT_USEC=extension)
            except HostRefused as error:
                # The manager may be re-executing itself; until it is back, it does not end any service.
                structlog.get_logger().warning("service manager not notified", reason=error.message)
            await asyncio.sleep(min(_LONGEST_BEAT_S, self._stuck_s / 4))
