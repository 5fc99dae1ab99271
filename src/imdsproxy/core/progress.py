"""How far work has come that takes long: shown to whoever waits for it."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Progress", "Step"]


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
