"""Log lines of the long-running processes: JSON for machines, aligned text on a terminal.

A line is an event in a few words and key-value pairs; its time is UTC. Messages of libraries
(uvicorn, asyncio) come the same way, from `warning` on. The journal gets their priorities. Import this module before
any other that imports structlog.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Final, Literal, TextIO, TypeAlias, cast

# structlog loads rich wherever it is installed, for tracebacks in colour. Ours are plain, and rich is several MiB of a
# process that runs for ever and a fifteenth of its start. What needs rich, as the tables of the command line, finds it
# afterwards.
_HIDDEN: Final = "rich" not in sys.modules
if _HIDDEN:
    sys.modules["rich"] = None  # type: ignore[assignment]  # by the import system's own rules: there is none
try:
    import structlog
finally:
    if _HIDDEN:
        del sys.modules["rich"]

if TYPE_CHECKING:
    from structlog.typing import Processor, WrappedLogger

    from imdsproxy.host.clock import Clock

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["auto", "json", "text"]

_Event: TypeAlias = MutableMapping[str, object]
_CLIPPED: Final = 8192
_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Of syslog, as sd-daemon(3) has them at the beginning of a line."""


class _Libraries(logging.Handler):
    """Hands what libraries log with the standard library to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        """Forward one record with its exception."""
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
    """Set up what `structlog.get_logger()` writes, for this process; call again to change it.

    Args:
        level: The least important message that is written.
        log_format: `auto` is text where `stream` is a terminal, else JSON lines.
        stream: Where lines go, usually standard error.
        clock: Whose time the lines carry.
        colours: Colour text lines; the caller knows about terminals and NO_COLOR.
        journal: The stream is systemd's journal: `journalctl -p warning` is to find warnings.
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
    """Foreign text (a tool's output, a guest's header) must not make lines of megabytes."""
    for key, value in event.items():
        if isinstance(value, str) and len(value) > _CLIPPED:
            event[key] = f"{value[:_CLIPPED]}… ({len(value)} characters)"
    return event
