"""Logs of other processes, copied to a container's."""

import io
from pathlib import Path

from imdsproxy.host.files import limit_log
from imdsproxy.host.log_copies import LogCopies


def test_whole_lines_that_come_are_copied_once_and_what_was_there_before_is_not(
    tmp_path: Path,
) -> None:
    log, sink = tmp_path / "haproxy.log", io.BytesIO()
    log.write_bytes(b"of the container before\n")
    copies = LogCopies((log, tmp_path / "documents.log"), sink)

    with log.open("ab", buffering=0) as file:
        file.write(b"one\ntw")
        copies.copy()
        assert sink.getvalue() == b"one\n"
        file.write(b"o\n")
    (tmp_path / "documents.log").write_bytes(b"three\n")
    copies.copy()
    copies.copy()
    assert sink.getvalue() == b"one\ntwo\nthree\n"


def test_a_log_that_begins_anew_is_copied_from_its_beginning(tmp_path: Path) -> None:
    log, sink = tmp_path / "haproxy.log", io.BytesIO()
    copies = LogCopies((log,), sink)
    log.write_bytes(b"x" * 99 + b"\n")
    copies.copy()
    limit_log(log, limit=10)
    with log.open("ab") as file:
        file.write(b"new\n")
    copies.copy()
    assert sink.getvalue().endswith(b"x\nnew\n")
