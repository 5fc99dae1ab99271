from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from imdsproxy.host.process import Doubt, ProcessStat, read_rests, read_stat


def _stat(state: str, ticks: int) -> ProcessStat:
    return ProcessStat(state, 1, ticks, 99)


def _after(stats: Iterable[ProcessStat | None]) -> Doubt:
    doubt = Doubt()
    for one in stats:
        doubt = doubt.after_silence(7, one)
    return doubt


_SLOW = [_stat("R", ticks) for ticks in range(8)]
_WAITING = [_stat("D", 5)] * 8


@pytest.mark.parametrize(
    ("stats", "hung"),
    [
        pytest.param([_stat("T", 5)], False, id="one unanswered probe is no proof"),
        pytest.param([_stat("T", 5), _stat("T", 6)], True, id="stopped"),
        pytest.param([_stat("S", 5), _stat("S", 5)], True, id="sleeps"),
        pytest.param(_SLOW[:7], False, id="works, so it is only slow"),
        pytest.param(_SLOW, True, id="works for too long"),
        pytest.param(_WAITING[:7], False, id="waits for a disk"),
        pytest.param(_WAITING, True, id="waits for a disk for too long"),
        pytest.param([None] * 3, False, id="has ended: its master's business"),
    ],
)
def test_a_worker_that_does_not_answer_is_hung_as_soon_as_waiting_is_no_use(
    stats: list[ProcessStat | None], *, hung: bool
) -> None:
    assert _after(stats).hung is hung


def test_another_worker_begins_without_doubt() -> None:
    doubt = _after([_stat("S", 5), _stat("R", 6)])
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
