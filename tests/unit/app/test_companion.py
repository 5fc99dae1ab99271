from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from imdsproxy.app.companion import Companion
from imdsproxy.errors import HostRefused
from imdsproxy.serving.pidfile import DocumentProcesses

_PID = 2**22 + 1
"""No process can have it: what is taken for hung is killed."""


@dataclass(slots=True)
class Launcher:
    """A document server that is a number, and what was done to it."""

    pid: int | None = None
    done: list[str] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        self.done.append("start")
        self.pid = _PID

    async def wait(self, pid: int) -> None:
        await self.ended.wait()
        self.ended.clear()
        self.done.append(f"{pid} ended")

    async def stop(self) -> None:
        self.done.append("stop")
        self.pid = None


def _companion(launcher: Launcher, *, needed: bool = True) -> Companion:
    return Companion(launcher, lambda: DocumentProcesses(launcher.pid, (8,)), needed=needed)


async def test_what_is_not_there_is_started_and_what_is_there_is_adopted() -> None:
    launcher = Launcher()
    assert await _companion(launcher).ensure() == _PID
    assert await _companion(launcher).ensure() == _PID
    assert launcher.done == ["start"]


async def test_what_has_ended_is_started_again() -> None:
    launcher = Launcher()
    companion = _companion(launcher)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(companion.run())
        async with asyncio.timeout(30):
            while not launcher.done:
                await asyncio.sleep(0)
            launcher.pid = None
            launcher.ended.set()
            while companion.restarts == 0:
                await asyncio.sleep(0)
        task.cancel()
    assert launcher.done == ["start", f"{_PID} ended", "start"]


async def test_its_workers_restarts_are_counted_also_when_it_begins_to_count_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("imdsproxy.app.companion._LOOK_EVERY_S", 0)
    launcher, counts = Launcher(pid=_PID), iter([1, 1, 1, 3, 3, 0, 1])
    seen = DocumentProcesses(_PID, (8,))

    def read() -> DocumentProcesses:
        nonlocal seen
        seen = replace(seen, restarts=next(counts, seen.restarts))
        return seen

    companion = Companion(launcher, read)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(companion.run())
        async with asyncio.timeout(30):
            while companion.restarts < 3:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        task.cancel()
    assert companion.restarts == 3
    assert launcher.done == []


async def test_where_it_is_not_needed_it_does_not_run() -> None:
    launcher = Launcher()
    companion = _companion(launcher, needed=False)
    assert await companion.ensure() is None
    await companion.run()
    assert launcher.done == []


async def test_where_it_is_not_needed_any_more_it_is_ended() -> None:
    launcher = Launcher(pid=_PID)
    await _companion(launcher, needed=False).ensure()
    assert launcher.done == ["stop"]


async def test_a_failure_to_start_is_told() -> None:
    class Refusing(Launcher):
        async def start(self) -> None:
            raise HostRefused("no")

    with pytest.raises(HostRefused, match="no"):
        await _companion(Refusing()).ensure()
