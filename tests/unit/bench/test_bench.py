"""What script/bench makes of its measurements, and of those of the peer's harness."""

import json
import math
import os
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.__main__ import ROWS, WITH_PEER, exit_status, parse_options
from bench.figures import Bar, Row, Verdict, judge, percentile
from bench.guest import Answer
from bench.nova import identity, names_itself
from bench.peer import peer_at, running
from bench.place import BenchError, prepare
from bench.rows.moves import is_stale
from bench.wrk import parse_wrk
from support.lab import until

_PAGE: Final = Path(__file__).resolve().parents[3] / "docs/explanation/performance.md"


def test_every_row_is_on_the_page_of_figures_and_in_one_group() -> None:
    page = _PAGE.read_text()
    assert [row for row in ROWS if f"| `{row}` |" not in page] == []
    assert len(set(ROWS)) == len(ROWS)


# Figures


@pytest.mark.parametrize(
    ("value", "bar", "verdict"),
    [
        (0.85, Bar("≥ 0.85 x", at_least=0.85), Verdict.PASS),
        (0.84, Bar("≥ 0.85 x", at_least=0.85), Verdict.SHORT),
        (10.0, Bar("≤ 10 ms", at_most=10.0), Verdict.PASS),
        (10.1, Bar("≤ 10 ms", at_most=10.0), Verdict.SHORT),
        (1.0, None, Verdict.SHOWN),
        (math.nan, Bar("0", at_most=0.0), Verdict.INVALID),
    ],
)
def test_a_value_is_judged_by_its_bar(value: float, bar: Bar | None, verdict: Verdict) -> None:
    assert judge(value, bar) is verdict
    assert judge(value, bar, valid=False) is Verdict.INVALID


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.floats(0.1, 100))
def test_a_percentile_is_a_sample_that_enough_do_not_exceed(
    samples: list[float], percent: float
) -> None:
    value = percentile(samples, percent)
    assert value in samples
    assert sum(one <= value for one in samples) >= len(samples) * percent / 100 - 1e-6


@pytest.mark.parametrize(
    ("verdicts", "strict", "status"),
    [
        ((Verdict.PASS, Verdict.SHORT), False, 0),
        ((Verdict.PASS, Verdict.SHORT), True, 1),
        ((Verdict.PASS, Verdict.INVALID), True, 0),
        ((Verdict.PASS, Verdict.MISSING), False, 2),
        ((Verdict.PASS,), False, 2),
    ],
)
def test_a_missed_bar_is_an_error_where_asked_for_and_a_row_that_is_missing_always(
    verdicts: tuple[Verdict, ...], status: int, *, strict: bool
) -> None:
    rows = [Row(key, "", "", verdict) for key, verdict in zip("ab", verdicts, strict=False)]
    assert exit_status(rows, frozenset("ab"), strict=strict) == status


def test_rows_that_are_unknown_or_need_a_peer_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not set(WITH_PEER) & parse_options([]).only
    assert set(WITH_PEER) <= parse_options(["--peer", "/x"]).only
    for row, words in (("nonsense", "nonsense"), ("peer-agent", "--peer DIR is needed for")):
        with pytest.raises(SystemExit) as ended:
            parse_options(["--only", row])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "body", "right"),
    [
        (200, json.dumps({"uuid": identity("a").instance}), True),
        (200, json.dumps({"uuid": identity("b").instance}), False),
        (503, json.dumps({"uuid": identity("a").instance}), False),
        (200, "<html>", False),
        (200, "[]", False),
    ],
)
def test_a_guest_is_answered_as_itself_or_it_does_not_count(
    status: int, body: str, *, right: bool
) -> None:
    assert names_itself("a", Answer(status, body.encode(), closes=True)) is right


@pytest.mark.parametrize(
    ("owner", "begun", "stale"),
    [(3, 4, True), (4, 4, False), (4, 5, False), (5, 5, False), (6, 5, True)],
)
def test_an_answer_is_stale_unless_it_is_of_the_last_acknowledged_move_or_one_under_way(
    owner: int, begun: int, *, stale: bool
) -> None:
    assert is_stale(owner, acknowledged=4, begun=begun, owners=25) is stale


_REPORT: Final = """Running 2s test @ http://169.254.169.254/latest/meta-data/instance-id
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.10ms    0.95ms  20.01ms   92.10%
  Latency Distribution
     50%    0.94ms
     99%  271.00us
  117897 requests in 2.00s, 17.54MB read
"""
_TROUBLE: Final = """  Socket errors: connect 1, read 2, write 3, timeout 4
  Non-2xx or 3xx responses: 5
"""


@pytest.mark.parametrize(("trouble", "errors"), [("", 0), (_TROUBLE, 15)])
def test_wrks_report_is_read_and_every_kind_of_trouble_is_an_error(
    trouble: str, errors: int
) -> None:
    report = parse_wrk(_REPORT + trouble)
    assert report is not None
    assert (report.requests, report.seconds, report.errors) == (117897, 2.0, errors)
    assert report.rate == pytest.approx(58948.5)
    assert [report.p50_s, report.p99_s] == pytest.approx([0.00094, 0.000271])
    assert parse_wrk("unable to connect to 169.254.169.254:80 Connection refused\n") is None


# Its place


def test_what_an_earlier_run_left_is_emptied_and_a_directory_of_others_left_alone(
    tmp_path: Path,
) -> None:
    own = tmp_path / "bench"
    prepare(own)
    (own / "old").touch()
    prepare(own)
    assert not (own / "old").exists()
    with pytest.raises(BenchError, match="not empty"):
        prepare(tmp_path)


# The peer


def test_a_harness_that_fails_says_why_and_a_result_of_an_earlier_run_is_none(
    tmp_path: Path,
) -> None:
    with pytest.raises(BenchError, match=r"run\.sh"):
        peer_at(tmp_path, tmp_path, print)
    (tmp_path / "peer.json").write_text("{}")
    for script, words in (
        ("echo no neutron >&2; exit 3", r"\(3\): no neutron"),
        ("exit 0", r"\(0\)"),
    ):
        (tmp_path / "run.sh").write_text(script)
        with pytest.raises(BenchError, match=words):
            peer_at(tmp_path, tmp_path, print).run([])
    (tmp_path / "run.sh").write_text('[ $1 = --skip ] && printf "{\\"a\\": 1}" >"$4"\n')
    assert peer_at(tmp_path, tmp_path, print).run(["--skip", "load"]) == {"a": 1}


def test_a_run_that_is_stopped_stops_the_harness_and_lets_it_clean_up(tmp_path: Path) -> None:
    script = f"""trap 'touch {tmp_path}/cleaned; exit 0' TERM
echo $$ > {tmp_path}/pid.part && mv {tmp_path}/pid.part {tmp_path}/pid
while :; do sleep 0.05; done
"""
    with running(["bash", "-c", script], output=2):
        until((tmp_path / "pid").exists)
    assert (tmp_path / "cleaned").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
