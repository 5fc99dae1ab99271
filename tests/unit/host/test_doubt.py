from __future__ import annotations

from pathlib import Path

import pytest

from imdsproxy.host.process import Doubt, ProcessStat, read_rests, read_stat


def _stat(state: str, ticks: int) -> ProcessStat:
    return ProcessStat(state, 1, ticks, 99)


def _after(*stats: ProcessStat | None, worker: int = 7) -> Doubt:
    doubt = Doubt()
    for one in stats:
        doubt = doubt.after_silence(worker, one)
    return doubt


def test_one_unanswered_probe_is_no_proof() -> None:
    assert not _after(_stat("T", 5)).hung


def test_a_stopped_worker_is_hung_at_the_second_probe() -> None:
    assert _after(_stat("T", 5), _stat("T", 6)).hung


def test_a_worker_that_sleeps_and_does_not_answer_is_hung() -> None:
    assert _after(_stat("S", 5), _stat("S", 5)).hung


def test_a_worker_that_works_is_only_slow_for_a_while() -> None:
    slow = [_stat("R", ticks) for ticks in range(10)]
    assert not _after(*slow[:7]).hung
    assert _after(*slow[:8]).hung


def test_a_worker_that_waits_for_a_disk_is_given_more_time() -> None:
    waiting = [_stat("D", 5)] * 8
    assert not _after(*waiting[:7]).hung
    assert _after(*waiting).hung


def test_a_worker_that_has_ended_is_left_to_its_master() -> None:
    assert not _after(None, None, None).hung


def test_another_worker_begins_without_doubt() -> None:
    doubt = _after(_stat("S", 5), _stat("R", 6))
    assert not doubt.after_silence(8, _stat("S", 5)).hung
    assert not Doubt().hung


@pytest.mark.parametrize("name", ["haproxy", "a b) (c", ") T 1 1"])
def test_a_process_is_read_whatever_the_process_is_called(tmp_path: Path, name: str) -> None:
    (tmp_path / "12").mkdir()
    stat = f"12 ({name}) S 1 12 12 0 -1 4194560 1 0 0 0 30 12 0 0 20 0 1 0 99 1 1"
    (tmp_path / "12" / "stat").write_text(stat)
    assert read_stat(12, tmp_path) == _stat("S", 42)
    assert read_stat(13, tmp_path) is None
    assert not _stat("S", 1).stopped
    (tmp_path / "12" / "stat").write_text(stat.replace(") S ", ") Z "))
    assert read_stat(12, tmp_path) is None


def test_how_often_a_process_rested_is_read(tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    status = "Name:\tx\nvoluntary_ctxt_switches:\t345\nnonvoluntary_ctxt_switches:\t6\n"
    (tmp_path / "12" / "status").write_text(status)
    assert read_rests(12, tmp_path) == 345
    assert read_rests(13, tmp_path) is None
