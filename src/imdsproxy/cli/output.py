"""Output of commands: tables for people, JSON for programs, errors as one line and a hint.

Only output to a terminal is coloured and fitted to the width; rich honours NO_COLOR. Other output has full lines, so
that `grep` and `awk` see everything.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from imdsproxy.errors import ImdsproxyError, Starting
    from imdsproxy.reconcile.progress import Step

MOST_SHOWN: Final = 20
"""Maximum number of printed lines of a kind; further lines are only counted."""

_UNCUT: Final = 4000
_LINE_EVERY_S: Final = 5.0
_BAR_WIDTH: Final = 16
_USUAL_WIDTH: Final = 80

Shape: TypeAlias = "Mapping[str, Any]"
"""Object in the daemon's JSON."""

Note: TypeAlias = "Callable[[str, int, int], None]"
"""Callback for progress: current work, amount done, and total amount (0 if not known)."""


@dataclass(slots=True)
class Output:
    """Standard output and error of one command."""

    as_json: bool = False

    def answer(self, value: Any, show: str | Callable[[Output, Any], None]) -> None:
        """Print a value: JSON for programs; for people the text `show`, or the output of the function `show`."""
        if self.as_json:
            self.json(value)
        elif isinstance(show, str):
            self.text(show)
        else:
            show(self, value)

    def json(self, value: object) -> None:
        """Print a value as JSON, in UTF-8 for any locale; a lone surrogate becomes a JSON escape."""
        text = json.dumps(value, indent=2, ensure_ascii=False)
        self.raw(f"{text}\n".encode(errors="backslashreplace"))

    def text(self, text: str) -> None:
        """Print unformatted text and flush, because a command behind a pipe may run for hours."""
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()

    def raw(self, body: bytes) -> None:
        sys.stdout.flush()
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()

    def foreign(self, body: bytes) -> None:
        """Print a guest's bytes unchanged, but escape control characters on a terminal."""
        if sys.stdout.isatty():
            self.text(_printable(body.decode(errors="replace")))
        else:
            self.raw(body)

    def styled(self, *lines: str) -> None:
        """Print lines with rich's markup; callers pass foreign text through `clean` first."""
        _print_lines(sys.stdout, lines)

    def facts(self, facts: Mapping[str, str | None], *, heading: str = "") -> None:
        """Print a line per name and value, with markup; skip `None` values and indent lines under a heading."""
        from rich.table import Table

        self.styled(*([heading] if heading else []))
        grid = Table.grid(padding=(0, 2, 0, 0))
        for style in ("", "dim") if heading else ("bold",):
            grid.add_column(style=style, no_wrap=True, min_width=1)
        grid.add_column(overflow="fold")
        for name, value in facts.items():
            if value is not None:
                grid.add_row(*([""] if heading else []), name, value)
        _print_table(grid)

    def confirm(self, question: str, *, instead: str) -> bool:
        """Ask a yes/no question at the terminal; any answer but yes means no.

        `instead`: option that answers yes, for programs. Raises `RequestRefused`: standard input or error is no
        terminal, or the output is JSON.
        """
        from imdsproxy.errors import RequestRefused

        if self.as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise RequestRefused(
                f"cannot ask without a terminal: {question}?",
                hint=f"use {instead} to continue without a question",
            )
        sys.stderr.write(f"{question}? [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in {"y", "yes"}

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show a spinner on standard error during the block, if that is a terminal."""
        if self.as_json or not sys.stderr.isatty():
            yield
            return
        with _console(sys.stderr).status(text):
            yield

    @contextlib.contextmanager
    def progress(self) -> Iterator[Note]:
        """Show progress on standard error: a bar on a terminal, otherwise occasional lines; nothing with JSON."""
        if self.as_json:
            yield lambda _what, _done, _of: None
            return
        if not sys.stderr.isatty():
            yield _note_lines()
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
        )
        with progress.Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda what, done, of: bar.update(
                task, description=clean(what), completed=done, total=of or None
            )

    @contextlib.contextmanager
    def starting(self) -> Iterator[Callable[[Starting], None]]:
        """Show the progress of a daemon's start, as `progress` does."""
        with self.progress() as note:

            def show(error: Starting) -> None:
                for step in error.steps[:1]:
                    note(f"the daemon is starting: {step['what']}", step["done"], step["of"])
                if not error.steps:
                    note(error.message, 0, 0)

            yield show

    def table(
        self,
        rows: Iterable[Mapping[str, str]],
        *,
        empty: str = "",
        keep: Collection[str] = (),
        right: Collection[str] = (),
        spare: Collection[str] = (),
        apart: bool = False,
    ) -> None:
        """Print rows under headings; cells may contain markup.

        Args:
            rows: Cells by heading; all rows have the same headings.
            spare: Columns to drop, the last first, while the terminal is too narrow.
        """
        filled = list(rows)
        if not filled:
            self.styled(*([f"[dim]{empty}[/]"] if empty else []))
            return
        self.styled(*([""] if apart else []))
        shown, console = list(filled[0]), _console(sys.stdout)
        dropped = [title for title in shown if title in spare]
        table = _table(filled, shown, keep, right)
        while dropped and console.measure(table).maximum >= console.width:
            shown.remove(dropped.pop())
            table = _table(filled, shown, keep, right)
        _print_table(table)

    def error(self, error: ImdsproxyError) -> None:
        """Print an error as one line, its problems and its hint, or as a JSON object with --json."""
        if self.as_json:
            keys = ("field", "reason", "hint", "file", "line")
            body = {
                "code": error.code,
                "message": error.message,
                "hint": error.hint,
                "problems": [{key: getattr(one, key) for key in keys} for one in error.problems],
            }
            sys.stderr.write(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
            return
        problems, hint = list(error.problems), error.hint
        if len(problems) == 1 and problems[0].reason in error.message:
            hint = hint or problems.pop().hint
        lines = [f"[bold red]imdsproxy:[/] {clean(error.message)}"]
        lines += [f"  {clean(line)}" for line in first_lines(list(map(str, problems)))]
        if hint:
            lines.append(f"[dim]hint:[/] {clean(hint)}")
        from imdsproxy.host.notify import is_journal

        if is_journal(sys.stderr, os.environ):
            lines = [f"<3>{line}" for line in lines]
        _print_lines(sys.stderr, lines)


_REST: Final = "see --json"


def first_lines(lines: Sequence[str], rest: str = _REST) -> list[str]:
    """Return the lines up to `MOST_SHOWN`, and a line that counts the rest and says how to see it."""
    return [*lines[:MOST_SHOWN], *and_more(len(lines), rest)]


def and_more(count: int, rest: str = _REST) -> list[str]:
    """Return a line that counts the lines beyond `MOST_SHOWN` and says how to see them; empty without such lines."""
    return [f"and {count - MOST_SHOWN:,} more: {rest}"] if count > MOST_SHOWN else []


def spell_status(status: int) -> str:
    """Return an HTTP status with its phrase: `404 Not Found`."""
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    return f"{status} {phrase}".rstrip()


def spell_time(at: float, *, zone: bool = False) -> str:
    """Return a Unix time as local time, optionally with the time zone."""
    local = datetime.fromtimestamp(at, UTC).astimezone()
    return f"{local:%Y-%m-%d %H:%M:%S{' %Z' if zone else ''}}"


def decode_bytes(shape: Mapping[str, str]) -> bytes:
    """Decode bytes from the admin API, given as `text` or `base64`."""
    return base64.b64decode(shape["base64"]) if "base64" in shape else shape["text"].encode()


def clean(text: object) -> str:
    """Escape markup and control characters in foreign text."""
    from rich.markup import escape

    return escape(_printable(str(text)))


def clean_all(value: Any) -> Any:
    """Apply `clean` to every text in the daemon's answer."""
    if isinstance(value, dict):
        return {clean(name): clean_all(one) for name, one in value.items()}
    if isinstance(value, list):
        return [clean_all(one) for one in value]
    return clean(value) if isinstance(value, str) else value


def _printable(text: str) -> str:
    return "".join(
        letter if letter.isprintable() or letter == "\n" else f"\\x{ord(letter):02x}"
        for letter in text
    )


class BottomLine:
    """Terminal stream with a status line at the bottom; other output goes above the line.

    It does not use rich, which takes longer to load than a daemon takes to start.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._line = stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        erase = "\r\x1b[K" if self._line else ""
        after = self._line if text.endswith("\n") else ""
        return self._stream.write(f"{erase}{text}{after}")

    def show_start(self, steps: Sequence[Step] | None) -> None:
        """Show the progress of a daemon's start in the status line; `None` removes the line."""
        line = ""
        if steps is not None:
            width = os.get_terminal_size(self._stream.fileno()).columns or _USUAL_WIDTH
            line = _start_line(steps)[: width - 1]
        if line != self._line:
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()
            self._line = line


def _start_line(steps: Sequence[Step]) -> str:
    if not steps:
        return "the daemon is starting"
    step = steps[0]
    filled = _BAR_WIDTH * step.done // step.of if step.of else 0
    bar = f" [{'#' * filled:-<{_BAR_WIDTH}}] {step.done:,} of {step.of:,}" if step.of else ""
    return f"the daemon is starting: {step.what}{bar}"


def _note_lines() -> Note:
    """Return a callback that prints a progress line every few seconds."""
    following = time.monotonic() + _LINE_EVERY_S

    def note(what: str, done: int, of: int) -> None:
        nonlocal following
        now = time.monotonic()
        if now >= following:
            following = now + _LINE_EVERY_S
            sys.stderr.write(f"{what}: {done:,} of {of:,}\n" if of else f"{what}\n")
            sys.stderr.flush()

    return note


def _table(
    rows: Sequence[Mapping[str, str]],
    shown: Sequence[str],
    keep: Collection[str],
    right: Collection[str],
) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for title in shown:
        table.add_column(
            title,
            justify="right" if title in right else "left",
            no_wrap=title in keep,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(row[title] for title in shown))
    return table


def _print_lines(stream: TextIO, lines: Iterable[str]) -> None:
    console = _console(stream)
    for line in lines:
        console.print(line, soft_wrap=not stream.isatty())


def _print_table(table: Table) -> None:
    console = _console(sys.stdout)
    if sys.stdout.isatty():
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(
        file=stream,
        highlight=False,
        emoji=False,
        width=None if stream.isatty() else _UNCUT,
        force_terminal=None if stream.isatty() else False,
    )
