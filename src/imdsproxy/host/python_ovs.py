"""Loader of python-ovs, which is imported only if a database is followed, with fixes for hosts with many networks.

The distribution installs the library (Debian: python3-openvswitch), or `imdsproxy[ovn]` does.
"""

import importlib
import select
import socket
from typing import Any, Final, TypeAlias

from imdsproxy.errors import optional_library

Library: TypeAlias = Any

_FIRST_PAUSE_MS: Final = 1000
_LONGEST_PAUSES: Final = 8


def import_library() -> Library:
    """Import python-ovs; raise `LibraryMissing` if the library is not installed, or not for this Python."""
    with optional_library(
        "Open vSwitch's Python module",
        "apt install python3-openvswitch, or pip install 'imdsproxy[ovn]'",
    ):
        library = importlib.import_module("ovs")
        for name in ("db.idl", "poller", "reconnect", "stream", "vlog"):
            importlib.import_module(f"ovs.{name}")
    library.poller.SelectPoll = _Poll
    # Silence its log: it would write to standard error, and `Reading.lost` has its messages.
    library.vlog.Vlog.init(None)
    library.vlog.Vlog.set_level("any", "any", "off")
    return library


def plan_pauses(random: float) -> tuple[int, int]:
    """Return the first and the longest pause between two connection attempts, in milliseconds.

    After a loss each endpoint is tried once without a pause; then the pauses double from the first to the longest. All
    hosts of a cloud lose a server at the same moment: `random`, from 0 to 1, spreads their reconnections.
    """
    first = _FIRST_PAUSE_MS * (1 + random)
    return round(first), round(first * _LONGEST_PAUSES)


class _Poll:
    """poll(2) for python-ovs: its select(2) takes no descriptor above 1023, which a host with many networks exceeds."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}

    def register(self, what: int | socket.socket, events: int) -> None:
        number = what if isinstance(what, int) else what.fileno()
        self._masks[number] = self._masks.get(number, 0) | events

    def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
        """Wait for events; for ever if the time is negative."""
        poller = select.poll()
        for number, events in self._masks.items():
            poller.register(number, events)
        return poller.poll(timeout_ms)
