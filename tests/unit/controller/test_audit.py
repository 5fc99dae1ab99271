"""The audit log's writer: what workers send is written whole and once, or kept and reported."""

import asyncio
import contextlib
import errno
import json
import os
import socket
import stat
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from imdsproxy.config.policy import AuditSettings
from imdsproxy.controller import audit as module
from imdsproxy.controller.audit import Audit, Journal, advise, append_lines
from support.tasks import background, until

LINE = b'{"number":1}\n'
ENTRY = b"PRIORITY=6\nSYSLOG_IDENTIFIER=imdsproxy-audit\nMESSAGE="
_RULES = Path(__file__).parents[3] / "packaging" / "logrotate" / "imdsproxy"
_PLACE = "/var/log/imdsproxy/audit.log"


@asynccontextmanager
async def serving(
    audit: Audit, path: Path, kept: Sequence[socket.socket] = ()
) -> AsyncIterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        listener.setblocking(False)
        async with background(audit.serve(listener, kept)):
            yield
        await asyncio.to_thread(path.unlink)


def connect(path: Path) -> socket.socket:
    worker = socket.socket(socket.AF_UNIX)
    worker.connect(os.fspath(path))
    return worker


def into(path: Path) -> AuditSettings:
    return AuditSettings(mode="all", destination=os.fspath(path))


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


async def test_lines_of_several_workers_are_whole_and_counted_wherever_they_are_to_go_now(
    tmp_path: Path,
) -> None:
    path = tmp_path / "one"
    audit = Audit(lambda: into(path))
    with contextlib.ExitStack() as stack:
        async with serving(audit, tmp_path / "s"):
            one, two = (stack.enter_context(connect(tmp_path / "s")) for _ in range(2))
            one.send(LINE + LINE[:5])
            two.send(LINE[:3])
            await until(lambda: content(path) == LINE)
            two.send(LINE[3:])
            one.send(LINE[5:] + b"7 events dropped\x00\n")
            await until(lambda: (audit.written, audit.lost) == (3, 7))
            assert content(path).count(LINE) == 3
            path = tmp_path / "two"
            one.send(LINE * 1000)
        # What was sent before the end is written, and no more is taken.
        assert content(path) == LINE * 1000
        with pytest.raises(BrokenPipeError):
            one.send(LINE)


async def test_a_journal_that_does_not_run_is_tried_again_and_the_file_of_before_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.05)
    settings = into(tmp_path / "one")
    audit = Audit(lambda: settings, journal=Journal(tmp_path / "socket"))
    async with serving(audit, tmp_path / "s"):
        with (
            connect(tmp_path / "s") as worker,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal,
        ):
            worker.send(LINE)
            await until(lambda: content(tmp_path / "one") == LINE)
            settings = AuditSettings(mode="all", destination="journal")
            worker.send(LINE * 2)
            await until(lambda: audit.problem is not None)
            journal.bind(os.fspath(tmp_path / "socket"))
            await until(lambda: audit.written == 3)
            assert journal.recv(4096) == ENTRY + LINE
    assert content(tmp_path / "one") == LINE


async def test_a_place_that_cannot_be_written_is_reported_before_a_line_comes_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.05)
    path = tmp_path / "later" / "audit.log"
    settings = into(path)
    audit = Audit(lambda: settings)
    async with serving(audit, tmp_path / "s"):
        with connect(tmp_path / "s") as worker:
            await until(lambda: audit.problem is not None)
            problem = audit.problem
            assert problem is not None
            assert (problem.field, "No such file" in problem.reason) == ("audit.destination", True)
            assert problem.hint == f"make the directory {path.parent}"
            settings = settings.model_copy(update={"mode": "off"})
            assert audit.problem is None, "it is off"
            settings = into(path)
            worker.send(LINE)
            path.parent.mkdir()
            await until(lambda: content(path) == LINE and audit.problem is None)


async def test_a_write_that_does_not_come_back_is_reported_and_does_not_delay_the_end(
    tmp_path: Path,
) -> None:
    os.mkfifo(path := tmp_path / "audit.log")
    now = 100.0
    audit = Audit(lambda: into(path), clock=lambda: now)
    async with serving(audit, tmp_path / "s"):
        with connect(tmp_path / "s") as worker:
            worker.send(LINE)
            await until(lambda: audit._begun is not None)
            now = 107.0
            problem = audit.problem
            assert problem is not None
            assert "has not come back for 7 s" in problem.reason
    # With a reader the thread comes back.
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    await until(lambda: all(one.name != "audit" for one in threading.enumerate()))
    os.close(reader)


