"""A value as one would write it in YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final

_PLAIN: Final = re.compile(r"(?!(?:null|true|false)$)[a-zA-Z/][a-zA-Z0-9/_.@-]*", re.IGNORECASE)


def render_value(value: object) -> str:
    """A default or a value as one would write it in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        pairs = (f"{render_value(key)}: {_flow(one)}" for key, one in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(one) for one in value) + "]"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return _quote(value)
    return str(value)


def _flow(value: object) -> str:
    # Beside brackets and commas a text is safe in quotes only.
    return _quote(value) if isinstance(value, str) else render_value(value)


def _quote(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in quoted)


def _escape(letter: str) -> str:
    return f"\\U{ord(letter):08x}"
