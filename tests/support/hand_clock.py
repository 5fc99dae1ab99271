"""A clock that a test moves."""

from dataclasses import dataclass
from datetime import UTC, datetime

from imdsproxy.host.clock import Clock, Moment


@dataclass(slots=True)
class HandClock(Clock):
    """Both clocks of `imdsproxy.host.clock`, `time` seconds after their beginnings.

    Attributes:
        pace: Of the wall clock. It goes backwards: who waits by that one waits for ever.
    """

    time: float = 100.0
    pace: int = -1

    def monotonic(self) -> float:
        return self.time

    def now(self) -> datetime:
        return datetime.fromtimestamp(1e9 + self.pace * self.time, UTC)

    def moment(self) -> Moment:
        return Moment(self.now().timestamp(), "this boot", self.time)
