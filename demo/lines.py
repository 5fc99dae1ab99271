"""Lines of a demonstration's table: what a guest did, what it got, and whether that is right. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

__all__ = ["Line", "holds", "render_table"]


@dataclass(frozen=True, slots=True)
class Line:
    """One line.

    Attributes:
        where: Hosts.
        wanted: Pattern of the whole right answer.
    """

    who: str
    where: str
    what: str
    answer: str
    wanted: str

    @property
    def holds(self) -> bool:
        return re.fullmatch(self.wanted, self.answer) is not None


def holds(lines: Sequence[Line]) -> bool:
    """Return whether there are lines, and each of them holds."""
    return bool(lines) and all(line.holds for line in lines)


def render_table(lines: Sequence[Line]) -> Table:
    """Return the table, grouped by who it is; its last column is the verdict on each line."""
    table = Table("who", "on", "does", "gets", "verdict", box=None, header_style="bold")
    for who in dict.fromkeys(line.who for line in lines):
        own = [line for line in lines if line.who == who]
        for line in own:
            verdict = "[green]right[/]" if line.holds else "[bold white on red]WRONG[/]"
            cells = (who if line is own[0] else "", line.where, line.what, line.answer)
            table.add_row(*map(escape, cells), verdict)
        table.add_section()
    return table
