"""Log lines of long-running processes, and copies of detached processes' logs in a container's.

A line is JSON for machines, or aligned text on a terminal: an event in a few words, key-value pairs and the time in
UTC. Messages of libraries (uvicorn, asyncio) appear in the same form, from `warning` on. The journal gets priorities.
Import this module before any other that imports structlog.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Literal, TextIO, TypeAlias, cast

from imdsproxy.errors import hidden_library

# structlog imports rich if it is installed, for coloured tracebacks. Ours are plain, and rich takes several MiB in a
# long-running process and a fifteenth of its start. Code that needs rich, as the command line's tables, can import it
# afterwards.
with hidden_library("rich"):
    import structlog

if TYPE_CHECKING:
    from structlog.typing import Processor, WrappedLogger

    from imdsproxy.host.clock import Clock

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["auto", "json", "text"]

_Event: TypeAlias = MutableMapping[str, object]
_CLIPPED: Final = 8192
_COPIES_EVERY_S: Final = 0.5
_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Syslog priorities, which sd-daemon(3) expects at the beginning of a line."""


class _Libraries(logging.Handler):
    """Handler that passes libraries' records of the standard logging module to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        log.log(
            record.levelno,
            record.getMessage(),
            logger=record.name,
            exc_info=record.exc_info or None,
        )


def open_logging(
    level: LogLevel,
    log_format: LogFormat,
    stream: TextIO,
    *,
    clock: Clock,
    colours: bool = False,
    journal: bool = False,
) -> None:
    """Configure `structlog.get_logger()` for this process; call it again to change the configuration.

    Args:
        log_format: Format; `auto` is text if `stream` is a terminal, else JSON lines.
        colours: Colour text lines; the caller checks terminals and NO_COLOR.
        journal: Whether the stream is systemd's journal; then lines get priorities, for `journalctl -p warning`.
    """
    text = log_format == "text" or (log_format == "auto" and stream.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            *_processors(clock, text=text, colours=colours),
            *([cast("Processor", _add_priority)] if journal else []),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Libraries)]:
        root.removeHandler(handler)
    root.addHandler(_Libraries())
    root.setLevel(max(number, logging.WARNING))


def _processors(clock: Clock, *, text: bool, colours: bool) -> list[Processor]:
    def add_time(_logger: WrappedLogger, _method: str, event: _Event) -> _Event:
        event["time"] = clock.now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        add_time,
        structlog.processors.UnicodeDecoder(),
        _clip,
    ]
    renderer: list[Processor] = [
        structlog.processors.EventRenamer("message"),
        structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
    ]
    if text:
        plain = structlog.dev.plain_traceback
        renderer = [
            structlog.dev.ConsoleRenderer(
                colors=colours, timestamp_key="time", exception_formatter=plain
            )
        ]
    return [*shared, structlog.processors.format_exc_info, *renderer]


def _add_priority(_logger: WrappedLogger, method: str, line: str) -> str:
    prefix = f"<{_PRIORITIES[method]}>"
    return prefix + line.replace("\n", f"\n{prefix}")


def _clip(_logger: WrappedLogger, _method: str, event: _Event) -> _Event:
    """Clip long values, so that foreign text (a tool's output, a guest's header) cannot make lines of megabytes."""
    for key, value in event.items():
        if isinstance(value, str) and len(value) > _CLIPPED:
            event[key] = f"{value[:_CLIPPED]}… ({len(value)} characters)"
    return event


@dataclass(slots=True)
class LogCopies:
    """Copier of files to which others append, and that restart when they grow long (`host.files.limit_log`).

    The files may not exist yet. Present content is not copied; the sink gets whole lines.
    """

    paths: Sequence[Path]
    sink: BinaryIO
    _offsets: dict[Path, int] = field(init=False)

    def __post_init__(self) -> None:
        self._offsets = {path: path.stat().st_size for path in self.paths if path.exists()}

    async def run(self) -> None:
        while True:
            self.copy()
            await asyncio.sleep(_COPIES_EVERY_S)

    def copy(self) -> None:
        for path in self.paths:
            offset = self._offsets.get(path, 0)
            # A process that was never started has no log.
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < offset:
                    offset = 0
                file.seek(offset)
                lines = b"".join(line for line in file if line.endswith(b"\n"))
                self.sink.write(lines)
                self._offsets[path] = offset + len(lines)
        self.sink.flush()
