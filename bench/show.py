"""The table and the JSON of all rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.table import Table
from rich.text import Text

from bench.figures import Row, Verdict

__all__ = ["document", "table", "write_json"]

_STYLES: Final = {
    Verdict.PASS: "bold green",
    Verdict.SHORT: "bold red",
    Verdict.SHOWN: "cyan",
    Verdict.INVALID: "bold yellow",
    Verdict.MISSING: "bold red",
}


def table(rows: Sequence[Row]) -> Table:
    """Build the table for people."""
    made = Table(title="imdsproxy, measured", title_justify="left", show_lines=True)
    made.add_column("row", no_wrap=True)
    made.add_column("what and how", ratio=3)
    made.add_column("figure", ratio=3)
    made.add_column("bar", ratio=1)
    made.add_column("verdict", no_wrap=True)
    for row in rows:
        what = Text(row.what)
        if row.how:
            what.append(f"\n{row.how}", style="dim")
        verdict = Text(row.verdict.value, style=_STYLES[row.verdict])
        made.add_row(Text(row.key), what, Text(row.figure), Text(row.bar), verdict)
    return made


def document(rows: Sequence[Row], machine: dict[str, object]) -> dict[str, object]:
    """Build the document for programs."""
    return {
        "machine": machine,
        "rows": [
            {
                "key": row.key,
                "what": row.what,
                "figure": row.figure,
                "bar": row.bar,
                "value": row.value,
                "verdict": row.verdict.value,
                "how": row.how,
                "data": dict(row.data),
            }
            for row in rows
        ],
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
