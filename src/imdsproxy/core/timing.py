"""How far long work has come, how long work took, and how long to wait between attempts that fail."""

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of work under way: `done` of `of` (0: not known how many)."""

    what: str
    done: int
    of: int


@dataclass(slots=True)
class Progress:
    """What is under way now. Threads may note as well: each step is noted by one of them."""

    _steps: dict[str, Step] = field(default_factory=dict)

    def note(self, what: str, done: int, of: int) -> None:
        """Say how far a step has come."""
        self._steps[what] = Step(what, done, of)

    def end(self, what: str) -> None:
        """The step is over."""
        self._steps.pop(what, None)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them."""
        return tuple(self._steps.values())


_BOUNDS_MS: Final = (2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000)
_BOUNDS_S: Final = (*(bound / 1000 for bound in _BOUNDS_MS), math.inf)


@dataclass(slots=True)
class Durations:
    """How often something was done, by how long it took.

    Attributes:
        counts: By the smallest bound, in seconds, that each was within.
        total_s: All of them added up.
    """

    counts: Counter[float] = field(default_factory=Counter)
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        """It was done once more."""
        self.counts[next(bound for bound in _BOUNDS_S if seconds <= bound)] += 1
        self.total_s += seconds

    def within(self) -> dict[float, int]:
        """How often it took at most so long, for each bound."""
        return dict(zip(_BOUNDS_S, accumulate(self.counts[one] for one in _BOUNDS_S), strict=True))


@dataclass(slots=True)
class Backoff:
    """Pauses between attempts: each twice as long as the one before, up to the longest.

    Attributes:
        first_s: The pause after the first failure, in seconds.
        longest_s: The longest of them.
    """

    first_s: float
    longest_s: float
    _next_s: float = 0.0

    def fail(self) -> float:
        """An attempt has failed: the pause before the next one."""
        pause = min(self._next_s or self.first_s, self.longest_s)
        self._next_s = pause * 2
        return pause

    def succeed(self) -> None:
        """An attempt has succeeded."""
        self._next_s = 0.0
