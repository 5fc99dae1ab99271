"""Tells the service manager how we are: the protocol of sd_notify(3), version-independent part."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from imdsproxy.host.refusal import host_refused

__all__ = ["ServiceNotifier"]


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

    def stopping(self) -> None:
        """The service has begun to stop."""
        self.send(STOPPING="1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self.send(STATUS=text)

    def watchdog(self) -> None:
        """The service is alive (`WatchdogSec=`)."""
        self.send(WATCHDOG="1")

    def send(self, **fields: str) -> None:
        """Send `NAME=value` lines in one datagram; fields with an empty value are left out.

        Raises:
            HostRefused: The manager's socket does not take it.
        """
        lines = [f"{name}={value.replace(chr(10), ' ')}" for name, value in fields.items() if value]
        if not self.address or not lines:
            return
        target = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.connect(target)
                channel.sendall(os.fsencode("\n".join(lines)))
        except OSError as error:
            raise host_refused(f"notify the service manager at {self.address}", error) from error
