import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.errors import HostRefused
from imdsproxy.host.process import (
    Doubt,
    ProcessHandle,
    ProcessStat,
    command_name,
    open_process,
    read_arguments,
    read_rests,
    read_stat,
    spawn_logged,
)
from support.lab import until

_SLEEP = "import time; print('up', flush=True); time.sleep(600)"
_STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True); time.sleep(600)"
)


class _Spawner:
    def __init__(self, log: Path) -> None:
        self.handles: list[ProcessHandle] = []
        self.log = log

    def __call__(self, code: str, *arguments: str) -> tuple[ProcessHandle, bytes]:
        """Start Python code; its handle and the first line of what it printed."""
        command = (sys.executable, "-c", code, *arguments)
        handle, offset = spawn_logged(command, self.log, {"WORD": "one"})
        self.handles.append(handle)
        until(lambda: b"\n" in self.log.read_bytes()[offset:], what="a line")
        return handle, self.log.read_bytes()[offset:].splitlines(keepends=True)[0]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[_Spawner]:
    spawner = _Spawner(tmp_path / "log")
    yield spawner
    for handle in spawner.handles:
        if handle._descriptor >= 0:
            handle.kill(signal.SIGKILL)
            os.waitid(os.P_PID, handle.pid, os.WEXITED) if handle.alive() else None
            handle.close()


def test_a_detached_process_has_a_session_and_an_environment_of_its_own(spawn: _Spawner) -> None:
    code = "import os; print(os.getsid(0) == os.getpid(), os.environ['WORD'], os.getcwd())"
    _, line = spawn(code + "; import sys; sys.stdout.flush()")
    assert line == b"True one /\n"


def test_a_program_that_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(HostRefused, match=r"cannot start /no/such: .*ENOENT"):
        spawn_logged(("/no/such",), tmp_path / "log", {})


async def test_waiting_gives_the_exit_status_to_everybody_who_waits(spawn: _Spawner) -> None:
    handle, _ = spawn("print('up', flush=True); raise SystemExit(7)")
    async with asyncio.timeout(30):
        assert list(await asyncio.gather(handle.wait(), handle.wait())) == [7, 7]
    assert await handle.wait() == 7
    assert not handle.alive()


async def test_waiting_can_be_given_up_and_gives_a_signal_as_a_negative_number(
    spawn: _Spawner,
) -> None:
    handle, _ = spawn(_SLEEP)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await handle.wait()
    assert handle.alive()
    assert handle.kill(signal.SIGKILL)
    async with asyncio.timeout(30):
        assert await handle.wait() == -signal.SIGKILL
    assert await handle.stop(10)
    # There is no process any more.
    assert (read_stat(handle.pid), open_process(handle.pid)) == (None, None)
    assert (handle.alive(), handle.kill()) == (False, False)


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
        pytest.param([_stat("R", 5)] * 7, False, id="waits for a processor"),
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
    assert not _after([_stat("S", 5), _stat("R", 6)]).after_silence(8, _stat("S", 5)).hung


@pytest.mark.parametrize("name", ["haproxy", "a b) (c", ") T 1 1"])
def test_a_process_is_read_whatever_its_name_is(tmp_path: Path, name: str) -> None:
    process = tmp_path / "12"
    process.mkdir()
    stat = f"12 ({name}) S 1 12 12 0 -1 4194560 1 0 0 0 30 12 0 0 20 0 1 0 99 1 1"
    (process / "stat").write_text(stat)
    (process / "cmdline").write_bytes(b"a\0b c\0")
    status = "Name:\tx\nvoluntary_ctxt_switches:\t345\nnonvoluntary_ctxt_switches:\t6\n"
    (process / "status").write_text(status)
    assert read_stat(12, tmp_path) == _stat("S", 42)
    assert read_rests(12, tmp_path) == 345
    assert read_arguments(12, tmp_path) == ("a", "b c")
    (process / "comm").write_bytes(b"e\xff\n")
    assert command_name(12, tmp_path) == "e\ufffd"
    (process / "stat").write_text(stat.replace(") S ", ") Z "))
    assert read_stat(12, tmp_path) is None
    assert (read_stat(13, tmp_path), read_rests(13, tmp_path)) == (None, None)


_PROGRAM: Final = """
import resource
from imdsproxy.host.process import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
raise_descriptor_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize("soft", [256, 512])
def test_the_soft_limit_is_raised_as_far_as_the_hard_one_allows(soft: int) -> None:
    program = _PROGRAM.format(soft=soft, hard=512)
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "512 512\n"
