"""A configuration file's sections and their text: deterministic, no time stamps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.haproxy.quoting import render_word

__all__ = ["BANNER", "Section", "Words", "add_banner", "render_section", "render_sections"]

BANNER: Final = "# made by imdsproxy; changes are overwritten; content"

Words = tuple[str, ...]
"""One configuration line as unquoted words."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the file: its header line and the lines below it."""

    header: Words
    lines: tuple[Words, ...]


def render_sections(sections: Iterable[Section]) -> str:
    """A whole file of these sections, its first line a banner with the hash of the rest.

    Raises:
        UnquotableWord: A word holds a control character.
    """
    return add_banner("\n".join(render_section(section) for section in sections))


def add_banner(body: str) -> str:
    """A whole file of this text, its first line a banner with the text's hash."""
    digest = hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
    return f"{BANNER} {digest}\n\n{body}"


def render_section(section: Section) -> str:
    """One section, its lines indented, a newline at its end."""
    lines = [_render_line(section.header), *(f"  {_render_line(line)}" for line in section.lines)]
    return "\n".join(lines) + "\n"


def _render_line(words: Words) -> str:
    return " ".join(render_word(word) for word in words)
