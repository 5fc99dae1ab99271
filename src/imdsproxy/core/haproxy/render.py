"""Sections to text: deterministic, sorted where order means nothing, no time stamps."""

from __future__ import annotations

import hashlib
from typing import Final

from imdsproxy.core.haproxy.build import build_sections
from imdsproxy.core.haproxy.model import DataplaneSpec, Section, Words
from imdsproxy.core.haproxy.quoting import render_word

__all__ = ["BANNER", "render_config", "render_section"]

BANNER: Final = "# made by imdsproxy; changes are overwritten; content"


def render_config(spec: DataplaneSpec) -> str:
    """The configuration file's text, its first line a banner with the hash of the rest.

    Raises:
        UnquotableWord: A name or path holds a control character.
    """
    body = "\n".join(render_section(section) for section in build_sections(spec))
    digest = hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
    return f"{BANNER} {digest}\n\n{body}"


def render_section(section: Section) -> str:
    """One section, its lines indented, a newline at its end."""
    lines = [_render_line(section.header), *(f"  {_render_line(line)}" for line in section.lines)]
    return "\n".join(lines) + "\n"


def _render_line(words: Words) -> str:
    return " ".join(render_word(word) for word in words)
