"""Continuous reloads of HAProxy, caused by a network that comes and goes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

from bench.daemon import AdminConnection, Daemon
from bench.lab import PREFIX, Lab
from bench.place import BenchError
from bench.records import network

__all__ = ["Reloads", "reload_count", "reloading"]

NAME = f"{PREFIX}flip"


def reload_count(daemon: Daemon) -> int:
    """Return the number of starts and reloads of HAProxy, as the daemon counts them."""
    haproxy = daemon.status()["haproxy"]
    if not isinstance(haproxy, dict):
        raise BenchError("status is not understood")
    last = haproxy["last_reload"]
    return int(last["number"]) if isinstance(last, dict) else 0


class Reloads:
    """A network added and removed in turn; each change is one reload.

    Args:
        lab: The lab for the network's namespace.
        admin: A connection for this object alone.
    """

    def __init__(self, lab: Lab, admin: AdminConnection) -> None:
        self._admin = admin
        self._there = False
        if NAME not in lab.names:
            lab.add(NAME)

    def once(self) -> None:
        """Cause one reload, and wait for it."""
        if self._there:
            self._admin.ask("DELETE", f"/v1/networks/{NAME}")
        else:
            self._admin.ask("POST", "/v1/networks", network(NAME))
        self._there = not self._there

    def end(self) -> None:
        """Remove the network."""
        if self._there:
            self.once()


@dataclass(slots=True)
class Running:
    """Reloads in progress in a thread of their own."""

    count: int = 0
    failed: list[str] = field(default_factory=list)


@contextlib.contextmanager
def reloading(lab: Lab, daemon: Daemon, every_s: float) -> Iterator[Running]:
    """Reload continuously for the time of the context."""
    running = Running()
    stop = threading.Event()

    def work() -> None:
        with closing(daemon.admin()) as admin:
            reloads = Reloads(lab, admin)
            while not stop.is_set():
                began = time.monotonic()
                try:
                    reloads.once()
                except (BenchError, OSError) as error:
                    running.failed.append(str(error))
                    return
                running.count += 1
                stop.wait(max(0.0, every_s - (time.monotonic() - began)))
            reloads.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        stop.set()
        thread.join()
