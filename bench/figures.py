"""Results of measurements, and statistics of samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["Bar", "Row", "Verdict", "judge", "median", "percentile"]


class Verdict(Enum):
    """Verdict on a figure beside its bar."""

    PASS = "pass"  # noqa: S105 - a word of the table
    SHORT = "falls short"
    SHOWN = "shown"
    INVALID = "invalid"
    MISSING = "not measured"


@dataclass(frozen=True, slots=True)
class Bar:
    """Target for a figure; `text` is for people."""

    text: str
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        key: Name for `--only` and in the JSON.
        what: Description of the measurement.
        figure: The outcome, for people.
        value: The number that is compared with the bar; `None` if there is none.
        how: Method, with all that a reader needs to judge the figure.
        data: All numbers, for programs.
    """

    key: str
    what: str
    figure: str
    verdict: Verdict
    bar: str = ""
    value: float | None = None
    how: str = ""
    data: Mapping[str, object] = field(default_factory=dict)


def judge(value: float, bar: Bar | None, *, valid: bool = True) -> Verdict:
    """Judge a value: `SHOWN` without a bar, `INVALID` if the measurement is invalid."""
    if not valid or math.isnan(value):
        return Verdict.INVALID
    if bar is None:
        return Verdict.SHOWN
    low = bar.at_least is not None and value < bar.at_least
    high = bar.at_most is not None and value > bar.at_most
    return Verdict.SHORT if low or high else Verdict.PASS


def median(samples: Sequence[float]) -> float:
    """Return the median; `nan` without samples."""
    return statistics.median(samples) if samples else math.nan


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the smallest sample that at least `percent` of all do not exceed; `nan` without samples."""
    if not samples:
        return math.nan
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
