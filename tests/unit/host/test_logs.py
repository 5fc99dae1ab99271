from __future__ import annotations

import io
import json
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
import structlog

from imdsproxy.host.logs import open_logging

if TYPE_CHECKING:
    from collections.abc import Iterator


class _FixedClock:
    def monotonic(self) -> float:
        return 0.0

    def now(self) -> datetime:
        return datetime(2026, 1, 2, 3, 4, 5, 678900, tzinfo=UTC)


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


def test_a_line_is_json_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    open_logging("info", "auto", stream, clock=_FixedClock())

    structlog.get_logger().info("network served", network="n1", took_s=0.5)

    assert json.loads(stream.getvalue()) == {
        "message": "network served",
        "network": "n1",
        "took_s": 0.5,
        "level": "info",
        "time": "2026-01-02T03:04:05.678Z",
    }


def test_a_line_is_text_on_a_terminal_without_colours_unless_asked() -> None:
    stream = _Terminal()
    open_logging("info", "auto", stream, clock=_FixedClock())

    structlog.get_logger().warning("listener left out", network="n1")

    line = stream.getvalue()
    assert "listener left out" in line
    assert "network=n1" in line
    assert "\x1b[" not in line


def test_colours_are_written_when_asked_for() -> None:
    stream = _Terminal()
    open_logging("info", "text", stream, clock=_FixedClock(), colours=True)

    structlog.get_logger().warning("x")

    assert "\x1b[" in stream.getvalue()


def test_less_important_messages_are_left_out_until_the_level_changes() -> None:
    stream = io.StringIO()
    open_logging("warning", "json", stream, clock=_FixedClock())
    structlog.get_logger().info("unheard")
    open_logging("info", "json", stream, clock=_FixedClock())
    structlog.get_logger().info("heard")

    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["heard"]


def test_what_libraries_log_comes_once_however_often_logging_is_opened() -> None:
    stream = io.StringIO()
    open_logging("info", "json", stream, clock=_FixedClock())
    open_logging("info", "json", stream, clock=_FixedClock())

    logging.getLogger("uvicorn.error").error("socket %s", "gone")
    logging.getLogger("uvicorn.error").info("chatter")

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["message"], line["logger"], line["level"]) for line in lines] == [
        ("socket gone", "uvicorn.error", "error")
    ]


def test_an_exception_is_part_of_the_line() -> None:
    stream = io.StringIO()
    open_logging("info", "json", stream, clock=_FixedClock())

    structlog.get_logger().error("task ended", exc_info=ValueError("told"))

    (line,) = stream.getvalue().splitlines()
    assert "ValueError: told" in json.loads(line)["exception"]


@pytest.mark.parametrize(
    ("method", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3)]
)
def test_a_line_for_the_journal_begins_with_its_priority(method: str, priority: int) -> None:
    stream = io.StringIO()
    open_logging("debug", "json", stream, clock=_FixedClock(), journal=True)

    getattr(structlog.get_logger(), method)("x")

    prefix, line = stream.getvalue().split(">", 1)
    assert prefix == f"<{priority}"
    assert json.loads(line)["message"] == "x"


def test_each_line_of_text_for_the_journal_begins_with_its_priority() -> None:
    stream = io.StringIO()
    open_logging("info", "text", stream, clock=_FixedClock(), journal=True)

    logging.getLogger("asyncio").error("task ended", exc_info=ValueError("reason"))

    lines = stream.getvalue().splitlines()
    assert len(lines) > 1
    assert all(line.startswith("<3>") for line in lines)


def test_foreign_text_is_clipped() -> None:
    stream = io.StringIO()
    open_logging("info", "json", stream, clock=_FixedClock())

    structlog.get_logger().info("tool spoke", output="x" * 100_000)

    assert len(stream.getvalue()) < 10_000
