"""Progress and durations of long tasks, and the backoff between failed attempts."""

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final


@dataclass(frozen=True, slots=True)
class Step:
    """Running task: `done` of `of` units (`of` is 0 if the total is unknown)."""

    what: str
    done: int
    of: int


@dataclass(slots=True)
class Progress:
    """Tasks that are running now. Threads may call it: each task is reported by one thread."""

    _steps: dict[str, Step] = field(default_factory=dict)

    def note(self, what: str, done: int, of: int) -> None:
        self._steps[what] = Step(what, done, of)

    def end(self, what: str) -> None:
        self._steps.pop(what, None)

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(self._steps.values())


_BOUNDS_MS: Final = (2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000)
_BOUNDS_S: Final = (*(bound / 1000 for bound in _BOUNDS_MS), math.inf)


@dataclass(slots=True)
class Durations:
    """Histogram of an operation's durations.

    Attributes:
        counts: Number of operations by the smallest bound, in seconds, that each stayed within.
    """

    counts: Counter[float] = field(default_factory=Counter)
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[next(bound for bound in _BOUNDS_S if seconds <= bound)] += 1
        self.total_s += seconds

    def within(self) -> dict[float, int]:
        """Return the cumulative number of operations within each bound."""
        return dict(zip(_BOUNDS_S, accumulate(self.counts[one] for one in _BOUNDS_S), strict=True))


@dataclass(slots=True)
class Backoff:
    """Exponential backoff: each pause is twice the previous one, up to the longest."""

    first_s: float
    longest_s: float
    _next_s: float = 0.0

    def fail(self) -> float:
        """Record a failed attempt; return the pause before the next one."""
        pause = min(self._next_s or self.first_s, self.longest_s)
        self._next_s = pause * 2
        return pause

    def succeed(self) -> None:
        self._next_s = 0.0
