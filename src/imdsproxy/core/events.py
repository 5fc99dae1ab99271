"""What parts of the controller tell each other: who wants to know subscribes, once, when all parts are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from imdsproxy.core.model import NetworkId
from imdsproxy.core.observation import AddressKey

_What = TypeVar("_What")


class Event(Generic[_What]):
    """Calls its subscribers at once, in the order in which they subscribed."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[_What], object]] = []

    def subscribe(self, subscriber: Callable[[_What], object]) -> None:
        """Call it each time from now on."""
        self._subscribers.append(subscriber)

    def __call__(self, what: _What) -> None:
        """Tell every subscriber."""
        for subscriber in self._subscribers:
            subscriber(what)


class Events:
    """Every event between parts.

    Attributes:
        networks_changed: Networks that came, changed or went.
        records_applied: Addresses whose records are in force now; `None` stands for all of them.
        haproxy_returned: HAProxy runs again, or with a worker that we did not start; the reason.
        haproxy_failed: HAProxy does not start with the configuration on disk; the reason.
        trust_changed: Networks whose guests are trusted by another rule than before.
        filter_removed: A network whose MAC filter another program has removed.
        hop_limits_needed: Networks whose listeners need the rule for hop limits, or no longer do.
    """

    def __init__(self) -> None:
        self.networks_changed: Event[frozenset[NetworkId]] = Event()
        self.records_applied: Event[Iterable[AddressKey] | None] = Event()
        self.haproxy_returned: Event[str] = Event()
        self.haproxy_failed: Event[str] = Event()
        self.trust_changed: Event[frozenset[NetworkId]] = Event()
        self.filter_removed: Event[NetworkId] = Event()
        self.hop_limits_needed: Event[frozenset[NetworkId]] = Event()
