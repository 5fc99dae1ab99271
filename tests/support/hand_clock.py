"""A clock that a test moves."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from imdsproxy.host.clock import Clock


@dataclass(slots=True)
class HandClock(Clock):
    """Both clocks of `imdsproxy.host.clock`, at `time` seconds."""

    time: float = 100.0

    def monotonic(self) -> float:
        return self.time

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.time, UTC)
