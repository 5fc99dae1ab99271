from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from imdsproxy.app.audit import Audit, FileSink, JournalSink, tell_left_out

LINE = b'{"number":1}\n'


@asynccontextmanager
async def serving(audit: Audit, path: Path) -> AsyncIterator[None]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    listener.listen()
    listener.setblocking(False)
    task = asyncio.get_running_loop().create_task(audit.serve(listener))
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


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def test_a_file_is_0640_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        FileSink(path := tmp_path / "audit.log").write(LINE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_file_that_was_renamed_is_begun_anew(tmp_path: Path) -> None:
    sink = FileSink(path := tmp_path / "audit.log")
    sink.write(LINE)
    path.rename(old := tmp_path / "audit.log.1")
    sink.write(LINE)
    assert (content(old), content(path)) == (LINE, LINE)
    path.unlink()
    sink.write(LINE)
    assert content(path) == LINE
    sink.close()


def test_a_file_that_logrotate_made_keeps_its_mode(tmp_path: Path) -> None:
    sink = FileSink(path := tmp_path / "audit.log")
    sink.write(LINE)
    path.unlink()
    path.write_bytes(b"")
    path.chmod(0o600)
    sink.write(LINE)
    assert (content(path), stat.S_IMODE(path.stat().st_mode)) == (LINE, 0o600)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "audit.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        FileSink(tmp_path / "audit.log").write(LINE)
    assert not (tmp_path / "elsewhere").exists()


def test_the_journal_gets_a_line_each_and_no_more_than_it_takes(tmp_path: Path) -> None:
    journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    journal.bind(os.fspath(tmp_path / "socket"))
    journal.settimeout(5)
    now = 100.0
    sink = JournalSink(tmp_path / "socket", lambda: now, per_second=2)
    sink.write(LINE * 5)
    now = 101.2
    sink.write(LINE)
    told = [journal.recv(4096) for _ in range(4)]
    entry = b"PRIORITY=6\nSYSLOG_IDENTIFIER=imdsproxy-audit\nMESSAGE=" + LINE
    assert (told[0], told[1], told[3]) == (entry, entry, entry)
    assert json.loads(told[2].partition(b"MESSAGE=")[2])["left_out"] == 3
    sink.close()
    journal.close()


def test_what_haproxy_has_left_out_is_told_and_what_it_says_of_itself_is_not() -> None:
    said = (
        LINE + b"1234 events dropped\x00\n1 event dropped\x00\nProxy guests stopped (x).\n" + LINE
    )
    one, many, single, other = map(json.loads, tell_left_out(said).splitlines())
    assert (one["number"], many["left_out"], single["left_out"], other["number"]) == (1, 1234, 1, 1)


async def test_lines_of_several_workers_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    async with serving(Audit(lambda: os.fspath(path)), tmp_path / "s"):
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
    async with serving(Audit(lambda: os.fspath(path)), tmp_path / "s"):
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
    async with serving(Audit(lambda: os.fspath(where)), tmp_path / "s"):
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
    audit = Audit(lambda: os.fspath(path))
    async with serving(audit, tmp_path / "s"):
        worker = connect(tmp_path / "s")
        worker.send(LINE)
        await until(lambda: audit.failure is not None)
        path.parent.mkdir()
        await until(lambda: content(path) == LINE)
        await until(lambda: audit.failure is None)
        worker.close()
