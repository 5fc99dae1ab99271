from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from imdsproxy.app import companion
from imdsproxy.app.companion import Companion
from imdsproxy.errors import HostRefused
from imdsproxy.host import process
from imdsproxy.host.process import ProcessHandle
from imdsproxy.serving.pidfile import DocumentProcesses

_PID = 2**22 + 1
"""No process can have it: what is taken for hung is killed."""


class World:
    """A document server that is a number, and what was done to it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pid: int | None = None
        self.done: list[str] = []
        self.ended = asyncio.Event()
        self.counts: Iterator[int] = iter(())
        self.refuses = False
        self.companion = Companion(Path("pid"), Path("log"), (), {})
        for name in ("read_pids", "signal_all"):
            patch.setattr(companion, name, getattr(self, name))
        for name in ("spawn_logged", "wait_gone"):
            patch.setattr(process, name, getattr(self, name))
        patch.setattr(companion, "_LOOK_EVERY_S", 0)

    def read_pids(self, _: Path) -> DocumentProcesses:
        return DocumentProcesses(self.pid, (8,) if self.pid else (), next(self.counts, 0))

    def spawn_logged(self, *_: object) -> tuple[ProcessHandle, int]:
        self.done.append("start")
        if self.refuses:
            raise HostRefused("no")
        self.pid = _PID
        return ProcessHandle(_PID, -1), 0

    async def wait_gone(self, pid: int) -> None:
        await self.ended.wait()
        self.ended.clear()
        self.done.append(f"{pid} ended")

    def signal_all(self, *_: object) -> None:
        self.done.append("stop")
        self.pid = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            task = group.create_task(self.companion.run())
            yield
            task.cancel()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def test_what_is_not_there_is_started_and_what_is_there_is_adopted(world: World) -> None:
    assert await world.companion.ensure() == await world.companion.ensure() == _PID
    assert world.done == ["start"]
    world.pid, world.refuses = None, True
    with pytest.raises(HostRefused, match="no"):
        await world.companion.ensure()


async def test_what_has_ended_is_started_again(world: World) -> None:
    async with world.running():
        while not world.done:
            await asyncio.sleep(0)
        world.pid, world.refuses = None, True
        world.ended.set()
        while world.companion.failure is None:
            await asyncio.sleep(0)
        assert world.companion.restarts == 0
        world.refuses = False
        while not world.companion.restarts:
            await asyncio.sleep(0)
    assert world.companion.restarts == 1
    assert world.done[:3] == ["start", f"{_PID} ended", "start"]


async def test_its_workers_restarts_are_counted_also_when_it_begins_to_count_anew(
    world: World,
) -> None:
    seen, world.pid = iter([1, 1, 1, 3, 3, 0]), _PID
    world.counts = (next(seen, 1) for _ in iter(int, 1))
    async with world.running():
        while world.companion.restarts < 3:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert (world.done, world.companion.restarts) == ([], 3)


async def test_where_it_is_not_needed_it_does_not_run_and_is_ended(world: World) -> None:
    world.pid, world.companion.needed = _PID, False
    assert await world.companion.ensure() is None
    await world.companion.run()
    assert world.done == ["stop"]
