from __future__ import annotations

import io
import json
import logging
from typing import TYPE_CHECKING

import pytest
import structlog

from imdsproxy.host.files import limit_log
from imdsproxy.host.logs import LogCopies, LogFormat, LogLevel, open_logging
from support.hand_clock import HandClock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def _open(
    level: LogLevel = "info",
    form: LogFormat = "json",
    *,
    terminal: bool = False,
    colours: bool = False,
    journal: bool = False,
) -> io.StringIO:
    stream = _Terminal() if terminal else io.StringIO()
    open_logging(level, form, stream, clock=HandClock(), colours=colours, journal=journal)
    return stream


def _lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_where_there_is_no_terminal() -> None:
    stream = _open(form="auto")
    structlog.get_logger().info("network served", network="n1", took_s=0.5)
    (line,) = _lines(stream)
    assert line.pop("time") == HandClock().now().isoformat(timespec="milliseconds").replace(
        "+00:00", "Z"
    )
    assert line == {"message": "network served", "network": "n1", "took_s": 0.5, "level": "info"}


@pytest.mark.parametrize("colours", [False, True])
def test_a_line_is_text_on_a_terminal_with_colours_where_asked(*, colours: bool) -> None:
    stream = _open(form="auto", terminal=True, colours=colours)
    structlog.get_logger().warning("listener not served", network="n1")
    line = stream.getvalue()
    assert "listener not served" in line
    assert ("network=n1" in line) is not colours
    assert ("\x1b[" in line) is colours


def test_a_level_and_libraries_are_as_logging_was_opened_last() -> None:
    _open()
    stream = _open("warning")
    structlog.get_logger().info("unheard")
    logging.getLogger("uvicorn.error").error("socket %s", "gone")
    logging.getLogger("uvicorn.error").info("chatter")
    assert [(line["message"], line["logger"], line["level"]) for line in _lines(stream)] == [
        ("socket gone", "uvicorn.error", "error")
    ]


def test_an_exception_is_part_of_the_line_and_foreign_text_is_clipped() -> None:
    stream = _open()
    structlog.get_logger().error("task ended", exc_info=ValueError("reason"), output="x" * 100_000)
    (line,) = _lines(stream)
    assert "ValueError: reason" in str(line["exception"])
    assert len(stream.getvalue()) < 10_000


@pytest.mark.parametrize(
    ("method", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3)]
)
def test_each_line_for_the_journal_begins_with_its_priority(method: str, priority: int) -> None:
    forms: tuple[LogFormat, ...] = ("json", "text")
    for form in forms:
        stream = _open("debug", form, journal=True)
        getattr(structlog.get_logger(), method)("x", exc_info=ValueError("reason"))
        lines = stream.getvalue().splitlines()
        assert (len(lines) > 1) is (form == "text")
        assert all(line.startswith(f"<{priority}>") for line in lines)


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
