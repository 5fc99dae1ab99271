"""What HAProxy's tables of who has no token say, read into values."""

from __future__ import annotations

from dataclasses import replace

from imdsproxy.core.haproxy.counting import (
    GUESTS_TABLE,
    READERS_TABLE,
    STICK_COUNTERS,
    GuestRow,
    ReaderRow,
    counting_rules,
    counting_tables,
    parse_guests,
    parse_readers,
)
from imdsproxy.core.haproxy.guard import ASKED
from imdsproxy.core.haproxy.section import render_sections

# As HAProxy 3.0.11 gave them; the second has letters of its escaping.
_GUESTS = """\
# table: without-token, type: string, size:51200, used:2
0x7fa62bfe99a0: key=blue|i-1 use=0 exp=604798836 shard=0 gpc0=7 gpc1=3 gpc2=7 gpc0_rate(3600000)=9 gpc1_rate(3600000)=9
0x7fa62bfe99b0: key=a\\ b|i\\=2 use=1 exp=604800000 shard=0 gpc0=1 gpc1=0 gpc2=0 gpc0_rate(3600000)=1

"""
_READERS = """\
# table: without-token-readers, type: string, size:10240, used:4
0x7fa62d3a3108: key=blue|i-1||latest/meta-data/iam|Boto3/1.34.0_md use=0 exp=604740000 shard=0 gpc0=5
0x7fa62d3a3208: key=blue|i-1|1|| use=0 exp=604740000 shard=0 gpc0=2
0x7fa62d3a3308: key=blue|i-1 use=0 exp=604740000 shard=0 gpc0=2
what is this?
"""


def test_a_guests_entry_tells_what_it_read_what_was_refused_and_when() -> None:
    rows = parse_guests(_GUESTS)
    assert [replace(row, age_s=round(row.age_s, 3)) for row in rows] == [
        GuestRow("blue", "i-1", 4, 3, 1.164),
        GuestRow("a b", "i=2", 1, 0, 0.0),
    ]


def test_a_readers_entry_tells_path_and_client_and_lines_that_are_none_are_left_out() -> None:
    assert parse_readers(_READERS) == [
        ReaderRow("blue", "i-1", "latest/meta-data/iam", "Boto3/1.34.0_md", False, 5, 60.0),
        ReaderRow("blue", "i-1", "", "", True, 2, 60.0),
    ]


def test_an_answer_that_is_an_error_has_no_rows() -> None:
    assert parse_guests("Unknown table 'x'") == []
    assert parse_readers("") == []


def test_tables_are_bounded_and_rules_use_them_by_their_names() -> None:
    text = render_sections(counting_tables())
    assert f"backend {GUESTS_TABLE}\n" in text
    assert "size 50k" in text
    assert "size 10k" in text
    tracked = [line for line in counting_rules() if line[1].startswith("track-sc")]
    assert [line[line.index("table") + 1] for line in tracked] == [GUESTS_TABLE, READERS_TABLE]
    assert all(int(line[1][-1]) < STICK_COUNTERS for line in tracked)


def test_no_rule_is_longer_than_haproxy_takes() -> None:
    for rules in (counting_rules(), counting_rules(unless=ASKED)):
        assert max(len(line) for line in rules) <= 64


def test_where_requests_of_several_guests_share_a_connection_each_guest_is_looked_at() -> None:
    assert "!{ var(sess.looked),strcmp(sess.key) 0 }" in " ".join(counting_rules()[0])
