from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.figures import Bar, Verdict, judge, percentile


@pytest.mark.parametrize(
    ("value", "bar", "verdict"),
    [
        (0.85, Bar("≥ 0.85 x", at_least=0.85), Verdict.PASS),
        (0.84, Bar("≥ 0.85 x", at_least=0.85), Verdict.SHORT),
        (10.0, Bar("≤ 10 ms", at_most=10.0), Verdict.PASS),
        (10.1, Bar("≤ 10 ms", at_most=10.0), Verdict.SHORT),
        (1.0, None, Verdict.SHOWN),
    ],
)
def test_a_value_is_judged_by_its_bar(value: float, bar: Bar | None, verdict: Verdict) -> None:
    assert judge(value, bar) is verdict


def test_an_invalid_measurement_never_passes() -> None:
    assert judge(1.0, Bar("≥ 0.85 x", at_least=0.85), valid=False) is Verdict.INVALID
    assert judge(math.nan, Bar("0", at_most=0.0)) is Verdict.INVALID


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=300),
    st.floats(0.1, 100),
)
def test_a_percentile_is_a_sample_that_enough_do_not_exceed(
    samples: list[float], percent: float
) -> None:
    value = percentile(samples, percent)
    assert value in samples
    assert sum(one <= value for one in samples) >= len(samples) * percent / 100 - 1e-6
