"""Interface by which the parts of a process report: problems, sections of `status`, and metrics."""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Annotated, ClassVar, TypeAlias

from imdsproxy.errors import Problem
from imdsproxy.reconcile.progress import Durations

# The kinds of metrics; `None` gives no series.
Gauge: TypeAlias = Annotated[float | None, "gauge"]
Count: TypeAlias = Annotated[float | None, "counter"]
Times: TypeAlias = Annotated[Durations | None, "histogram"]
By: TypeAlias = Mapping[str, float] | Mapping[tuple[str, str], float] | None
"""Values by label, or by two labels."""


class Impact(Enum):
    DELAYS = auto()
    """Changes do not reach guests."""
    HARMS = auto()
    """Some guests get no answer, or a wrong one."""
    UNNOTICED = auto()
    """Guests notice nothing."""


class Part:
    """Part of a process that reports about itself.

    A method whose return type is a kind of metric is a metric: its name is the metric's name, its docstring the help.
    """

    __slots__ = ()
    impact: ClassVar[Impact] = Impact.DELAYS

    def problems(self) -> Iterable[Problem | None]:
        """Return the current problems that belong to no source, network or instance; `None` is none."""
        return ()

    async def report(self) -> Mapping[str, object]:
        """Return the part's sections of `status`, by name."""
        return {}

    async def refresh(self) -> None:
        """Read the figures that the part does not have at hand, for the metrics."""


def list_problems(parts: Sequence[Part], *impacts: Impact) -> tuple[Problem, ...]:
    """Return the parts' problems of these impacts, in this order; all problems if no impact is given."""
    return tuple(
        problem
        for impact in impacts or Impact
        for part in parts
        if part.impact is impact
        for problem in part.problems()
        if problem is not None
    )
