"""Reports our state to the service manager: the protocol of sd_notify(3), version-independent part.

Its watchdog, and `/livez`, see by a heartbeat that the event loop makes progress.
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
"""SD_LISTEN_FDS_START."""


@dataclass(frozen=True, slots=True)
class ServiceNotifier:
    """Sends states to the socket that the manager named.

    Attributes:
        address: The value of `NOTIFY_SOCKET`: a path, or `@name` for an abstract socket; empty when
            no manager listens, and then every call does nothing.
    """

    address: str = ""

    def ready(self, status: str = "") -> None:
        """The service has started (or has finished its reload)."""
        self.send(READY="1", STATUS=status)

    def reloading(self, monotonic_us: int) -> None:
        """The service re-reads its configuration; `monotonic_us` is CLOCK_MONOTONIC in µs."""
        self.send(RELOADING="1", MONOTONIC_USEC=str(monotonic_us))

    def keep(self, name: str, descriptor: int) -> bool:
        """Let the manager keep an open file for the next process (`kept_sockets`); false without a manager.

        The manager lets go of it by itself when the other side hangs up.

        Args:
            name: Without `:`.
            descriptor: Of this process.
        """
        return self._deliver(f"FDSTORE=1\nFDNAME={name}", descriptor)

    def send(self, **fields: str) -> None:
        """Send `NAME=value` lines in one datagram; fields with an empty value are left out.

        Raises:
            HostRefused: The manager's socket does not take it.
        """
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
            # A manager that hangs must not make us hang.
            channel.settimeout(_PATIENCE_S)
            channel.connect(target)
            socket.send_fds(channel, [os.fsencode(text)], descriptors)
        return True


def is_journal(stream: IO[str], environment: Mapping[str, str]) -> bool:
    """Whether what is written to a stream goes to systemd's journal (`JOURNAL_STREAM` in systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # it is no file at all
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def kept_sockets(environment: Mapping[str, str], name: str, pid: int) -> list[socket.socket]:
    """The sockets that the service manager kept by a name for an earlier process, set to non-blocking.

    Args:
        environment: Where the manager says what it hands over (sd_listen_fds(3)).
        name: As of `ServiceNotifier.keep`.
        pid: Ours; what was meant for another process is left alone.
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
"""As `WatchdogSec=` of our unit. To plan 100,000 instances at once stops the loop for 3 s, on a busy host for 17 s."""

_LONGEST_BEAT_S: Final = 5.0


class Heartbeat:
    """A task of the loop that is watched.

    Args:
        notifier: The service manager.
        environment: Where that says after how long it ends a service without a sign (sd_watchdog_enabled(3)).
        monotonic: The clock.

    Attributes:
        starting: While it is set, each beat also extends the time that a start may take.
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
        """Whether the loop has come round lately; for any thread."""
        return self._monotonic() - self._last < self._stuck_s

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            self._last = self._monotonic()
            extension = str(int(self._stuck_s * 1e6)) if self.starting else ""
            try:
                self._notifier.send(WATCHDOG="1", EXTEND_TIMEOUT_USEC=extension)
            except HostRefused as error:
                # It may be executing itself anew; while it is gone, it ends no service either.
                structlog.get_logger().warning("service manager not notified", reason=error.message)
            await asyncio.sleep(min(_LONGEST_BEAT_S, self._stuck_s / 4))
