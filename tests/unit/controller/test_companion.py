"""The document server beside the controller: started, adopted, watched, and when readiness believes in documents."""

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest
from structlog.testing import capture_logs

from imdsproxy.controller import companion
from imdsproxy.controller.companion import Companion, DocumentProbe
from imdsproxy.documents.compiled import compiled_path
from imdsproxy.documents.pidfile import DocumentProcesses
from imdsproxy.documents.store import DiskFiles, PasswordStore
from imdsproxy.errors import HostRefused, Problem
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.host import process
from imdsproxy.host.process import ProcessHandle
from imdsproxy.model.entities import Instance
from imdsproxy.model.wire import PROBE_INSTANCE, PROBE_PATH
from support.tasks import background, until

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
    async with background(world.companion.run()):
        await until(lambda: world.done)
        world.pid, world.refuses = None, True
        world.ended.set()
        await until(lambda: world.companion.failure)
        assert world.companion.restarts == 0
        world.refuses = False
        await until(lambda: world.companion.restarts)
    assert world.companion.restarts == 1
    assert world.done[:3] == ["start", f"{_PID} ended", "start"]


async def test_its_workers_restarts_are_counted_also_when_it_begins_to_count_anew(
    world: World,
) -> None:
    seen, world.pid = iter([1, 1, 1, 3, 3, 0]), _PID
    world.counts = (next(seen, 1) for _ in iter(int, 1))
    async with background(world.companion.run()):
        await until(lambda: world.companion.restarts >= 3)
        await asyncio.sleep(0)
    assert (world.done, world.companion.restarts) == ([], 3)


async def test_where_it_is_not_needed_it_does_not_run_and_no_document_is_asked_for(
    world: World, tmp_path: Path
) -> None:
    world.pid, world.companion.needed = _PID, False
    assert await world.companion.ensure() is None
    await world.companion.run()
    assert world.done == ["stop"]
    probe = _probe(tmp_path, needed=False)
    await probe.run()
    await probe.ask()
    assert probe.problem is None


# Documents

_GOOD = (200, Instance(PROBE_INSTANCE, "probe", "probe").ec2_id.encode())
_BUSY = (503, b"")


class _Haproxy:
    full: Problem | None = None

    def __init__(self, answers: Iterable[tuple[int | None, bytes]]) -> None:
        self.answers = list(answers)

    async def fetch(self, path: str, deadline_s: float) -> tuple[int | None, bytes]:
        assert (path, deadline_s) == (PROBE_PATH, 3.0)
        return self.answers.pop(0)


def _probe(
    directory: Path, *answers: tuple[int | None, bytes], needed: bool = True
) -> DocumentProbe:
    files = DiskFiles(directory, PasswordStore(directory / "passwords"), None)
    beside = Companion(directory / "pid", directory / "log", (), {}, needed=needed)
    return DocumentProbe(beside, cast("Haproxy", _Haproxy(answers)), files, lambda: None)


async def test_a_full_haproxy_changes_nothing(tmp_path: Path) -> None:
    for before in (_GOOD, _BUSY):
        probe = _probe(tmp_path, before, *[(None, b"")] * 3)
        await probe.ask()
        problem = probe.problem
        probe.haproxy.full = Problem("haproxy.maxconn", "full")
        with capture_logs() as logs:
            for _ in range(3):
                await probe.ask()
        assert probe.problem == problem
        assert logs == []


@pytest.mark.parametrize("bad", [_BUSY, (None, b""), (200, b"ok"), (200, b"i-another")])
async def test_one_failure_is_forgiven_after_good_answers_and_the_second_is_a_problem(
    tmp_path: Path, bad: tuple[int | None, bytes]
) -> None:
    probe = _probe(tmp_path, _GOOD, bad, _GOOD, bad, bad, bad, _GOOD)
    assert "has not requested a document yet" in str(probe.problem)
    problems = []
    with capture_logs() as logs:
        for _ in range(7):
            await probe.ask()
            problems.append(probe.problem is not None)
    assert problems == [False, False, False, False, True, True, False]
    assert [one["event"] for one in logs] == ["no documents", "documents are answered again"]


async def test_a_first_failure_is_a_problem_at_once_and_names_the_closed_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companion, "find_closed", lambda _account, _path: Path("/root"))
    probe = _probe(tmp_path, _BUSY)
    await probe.ask()
    assert "cannot enter /root" in str(probe.problem)


async def test_a_record_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / compiled_path(PROBE_INSTANCE)).mkdir(parents=True)
    probe = _probe(tmp_path)
    await probe.ask()
    assert "cannot write" in str(probe.problem)
