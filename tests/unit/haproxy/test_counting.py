"""What HAProxy's tables of who has no token say, read into values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from imdsproxy.core.haproxy.config import render_config
from imdsproxy.core.haproxy.counting import (
    ONE_IN,
    CountedRow,
    parse_guests,
    parse_readers,
)
from support.haproxy_config import SPEC, read_sections

# As HAProxy 3.0.11 gave them; the second has letters of its escaping.
_GUESTS = """\
# table: without-token, type: string, size:51200, used:2
0x7fa62bfe99a0: key=blue|i-1 use=0 exp=604798836 shard=0 gpc0=7 gpc1=0 gpc2=3 gpc3=7 gpc3_rate(3600000)=9
0x7fa62bfe99b0: key=a\\ b|i\\=2 use=1 exp=604800000 shard=0 gpc0=1 gpc1=2 gpc2=0 gpc3=0 gpc0_rate(3600000)=1

"""
_READERS = """\
# table: without-token-readers, type: string, size:10240, used:4
0x7fa62d3a3108: key=blue|i-1|latest%2Fmeta-data%2Fiam|Boto3%2F1.34.0%20md use=0 exp=604740000 gpc0=5 gpc1=1 gpc2=0
0x7fa62d3a3208: key=blue|i-1|| use=0 exp=604740000 shard=0 gpc0=0 gpc1=0 gpc2=2
0x7fa62d3a3308: key=blue|i-1 use=0 exp=604740000 shard=0 gpc0=2 gpc1=0 gpc2=0
what is this?
"""


def test_a_guests_entry_tells_what_it_read_what_was_refused_and_when() -> None:
    rows = parse_guests(_GUESTS)
    assert [replace(row, age_s=round(row.age_s, 3)) for row in rows] == [
        CountedRow(("blue", "i-1"), 7, 3, 1.164),
        CountedRow(("a b", "i=2"), 1 + 2 * ONE_IN, 0, 0.0),
    ]


def test_a_readers_entry_tells_path_and_client_and_lines_that_are_none_are_left_out() -> None:
    assert parse_readers(_READERS) == [
        CountedRow(("blue", "i-1", "latest/meta-data/iam", "Boto3/1.34.0_md"), 6, 0, 60.0),
        CountedRow(("blue", "i-1", "", ""), 2, 2, 60.0),
    ]


def test_an_answer_that_is_an_error_has_no_rows() -> None:
    assert parse_guests("Unknown table 'x'") == []
    assert parse_readers("") == []


def _sections(one_in: int) -> dict[str, list[tuple[str, ...]]]:
    return read_sections(render_config(replace(SPEC, count_reads=one_in)))


@pytest.mark.parametrize("one_in", [0, 1, ONE_IN])
def test_no_rule_is_longer_than_haproxy_takes(one_in: int) -> None:
    lines = [line for lines in _sections(one_in).values() for line in lines]
    assert max(map(len, lines)) <= 64
