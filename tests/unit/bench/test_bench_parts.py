from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import exit_status, parse_options
from bench.bare import Limits, worker_limits
from bench.figures import Row, Verdict
from bench.place import BenchError, mounts_below, prepare
from bench.rows.moves import is_stale
from imdsproxy.core.haproxy.config import render_config
from imdsproxy.core.haproxy.model import Limits as OurLimits
from support.haproxy_config import SPEC


def _rows(*verdicts: Verdict) -> list[Row]:
    return [Row(key, "", "", verdict) for key, verdict in zip(("a", "b"), verdicts, strict=False)]


_BOTH = frozenset({"a", "b"})


def test_a_missed_bar_is_an_error_only_when_asked_to_be_strict() -> None:
    rows = _rows(Verdict.PASS, Verdict.SHORT)
    assert exit_status(rows, _BOTH, strict=False) == 0
    assert exit_status(rows, _BOTH, strict=True) == 1


def test_a_row_that_could_not_be_measured_is_always_an_error() -> None:
    assert exit_status(_rows(Verdict.PASS, Verdict.MISSING), _BOTH, strict=False) == 2
    assert exit_status(_rows(Verdict.PASS), _BOTH, strict=False) == 2


def test_a_ratio_that_says_nothing_is_told_and_no_error() -> None:
    assert exit_status(_rows(Verdict.PASS, Verdict.INVALID), _BOTH, strict=True) == 0


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(["--only", "nonsense"])
    assert ended.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_the_baseline_takes_its_limits_from_a_configuration_of_ours() -> None:
    limits = OurLimits(nbthread=3, maxconn=5000, maxconn_per_network=77)
    spec = replace(SPEC, limits=limits, exporter="127.0.0.1:9466")
    assert worker_limits(render_config(spec)) == Limits(3, 5000, 77)


def test_a_configuration_without_limits_is_no_baseline() -> None:
    with pytest.raises(BenchError):
        worker_limits("global\n  nbthread 1\n")


def test_an_answer_from_before_an_acknowledged_move_is_stale() -> None:
    assert is_stale(3, acknowledged=4, begun=4, owners=25)
    assert not is_stale(4, acknowledged=4, begun=4, owners=25)


def test_while_a_move_is_under_way_both_owners_are_right() -> None:
    assert not is_stale(4, acknowledged=4, begun=5, owners=25)
    assert not is_stale(5, acknowledged=4, begun=5, owners=25)
    assert is_stale(6, acknowledged=4, begun=5, owners=25)


def test_only_mounts_of_the_directory_are_swept_the_innermost_first() -> None:
    mountinfo = "\n".join(
        f"36 35 98:0 / {point} rw,noatime - tmpfs x rw"
        for point in ("/", "/b/.bench/x/run", "/b/.bench/x/run/jail", "/b/.bench2", "/b")
    )
    assert mounts_below(Path("/b/.bench"), mountinfo) == [
        Path("/b/.bench/x/run/jail"),
        Path("/b/.bench/x/run"),
    ]


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(BenchError, match="not empty"):
        prepare(tmp_path)
    assert (tmp_path / "thesis").read_text() == "mine"


def test_what_an_earlier_run_left_is_emptied(tmp_path: Path) -> None:
    directory = tmp_path / "bench"
    prepare(directory)
    (directory / "old").touch()
    prepare(directory)
    assert not (directory / "old").exists()
