"""What commands print: tables for people, JSON for programs, errors as one line and a hint.

Colour and cutting to the width happen only on a terminal; rich honours NO_COLOR. Elsewhere lines
are as long as they are, so that `grep` and `awk` see everything.
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

    from imdsproxy.core.timing import Step
    from imdsproxy.errors import ImdsproxyError, Starting

MOST_SHOWN: Final = 20
"""Lines of one kind that are printed; the rest is counted."""

_UNCUT: Final = 4000
_LINE_EVERY_S: Final = 5.0
_BAR_WIDTH: Final = 16
_USUAL_WIDTH: Final = 80

Shape: TypeAlias = "Mapping[str, Any]"
"""An object in the daemon's JSON."""

Note: TypeAlias = "Callable[[str, int, int], None]"
"""Takes what is done, how much of it, and of how much (0: not known)."""


@dataclass(slots=True)
class Output:
    """Standard output and error of one command."""

    as_json: bool = False

    def answer(self, value: Any, show: str | Callable[[Output, Any], None]) -> None:  # noqa: ANN401 - JSON
        """A value: JSON for programs; for people a text, or as `show` prints it."""
        if self.as_json:
            self.json(value)
        elif isinstance(show, str):
            self.text(show)
        else:
            show(self, value)

    def json(self, value: object) -> None:
        """A value for programs: UTF-8 whatever the locale, half a surrogate pair as JSON's escape."""
        text = json.dumps(value, indent=2, ensure_ascii=False)
        self.raw(f"{text}\n".encode(errors="backslashreplace"))

    def text(self, text: str) -> None:
        """Text as it is, at once also where it goes through a pipe: the command may go on for hours."""
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
        sys.stdout.flush()

    def raw(self, body: bytes) -> None:
        """Bytes as they are."""
        sys.stdout.flush()
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()

    def foreign(self, body: bytes) -> None:
        """Bytes of a guest's as they are; on a terminal, which they could steer, without control characters."""
        if sys.stdout.isatty():
            self.text(_printable(body.decode(errors="replace")))
        else:
            self.raw(body)

    def styled(self, *lines: str) -> None:
        """Lines with rich's markup; what is foreign in them goes through `clean` first."""
        _print_lines(sys.stdout, lines)

    def facts(self, facts: Mapping[str, str | None], *, heading: str = "") -> None:
        """Names and values, a line each, without those that are `None`, all markup; under a heading indented."""
        from rich.table import Table  # noqa: PLC0415 - `--help` need not load it

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
        """Ask a question at a terminal; any answer but yes is no.

        Args:
            question: Without its question mark.
            instead: The option that answers yes, for programs.

        Raises:
            RequestRefused: There is no terminal to ask at.
        """
        from imdsproxy.errors import RequestRefused  # noqa: PLC0415 - as above

        if self.as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise RequestRefused(
                f"there is no terminal to ask at: {question}?",
                hint=f"give {instead} to go on without a question",
            )
        sys.stderr.write(f"{question}? [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in {"y", "yes"}

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Something that turns on a terminal's standard error while the work takes; nothing elsewhere."""
        if self.as_json or not sys.stderr.isatty():
            yield
            return
        with _console(sys.stderr).status(text):
            yield

    @contextlib.contextmanager
    def progress(self) -> Iterator[Note]:
        """How far work has come, on standard error: a bar on a terminal, elsewhere a line now and then; no JSON."""
        if self.as_json:
            yield lambda _what, _done, _of: None
            return
        if not sys.stderr.isatty():
            yield _note_lines()
            return
        from rich import progress  # noqa: PLC0415 - `--help` need not load it

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
        """How far the start of a daemon has come, as `progress`."""
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
        """Rows under headings; the cells may hold markup.

        Args:
            rows: The cells by their headings, the same in all of them.
            empty: Printed where there are no rows.
            keep: Columns whose cells are never broken.
            right: Columns of numbers.
            spare: Columns that are dropped, the last first, while the terminal is too narrow for all.
            apart: Print an empty line before the rows.
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
        """One line, the problems, and the hint; a JSON object where the command was given --json."""
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
        from imdsproxy.host.notify import is_journal  # noqa: PLC0415 - only where something is wrong

        if is_journal(sys.stderr, os.environ):
            lines = [f"<3>{line}" for line in lines]
        _print_lines(sys.stderr, lines)


_REST: Final = "--json has all"


def first_lines(lines: Sequence[str], rest: str = _REST) -> list[str]:
    """As many as are shown of one kind, and how many more there are and what shows them."""
    return [*lines[:MOST_SHOWN], *and_more(len(lines), rest)]


def and_more(count: int, rest: str = _REST) -> list[str]:
    """A line for what is not shown of `count`, and what shows it; none where all are shown."""
    return [f"and {count - MOST_SHOWN:,} more: {rest}"] if count > MOST_SHOWN else []


def spell_count(number: int, noun: str) -> str:
    """`1 key`, `2 keys`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def spell_status(status: int) -> str:
    """`404 Not Found`."""
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    return f"{status} {phrase}".rstrip()


def spell_time(at: float, *, zone: bool = False) -> str:
    """A moment in local time, with its zone where it is asked for."""
    local = datetime.fromtimestamp(at, UTC).astimezone()
    return f"{local:%Y-%m-%d %H:%M:%S{' %Z' if zone else ''}}"


def decode_bytes(shape: Mapping[str, str]) -> bytes:
    """Bytes of the admin API, which are `text` or `base64`."""
    return base64.b64decode(shape["base64"]) if "base64" in shape else shape["text"].encode()


def clean(text: object) -> str:
    """Foreign text, fit for markup and a terminal: no markup, no control characters of its own."""
    from rich.markup import escape  # noqa: PLC0415 - `--help` need not load it

    return escape(_printable(str(text)))


def clean_all(value: Any) -> Any:  # noqa: ANN401 - JSON
    """`clean`, for every text in an answer of the daemon's."""
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
    """A terminal's stream with a line at its end that stays there: what is written goes above it.

    Without rich, which takes longer to load than a daemon to start.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._line = stream, ""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the stream's own
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write above the line."""
        erase = "\r\x1b[K" if self._line else ""
        after = self._line if text.endswith("\n") else ""
        return self._stream.write(f"{erase}{text}{after}")

    def show_start(self, steps: Sequence[Step] | None) -> None:
        """Show how far a daemon's start is; `None` takes the line away."""
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
    """Progress as lines, the first after a few seconds."""
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
    from rich import box  # noqa: PLC0415 - `--help` need not load it
    from rich.table import Table  # noqa: PLC0415 - as above

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
    from rich.console import Console  # noqa: PLC0415 - `--help` need not load it

    return Console(
        file=stream,
        highlight=False,
        emoji=False,
        width=None if stream.isatty() else _UNCUT,
        force_terminal=None if stream.isatty() else False,
    )
