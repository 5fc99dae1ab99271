from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator

import pytest

from imdsproxy.errors import HostRefused
from imdsproxy.host.process import (
    ProcessHandle,
    open_process,
    read_arguments,
    read_stat,
    spawn_detached,
)

_SLEEP = "import time; print('up', flush=True); time.sleep(600)"
_STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True); time.sleep(600)"
)


class _Spawner:
    def __init__(self) -> None:
        self.handles: list[ProcessHandle] = []

    def __call__(self, code: str, *arguments: str) -> tuple[ProcessHandle, bytes]:
        """Start Python code; its handle and the first line of what it printed."""
        reading, writing = os.pipe()
        try:
            handle = spawn_detached(
                (sys.executable, "-c", code, *arguments),
                stdout=writing,
                stderr=writing,
                environment={"WORD": "one"},
            )
        finally:
            os.close(writing)
        self.handles.append(handle)
        with os.fdopen(reading, "rb") as output:
            return handle, output.readline()


@pytest.fixture
def spawn() -> Iterator[_Spawner]:
    spawner = _Spawner()
    yield spawner
    for handle in spawner.handles:
        if handle._descriptor >= 0:
            handle.kill(signal.SIGKILL)
            os.waitid(os.P_PID, handle.pid, os.WEXITED) if handle.alive() else None
            handle.close()


def test_a_process_is_known_by_what_proc_says() -> None:
    me = read_stat(os.getpid())
    assert me is not None
    assert me.parent == os.getppid()
    assert read_arguments(os.getpid())[0] == sys.orig_argv[0]


def test_nobody_has_a_pid_that_is_free(spawn: _Spawner) -> None:
    handle, _ = spawn(_SLEEP)
    handle.kill(signal.SIGKILL)
    os.waitid(os.P_PID, handle.pid, os.WEXITED)
    assert read_stat(handle.pid) is None
    assert open_process(handle.pid) is None
    assert not handle.alive()
    assert not handle.kill()


def test_a_detached_process_has_a_session_and_an_environment_of_its_own(spawn: _Spawner) -> None:
    code = "import os; print(os.getsid(0) == os.getpid(), os.environ['WORD'], os.getcwd())"
    _, line = spawn(code + "; import sys; sys.stdout.flush()")
    assert line == b"True one /\n"


def test_a_program_that_is_missing_is_refused_by_name() -> None:
    with pytest.raises(HostRefused, match=r"cannot start /no/such: .*ENOENT"):
        spawn_detached(("/no/such",), stdout=1, stderr=2, environment={})


async def test_waiting_gives_the_exit_status_to_everybody_who_waits(spawn: _Spawner) -> None:
    handle, _ = spawn("print('up', flush=True); raise SystemExit(7)")
    async with asyncio.timeout(30):
        assert list(await asyncio.gather(handle.wait(), handle.wait())) == [7, 7]
    assert await handle.wait() == 7
    assert not handle.alive()


async def test_waiting_for_a_signal_gives_its_number_negative(spawn: _Spawner) -> None:
    handle, _ = spawn(_SLEEP)
    assert handle.alive()
    assert handle.kill(signal.SIGKILL)
    async with asyncio.timeout(30):
        assert await handle.wait() == -signal.SIGKILL


async def test_waiting_can_be_given_up(spawn: _Spawner) -> None:
    handle, _ = spawn(_SLEEP)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await handle.wait()
    assert handle.alive()
    assert await handle.stop(10)


async def test_the_end_of_a_process_that_is_not_our_child_is_noticed_too(spawn: _Spawner) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); child.wait()"
    )
    _, line = spawn(code)
    handle = open_process(int(line))
    assert handle is not None
    handle.kill(signal.SIGKILL)
    async with asyncio.timeout(30):
        assert await handle.wait() is None
    handle.close()


async def test_stopping_kills_what_does_not_end_by_itself(spawn: _Spawner) -> None:
    handle, _ = spawn(_STUBBORN)
    async with asyncio.timeout(30):
        assert not await handle.stop(0.05)
    assert not handle.alive()
