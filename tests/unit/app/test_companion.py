from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from imdsproxy.app.companion import Companion
from imdsproxy.errors import HostRefused
from imdsproxy.host.process import ProcessHandle
from imdsproxy.serving.pidfile import DocumentProcesses

_PID = 2**22 + 1
"""No process can have it: what is taken for hung is killed."""


class Rig(Companion):
    """A document server that is a number, and what was done to it."""

    __slots__ = ("counts", "done", "ended", "pid", "refuses")

    def __init__(self, pid: int | None = None, *, needed: bool = True) -> None:
        super().__init__(Path("pid"), Path("log"), (), {}, needed=needed)
        self.pid = pid
        self.done: list[str] = []
        self.ended = asyncio.Event()
        self.counts: Iterator[int] = iter(())
        self.refuses = False

    def read(self) -> DocumentProcesses:
        return DocumentProcesses(self.pid, (8,), next(self.counts, 0))

    async def stop(self) -> None:
        self.done.append("stop")
        self.pid = None


@pytest.fixture(autouse=True)
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[Rig]:
    """Whom a spawned document server is of: the last rig in the list."""
    rigs: list[Rig] = []

    def spawn(*_: object) -> tuple[ProcessHandle, int]:
        rigs[-1].done.append("start")
        if rigs[-1].refuses:
            raise HostRefused("no")
        rigs[-1].pid = _PID
        return ProcessHandle(_PID, -1), 0

    async def wait(pid: int) -> None:
        rig = rigs[-1]
        await rig.ended.wait()
        rig.ended.clear()
        rig.done.append(f"{pid} ended")

    monkeypatch.setattr("imdsproxy.app.companion.wait_gone", wait)
    monkeypatch.setattr("imdsproxy.app.companion.spawn_logged", spawn)
    monkeypatch.setattr("imdsproxy.app.companion._LOOK_EVERY_S", 0)
    return rigs


@contextlib.asynccontextmanager
async def _running(rig: Rig) -> AsyncIterator[None]:
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        task = group.create_task(rig.run())
        yield
        task.cancel()


async def test_what_is_not_there_is_started_and_what_is_there_is_adopted(
    spawned: list[Rig],
) -> None:
    rig = Rig()
    spawned.append(rig)
    assert await rig.ensure() == await rig.ensure() == _PID
    assert rig.done == ["start"]
    rig.pid, rig.refuses = None, True
    with pytest.raises(HostRefused, match="no"):
        await rig.ensure()


async def test_what_has_ended_is_started_again(spawned: list[Rig]) -> None:
    rig = Rig()
    spawned.append(rig)
    async with _running(rig):
        while not rig.done:
            await asyncio.sleep(0)
        rig.pid = None
        rig.ended.set()
        while len(rig.done) < 3:
            await asyncio.sleep(0)
    assert (rig.done, rig.restarts) == (["start", f"{_PID} ended", "start"], 1)


async def test_its_workers_restarts_are_counted_also_when_it_begins_to_count_anew(
    spawned: list[Rig],
) -> None:
    rig, seen = Rig(_PID), iter([1, 1, 1, 3, 3, 0])
    spawned.append(rig)
    rig.counts = (next(seen, 1) for _ in iter(int, 1))
    async with _running(rig):
        while rig.restarts < 3:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert rig.restarts == 3
    assert rig.done == []


async def test_where_it_is_not_needed_it_does_not_run_and_is_ended() -> None:
    rig = Rig(_PID, needed=False)
    assert await rig.ensure() is None
    await rig.run()
    assert rig.done == ["stop"]
