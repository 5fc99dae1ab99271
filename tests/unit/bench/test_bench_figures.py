from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.figures import Bar, Row, Verdict, judge, median, percentile
from bench.show import document, table


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


def test_the_99th_percentile_of_a_hundred_leaves_one_above() -> None:
    assert percentile([float(one) for one in range(1, 101)], 99) == 99.0


def test_nothing_has_no_median_and_no_percentile() -> None:
    assert math.isnan(median([]))
    assert math.isnan(percentile([], 99))


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


def test_the_document_has_every_row_with_its_numbers() -> None:
    row = Row("stale", "moves", "0 of 9", Verdict.PASS, "0", 0.0, "so", {"answers": 9})
    made = document([row], {"processors": 2})
    assert made["machine"] == {"processors": 2}
    assert made["rows"] == [
        {
            "key": "stale",
            "what": "moves",
            "figure": "0 of 9",
            "bar": "0",
            "value": 0.0,
            "verdict": "pass",
            "how": "so",
            "data": {"answers": 9},
        }
    ]


def test_the_table_has_a_line_for_every_row() -> None:
    rows = [Row(f"row-{number}", "", "", Verdict.SHOWN) for number in range(3)]
    assert table(rows).row_count == 3