async def test_what_was_not_written_is_kept_for_the_next_which_writes_it_once(
    tmp_path: Path,
) -> None:
    path, kept = tmp_path / "later" / "audit.log", list[socket.socket]()

    def keep(worker: socket.socket) -> bool:
        kept.append(worker.dup())
        return True

    failing = Audit(lambda: into(path), keep)
    async with serving(failing, tmp_path / "s"):
        worker = connect(tmp_path / "s")
        worker.send(LINE)
        await until(lambda: failing.problem is not None)
    path.parent.mkdir()
    for written in (2, 5):
        # What the service manager hands on; its own stays open.
        mine = kept[0].dup()
        mine.setblocking(False)
        async with serving(Audit(lambda: into(path), keep), tmp_path / "s", [mine]):
            worker.send(LINE)
            await until(lambda: content(path) == LINE * written)  # noqa: B023 - called at once
        worker.send(LINE * 2)
    worker.close()
    assert len(kept) == 1
    with kept.pop() as left:
        assert left.recv(4096) == LINE * 2


def test_a_file_that_was_removed_is_begun_anew_one_of_logrotate_keeps_its_mode_and_a_link_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "audit.log"
    append_lines(path, bytearray(LINE))
    assert (content(path), stat.S_IMODE(path.stat().st_mode)) == (LINE, 0o640)
    path.unlink()
    path.touch(0o600)
    append_lines(path, bytearray(LINE))
    assert (content(path), stat.S_IMODE(path.stat().st_mode)) == (LINE, 0o600)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        append_lines(path, bytearray(LINE))
    assert not (tmp_path / "elsewhere").exists()


def test_of_lines_that_a_full_disk_takes_in_part_none_is_left_and_all_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.log"
    append_lines(path, bytearray(LINE))
    write, room = os.write, 5

    def until_full(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, data[:room])
        room -= written
        return written

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", until_full)
        with pytest.raises(OSError, match="No space left"):
            append_lines(path, bytearray(LINE * 2))
    assert content(path) == LINE
    append_lines(path, bytearray(LINE * 2))
    assert content(path) == LINE * 3


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.bind(os.fspath(tmp_path / "socket"))
        found.settimeout(5)
        yield found


async def test_the_journal_gets_a_line_each_and_what_it_has_no_room_for_is_counted(
    journal: socket.socket, tmp_path: Path
) -> None:
    now = 100.0
    sink = Journal(tmp_path / "socket", lambda: now, per_second=2)
    audit = Audit(lambda: AuditSettings(mode="all", destination="journal"), journal=sink)
    async with serving(audit, tmp_path / "s"):
        with connect(tmp_path / "s") as worker:
            worker.send(LINE * 5)
            await until(lambda: (audit.written, audit.lost) == (2, 3))
            now = 101.2
            worker.send(LINE)
            await until(lambda: audit.written == 3)
    first, second, lost, last = (journal.recv(4096) for _ in range(4))
    assert {first, second, last} == {ENTRY + LINE}
    assert json.loads(lost.removeprefix(ENTRY))["lost"] == 3


def test_lines_that_the_journal_has_come_no_second_time(
    journal: socket.socket, tmp_path: Path
) -> None:
    seen = 0

    def second() -> float:
        # It goes away after the first line.
        nonlocal seen
        seen += 1
        if seen > 1:
            journal.close()
        return 100.0

    sink = Journal(tmp_path / "socket", second)
    lines = bytearray(LINE * 3)
    for left in (lines, bytearray()):
        with pytest.raises(ConnectionRefusedError):  # also before there is a line
            sink.write(left)
    assert lines == LINE * 2


def test_each_failure_says_what_to_do() -> None:
    for number, words in (
        (errno.ENOSPC, "free space for /var/log/x"),
        (errno.ENOENT, "make the directory /var/log/x"),
        (errno.ELOOP, "name the file itself"),
        (errno.EACCES, "have /var/log/x/audit.log be a file that root may write"),
    ):
        assert advise("/var/log/x/audit.log", OSError(number, "")).startswith(words)
    assert "systemd-journald" in advise("journal", OSError(errno.ENOENT, ""))


def _line(number: int) -> bytes:
    return b'{"number":%d}\n' % number


def test_no_line_is_lost_or_written_twice_when_the_file_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    rules = tmp_path / "rules"
    packaged = _RULES.read_text()
    assert packaged.count(_PLACE) == 1
    rules.write_text(packaged.replace(_PLACE, os.fspath(path)))
    rules.chmod(0o644)
    for number in range(3):
        append_lines(path, bytearray(_line(number)))
        state = f"--state={tmp_path / 'state'}"
        subprocess.run(["/usr/sbin/logrotate", "--force", state, rules], check=True)
        assert not path.exists()
    append_lines(path, bytearray(_line(3)))
    names = ("audit.log", "audit.log.1", "audit.log.2.gz", "audit.log.3.gz")
    assert {one.name for one in tmp_path.glob("audit.log*")} == set(names)
    text = b"".join(
        subprocess.run(["/bin/zcat", "-f", tmp_path / name], check=True, capture_output=True).stdout
        for name in names
    )
    assert text == b"".join(map(_line, (3, 2, 1, 0)))
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names} == {0o640}
