from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.config.strict_yaml import Decoded, decode_yaml
from imdsproxy.core.model import Instance
from imdsproxy.core.records import Refused, parse_instance, parse_records, render_record
from imdsproxy.core.records.values import LAST_SECOND, unix_time_of

_NOON = 1_795_694_400
"""2026-11-26, noon in UTC."""


def _read(created_at: object) -> Instance | Refused:
    return parse_instance({"id": "i", "name": "i", "created_at": created_at})


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-26T12:00:00Z",
        "2026-11-26t12:00:00z",
        "2026-11-26 12:00:00Z",
        "2026-11-26T12:00:00+00:00",
        "2026-11-26T12:00:00-00:00",
        "2026-11-26T14:30:00+02:30",
        "2026-11-26T00:00:00-12:00",
        "2026-11-26T12:00:00.0Z",
        "2026-11-26T12:00:00.999999999999Z",
    ],
)
def test_a_time_with_its_zone_is_a_second_of_unix_time(text: str) -> None:
    assert unix_time_of(text) == _NOON
    found = _read(text)
    assert isinstance(found, Instance)
    assert found.created_at == _NOON
    assert render_record(found)["created_at"] == _NOON


_NO_TIMES = (
    "", "now", "1795694400", "2026-11-26", "2026-11-26T12:00:00", "2026-11-26T12:00Z", "2026-11-26T12:00:00.Z",
    "2026-11-26T12:00:00,5Z", "20261126T120000Z", "2026-W48-4T12:00:00Z", "2026-11-26T12:00:00+0000",
    "2026-11-26T12:00:00 Z", " 2026-11-26T12:00:00Z", "2026-11-26T12:00:00Z\n", "2026-11-26T25:00:00Z",
    "2026-11-26T12:00:60Z", "2026-02-30T12:00:00Z", "2026-11-26T12:00:00+24:00", "1969-12-31T23:59:59Z",
    "0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00", "\uff12026-11-26T12:00:00Z",
)  # fmt: skip


@pytest.mark.parametrize("text", _NO_TIMES)
def test_what_is_no_such_time_is_refused(text: str) -> None:
    assert unix_time_of(text) is None
    found = _read(text)
    assert isinstance(found, Refused)
    assert [problem.field for problem in found.problems] == ["created_at"]


@pytest.mark.parametrize("value", [True, 1.5, -1, LAST_SECOND + 1, [], {}, b"x"])
def test_what_is_no_number_of_seconds_is_refused(value: object) -> None:
    assert isinstance(_read(value), Refused)
    for good in (0, _NOON, LAST_SECOND):
        found = _read(good)
        assert isinstance(found, Instance)
        assert found.created_at == good


def test_a_time_in_yaml_needs_no_quotes() -> None:
    decoded = decode_yaml("instances: [{id: i, name: i, created_at: 2026-11-26T12:00:00Z}]")
    assert isinstance(decoded, Decoded)
    records = parse_records(decoded.value)
    assert [each.created_at for each in records.instances] == [_NOON]


@given(
    st.datetimes(datetime(1970, 1, 2), datetime(2286, 11, 19)),  # noqa: DTZ001 - each gets its zone below
    st.integers(-1439, 1439),
)
def test_every_time_is_read_as_python_means_it(when: datetime, minutes: int) -> None:
    aware = when.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    seconds = unix_time_of(aware.isoformat())
    assert seconds == int(aware.timestamp() // 1)
    assert seconds is not None
    assert unix_time_of(datetime.fromtimestamp(seconds, UTC).isoformat()) == seconds
