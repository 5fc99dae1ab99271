"""HAProxy's configuration read back: its sections, and the words of their lines."""

from __future__ import annotations

import shlex

__all__ = ["read_sections"]


def read_sections(text: str) -> dict[str, list[tuple[str, ...]]]:
    """The words of each line, by the header of its section; quotes are gone."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if not line.startswith(" "):
            sections[line] = lines = []
        else:
            lines.append(tuple(shlex.split(line)))
    return sections
