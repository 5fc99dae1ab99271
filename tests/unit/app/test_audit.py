from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from imdsproxy.app.audit import Audit
from imdsproxy.config.policy import AuditSettings

LINE = b'{"number":1}\n'


@asynccontextmanager
async def serving(
    audit: Audit, path: Path, kept: Sequence[socket.socket] = ()
) -> AsyncIterator[None]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen()
    listener.setblocking(False)
    task = asyncio.get_running_loop().create_task(audit.serve(listener, kept))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        listener.close()


async def until(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def connect(path: Path) -> socket.socket:
    worker = socket.socket(socket.AF_UNIX)
    worker.connect(os.fspath(path))
    return worker


def into(path: Path) -> AuditSettings:
    return AuditSettings(mode="all", destination=os.fspath(path))


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


async def test_lines_of_several_workers_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    async with serving(Audit(lambda: into(path)), tmp_path / "s"):
        one, two = connect(tmp_path / "s"), connect(tmp_path / "s")
        one.send(LINE + LINE[:5])
        two.send(LINE[:3])
        await until(lambda: content(path) == LINE)
        two.send(LINE[3:])
        one.send(LINE[5:])
        await until(lambda: content(path) == LINE * 3)
        one.close()
        two.close()


async def test_what_was_sent_before_the_end_is_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    async with serving(Audit(lambda: into(path)), tmp_path / "s"):
        worker = connect(tmp_path / "s")
        worker.send(LINE)
        await until(lambda: content(path) == LINE)
        worker.send(LINE * 1000)
    assert content(path) == LINE * 1001
    with pytest.raises(BrokenPipeError):
        worker.send(LINE)
    worker.close()


async def test_the_destination_may_change_while_it_runs(tmp_path: Path) -> None:
    where = tmp_path / "one"
    async with serving(Audit(lambda: into(where)), tmp_path / "s"):
        worker = connect(tmp_path / "s")
        worker.send(LINE)
        await until(lambda: content(tmp_path / "one") == LINE)
        where = tmp_path / "two"
        worker.send(LINE)
        await until(lambda: content(tmp_path / "two") == LINE)
        worker.close()


async def test_a_place_that_cannot_be_written_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imdsproxy.app.audit._AGAIN_S", 0.05)
    path = tmp_path / "later" / "audit.log"
    audit = Audit(lambda: into(path))
    async with serving(audit, tmp_path / "s"):
        worker = connect(tmp_path / "s")
        worker.send(LINE)
        await until(lambda: audit.problem is not None)
        path.parent.mkdir()
        await until(lambda: content(path) == LINE)
        await until(lambda: audit.problem is None)
        worker.close()


async def test_lines_are_counted(tmp_path: Path) -> None:
    audit = Audit(lambda: into(tmp_path / "audit.log"))
    async with serving(audit, tmp_path / "s"):
        worker = connect(tmp_path / "s")
        worker.send(LINE * 3 + b"7 events dropped\x00\n" + LINE)
        await until(lambda: audit.written == 4)
        assert audit.left_out == 7
        worker.close()


async def test_a_place_that_cannot_be_written_is_told_before_anybody_asks(tmp_path: Path) -> None:
    settings = into(tmp_path / "nowhere" / "audit.log")
    audit = Audit(lambda: settings)
    async with serving(audit, tmp_path / "s"):
        worker = connect(tmp_path / "s")
        await until(lambda: audit.problem is not None)
        problem = audit.problem
        assert problem is not None
        assert (problem.field, "No such file" in problem.reason) == ("audit.destination", True)
        assert problem.hint == f"make the directory {tmp_path / 'nowhere'}"
        worker.close()


async def test_who_turns_the_log_off_has_no_problem_with_it(tmp_path: Path) -> None:
    said: list[Literal["all", "off"]] = ["all"]
    audit = Audit(
        lambda: AuditSettings(
            mode=said[-1], destination=os.fspath(tmp_path / "nowhere" / "audit.log")
        )
    )
    async with serving(audit, tmp_path / "s"):
        worker = connect(tmp_path / "s")
        await until(lambda: audit.problem is not None)
        said.append("off")
        await until(lambda: audit.problem is None)
        worker.close()


async def test_a_write_that_does_not_come_back_is_told_and_does_not_hold_up_the_end(
    tmp_path: Path,
) -> None:
    os.mkfifo(path := tmp_path / "audit.log")
    now = 100.0
    audit = Audit(lambda: into(path), clock=lambda: now)
    async with serving(audit, tmp_path / "s"):
        worker = connect(tmp_path / "s")
        worker.send(LINE)
        await asyncio.sleep(0)
        await until(lambda: audit._begun is not None)
        now = 107.0
        problem = audit.problem
        assert problem is not None
        assert "has not come back for 7 s" in problem.reason
    # Somebody reads, and the thread comes back.
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    await until(lambda: all(one.name != "audit" for one in threading.enumerate()))
    assert audit._sink is not None
    audit._sink.close()
    os.close(reader)
    worker.close()


async def test_what_was_kept_for_the_next_is_read_by_it_and_by_nobody_twice(tmp_path: Path) -> None:
    path, kept = tmp_path / "audit.log", list[socket.socket]()

    def keep(worker: socket.socket) -> bool:
        kept.append(worker.dup())
        return True

    async with serving(Audit(lambda: into(path), keep), tmp_path / "s"):
        worker = connect(tmp_path / "s")
        worker.send(LINE)
        await until(lambda: content(path) == LINE)
    worker.send(LINE * 2 + LINE[:5])
    (one,) = kept
    one.setblocking(False)
    (tmp_path / "s").unlink()
    audit = Audit(lambda: into(path), keep)
    async with serving(audit, tmp_path / "s", [one]):
        worker.send(LINE[5:])
        await until(lambda: content(path) == LINE * 4)
        worker.close()
        await until(lambda: one.fileno() < 0)
    assert len(kept) == 1


async def test_what_was_not_written_stays_for_the_next(tmp_path: Path) -> None:
    path, kept = tmp_path / "later" / "audit.log", list[socket.socket]()

    def keep(worker: socket.socket) -> bool:
        kept.append(worker.dup())
        return True

    audit = Audit(lambda: into(path), keep)
    async with serving(audit, tmp_path / "s"):
        worker = connect(tmp_path / "s")
        worker.send(LINE)
        await until(lambda: audit.problem is not None)
    assert kept[0].recv(4096) == LINE
    kept[0].close()
    worker.close()
