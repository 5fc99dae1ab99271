import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.controller.companion import Companion
from imdsproxy.documents.pidfile import PidFile, read_pids
from imdsproxy.documents.server import DocumentServer, Worker
from imdsproxy.errors import HostRefused
from imdsproxy.host.notify import ServiceNotifier
from imdsproxy.host.servers import open_unix_socket

_SLEEPS = "import time; print(flush=True); time.sleep(60)"
_IGNORES = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {_SLEEPS}"


@pytest.fixture(params=[_SLEEPS])
def sleeper(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", str(request.param)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "documents.pid"


def test_the_file_says_who_lives(
    path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = PidFile(path)
    file.write((os.getpid(), sleeper.pid), 3)
    # What it holds is not written again, as on a disk that was mounted read-only since.
    with monkeypatch.context() as patch:
        patch.delattr("imdsproxy.documents.pidfile.os.pwrite")
        file.write((os.getpid(), sleeper.pid), 3)
    assert (read_pids(path).pids, read_pids(path).restarts) == ((os.getpid(), sleeper.pid), 3)
    with pytest.raises(HostRefused, match=f"pid {os.getpid()}"):
        PidFile(path)
    sleeper.kill()
    sleeper.wait()
    assert read_pids(path).pids == (os.getpid(),)
    file.release()
    assert read_pids(path).pids == ()
    PidFile(path).release()


@pytest.mark.parametrize(
    "text", [None, f"{os.getpid()} 1\n{os.getpid()} 2\nnonsense\n\n"], ids=["none", "other"]
)
def test_without_a_file_or_by_a_pid_of_another_process_none_is_ours(
    path: Path, text: str | None
) -> None:
    if text is not None:
        path.write_text(text)
    assert read_pids(path).pids == ()


@pytest.mark.parametrize("parent", [True, False])
@pytest.mark.parametrize(
    ("sleeper", "ended"), [(_SLEEPS, -15), (_IGNORES, -9)], indirect=["sleeper"]
)
def test_processes_are_asked_to_end_and_then_killed(
    path: Path,
    sleeper: subprocess.Popen[bytes],
    ended: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    parent: bool,
) -> None:
    monkeypatch.setattr("imdsproxy.controller.companion._STOP_GRACE_S", 0.5)
    companion = Companion(path, path, (), {})
    asyncio.run(companion.stop())
    file = PidFile(path)
    file.write((sleeper.pid,) if parent else (os.getpid(), sleeper.pid))
    if not parent:
        # Killed, and its number another process's by now.
        path.write_text(f"{os.getpid()} 1\n" + path.read_text().split("\n", 1)[1])
    asyncio.run(companion.stop())
    assert sleeper.wait() == ended
    file.release()


def test_a_process_that_cannot_be_ended_is_named(
    path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imdsproxy.controller.companion._STOP_GRACE_S", 0.05)
    file = PidFile(path)
    file.write((sleeper.pid,))
    with monkeypatch.context() as patch:
        # As one that waits for a disk.
        patch.setattr("imdsproxy.documents.pidfile.os.kill", lambda _pid, _number: None)
        with pytest.raises(HostRefused, match=str(sleeper.pid)):
            asyncio.run(Companion(path, path, (), {}).stop())
    file.release()


def test_a_worker_is_doubted_only_when_it_had_a_second_to_answer(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    server = DocumentServer(
        (path,), tmp_path, tmp_path, tmp_path / "documents.pid", ServiceNotifier()
    )
    with open_unix_socket(path, mode=0o600) as listener:
        worker = Worker(path, path, listener, path.stat(), pid=os.getpid())
        worker.ask()
        worker.started = time.monotonic()
        server._check(worker, os.getpid(), look=True)
        assert worker.doubt.silent == 0
        worker.started -= 2
        server._check(worker, os.getpid(), look=True)
        assert worker.doubt.silent == 1
        worker.close_question()


def test_the_first_death_costs_no_time_and_further_ones_ever_more_up_to_a_bound(
    tmp_path: Path,
) -> None:
    with socket.socket() as listener:
        worker = Worker(tmp_path, tmp_path, listener, tmp_path.stat())
        delays = []
        for _ in range(12):
            worker.note_end(worker.started)
            delays.append(worker.due - worker.started)
        assert delays[:5] == [0.0, 0.1, 0.2, 0.4, 0.8]
        assert delays[-1] == 5.0
        worker.note_end(worker.started + 6)
        assert (worker.due, worker.failures) == (worker.started + 6, 0)
        worker.note_end(worker.started)
        worker.note_end(worker.started)
        assert worker.due - worker.started == 0.1
