"""Every program that is started and waited for has a deadline, and leaves no process behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.api.client import AdminClient
from imdsproxy.cli.main import main
from imdsproxy.controller.companion import Companion
from imdsproxy.errors import HaproxyMissing, HostRefused, RuntimeUnavailable
from imdsproxy.haproxy.launch import Launcher
from imdsproxy.haproxy.layout import Layout
from imdsproxy.host.process import run_program
from support.daemon import alive
from support.lab import until
from support.patience import patience


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Path]:
    """A program that never ends, nor does its child; each call leaves its two pids in `started`."""
    path = tmp_path / "haproxy"
    path.write_text(f"#!/bin/sh\nsleep 300 &\necho $$ $! >>{tmp_path}/started\nwait\n")
    path.chmod(0o755)
    yield path
    for pid in started(path):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def started(hanging: Path) -> list[int]:
    file = hanging.with_name("started")
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def nothing_is_left(hanging: Path) -> None:
    pids = started(hanging)
    assert pids
    until(lambda: not any(map(alive, pids)), what="the end of everything that was started")
    with pytest.raises(ChildProcessError):
        # Nor a zombie.
        os.waitpid(pids[0], os.WNOHANG)


def _check(hanging: Path) -> subprocess.Popen[str]:
    settings = hanging.with_name("imdsproxy.yaml")
    settings.write_text(f"haproxy: {{binary: {hanging}}}\n")
    return subprocess.Popen(
        (sys.executable, "-m", "imdsproxy", "--config", str(settings), "check"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_check_says_that_haproxy_hangs_and_leaves_none_of_it(hanging: Path) -> None:
    process = _check(hanging)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == HaproxyMissing.exit_status
    assert "-vv did not end within 10 s and was killed" in " ".join(output.split())
    nothing_is_left(hanging)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_check_that_is_ended_leaves_nothing_that_it_started(
    hanging: Path, number: signal.Signals
) -> None:
    process = _check(hanging)
    until(lambda: len(started(hanging)) == 2, what="HAProxy's start")
    process.send_signal(number)
    process.communicate(timeout=60)
    nothing_is_left(hanging)


async def test_a_program_is_killed_with_its_children_at_the_deadline(hanging: Path) -> None:
    began = time.monotonic()
    with pytest.raises(HostRefused, match=r"haproxy -c did not end within 0\.5 s and was killed"):
        await run_program(str(hanging), "-c", deadline_s=0.5)
    assert time.monotonic() - began < 30 * patience()
    nothing_is_left(hanging)


async def test_a_program_is_killed_with_its_children_when_nobody_waits_any_more(
    hanging: Path,
) -> None:
    task = asyncio.create_task(run_program(str(hanging), deadline_s=60))
    async with asyncio.timeout(30):
        while len(started(hanging)) < 2:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    nothing_is_left(hanging)


async def test_the_output_of_a_program_comes_back_with_its_status() -> None:
    script = "read word; echo got $word; echo wrong >&2; exit 3"
    words = ("/bin/sh", "-c", script)
    assert await run_program(*words, deadline_s=30) == (3, "got\nwrong")
    assert await run_program(*words, deadline_s=30, errors=False) == (3, "got")


async def test_what_does_not_come_up_is_not_left_beside_the_next(
    hanging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("haproxy.launch", "controller.companion"):
        monkeypatch.setattr(f"imdsproxy.{module}._START_DEADLINE_S", 0.5)
    layout = Layout(tmp_path / "run", tmp_path / "state")
    layout.runtime.mkdir()
    with pytest.raises(RuntimeUnavailable, match="did not come up"):
        await Launcher(str(hanging), None, layout).start()
    nothing_is_left(hanging)
    log, pid_file = tmp_path / "documents.log", tmp_path / "documents.pid"
    with pytest.raises(HostRefused, match="wrote no pid file"):
        await Companion(pid_file, log, [str(hanging)], {}).ensure()
    nothing_is_left(hanging)


def test_stop_leaves_the_data_plane_of_a_controller_that_hangs_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = AdminClient(tmp_path / "run" / "admin.sock", timeout_s=0.2)
    monkeypatch.setattr("imdsproxy.cli.options.Invocation.daemon", lambda _: client)
    settings = tmp_path / "imdsproxy.yaml"
    settings.write_text(
        f"paths: {{runtime_dir: {tmp_path / 'run'}, state_dir: {tmp_path / 'state'}}}\n"
    )
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "run" / "admin.sock"))
        listener.listen()
        status = main(["--config", str(settings), "stop", "--data-plane"])
    assert status == HostRefused.exit_status
    error = capsys.readouterr().err
    assert f"the controller (pid {os.getpid()}) does not answer, so nothing was stopped" in error
    assert "systemctl stop imdsproxy" in error
