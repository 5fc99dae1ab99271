from __future__ import annotations

import errno
import json
import os
import socket
import stat
from pathlib import Path

import pytest

from imdsproxy.app.audit import FileSink, JournalSink, Written

LINE = b'{"number":1}\n'


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


def test_the_journal_tells_how_many_lines_it_does_not_get(tmp_path: Path) -> None:
    journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    journal.bind(os.fspath(tmp_path / "socket"))
    sink = JournalSink(tmp_path / "socket", lambda: 100.0, per_second=2)
    assert sink.write(LINE * 5) == Written(left_out=3)
    sink.close()
    journal.close()


def test_lines_that_the_journal_has_come_no_second_time(tmp_path: Path) -> None:
    journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    journal.bind(os.fspath(tmp_path / "socket"))
    seen = 0

    def second() -> float:
        # It goes away after the first line.
        nonlocal seen
        seen += 1
        if seen > 1:
            journal.close()
        return 100.0

    sink = JournalSink(tmp_path / "socket", second)
    assert sink.write(LINE * 3) == Written(LINE * 2)
    with pytest.raises(ConnectionRefusedError):
        sink.write(LINE)
    sink.close()


def test_a_journal_that_is_not_there_is_found_before_there_is_a_line(tmp_path: Path) -> None:
    sink = JournalSink(tmp_path / "socket")
    with pytest.raises(FileNotFoundError) as found:
        sink.write(b"")
    assert "systemd-journald" in sink.hint(found.value)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free space for /var/log/x"),
        (errno.ENOENT, "make the directory /var/log/x"),
        (errno.ELOOP, "name the file itself"),
        (errno.EACCES, "have /var/log/x/audit.log be a file that root may write"),
    ],
)
def test_each_failure_of_a_file_says_what_to_do(number: int, words: str) -> None:
    assert FileSink(Path("/var/log/x/audit.log")).hint(OSError(number, "")).startswith(words)
