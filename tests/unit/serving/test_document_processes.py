from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.errors import HostRefused
from imdsproxy.serving.pidfile import PidFile, read_pids, stop_documents
from imdsproxy.serving.server import restart_delay


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_the_file_says_who_lives(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    path = tmp_path / "documents.pid"
    file = PidFile.claim(path)
    file.write((os.getpid(), sleeper.pid))
    assert read_pids(path).pids == (os.getpid(), sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert read_pids(path).pids == (os.getpid(),)
    file.release()
    assert read_pids(path).pids == ()


def test_a_pid_that_was_given_to_another_process_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "documents.pid"
    path.write_text(f"{os.getpid()} 1\n{os.getpid()} 2\nnonsense\n\n")
    assert read_pids(path).pids == ()


def test_no_file_is_nobody(tmp_path: Path) -> None:
    assert read_pids(tmp_path / "documents.pid").pids == ()
    assert not stop_documents(tmp_path / "documents.pid")


def test_a_second_claim_is_refused_and_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "documents.pid"
    file = PidFile.claim(path)
    file.write((os.getpid(),))
    with pytest.raises(HostRefused, match=f"pid {os.getpid()}"):
        PidFile.claim(path)
    file.release()
    PidFile.claim(path).release()


def test_a_claim_in_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostRefused):
        PidFile.claim(tmp_path / "nothing" / "documents.pid")


def test_workers_without_a_parent_are_stopped_too(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    path = tmp_path / "documents.pid"
    file = PidFile.claim(path)
    file.write((os.getpid(), sleeper.pid))
    text = path.read_text().split("\n", 1)[1]
    path.write_text(f"{os.getpid()} 1\n{text}")
    assert stop_documents(path)
    assert sleeper.wait() == -15
    file.release()


def test_a_process_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    stubborn = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    assert stubborn.stdout is not None
    with stubborn, stubborn.stdout:
        stubborn.stdout.readline()
        path = tmp_path / "documents.pid"
        file = PidFile.claim(path)
        file.write((stubborn.pid,))
        assert stop_documents(path, timeout_s=0.2)
        assert stubborn.wait() == -9
        file.release()


def test_a_process_that_cannot_be_ended_is_named(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As one that waits for a disk.
    monkeypatch.setattr("imdsproxy.serving.pidfile.os.kill", lambda _pid, _number: None)
    path = tmp_path / "documents.pid"
    file = PidFile.claim(path)
    file.write((sleeper.pid,))
    ticks = iter(range(100))
    with pytest.raises(HostRefused, match=str(sleeper.pid)):
        stop_documents(path, timeout_s=5, monotonic=lambda: next(ticks), sleep=lambda _s: None)
    file.release()
    monkeypatch.undo()


def test_the_first_death_costs_no_time_and_further_ones_ever_more_up_to_a_bound() -> None:
    assert restart_delay(0) == restart_delay(1) == 0
    delays = [restart_delay(failures) for failures in range(2, 12)]
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays == sorted(delays)
    assert delays[-1] == restart_delay(10_000) == 5.0
