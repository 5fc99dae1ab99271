"""What may be written, in words; and a value as one would write it."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, Union, get_args, get_origin

from imdsproxy.config.endpoint import Endpoint
from imdsproxy.config.nova_url import NovaUrl
from imdsproxy.config.shape import held_sections
from imdsproxy.core.model import ID_PATTERN

_ACCOUNT: Final = r"[a-z_][a-z0-9_-]{0,30}\$?"
_PATTERNS: Final[Mapping[str, str]] = {
    r"^[A-Za-z0-9.-]{1,253}$": "a host's name",
    rf"^{_ACCOUNT}$": "an account name",
    rf"^({_ACCOUNT}|[0-9]{{1,10}})$": "an account name, or its number in quotes",
    r"^[A-Za-z0-9:_.@-]{1,200}\.service$": "a systemd unit, as `name.service`",
    r"^0?[0-7]{3}$": 'three octal digits in quotes, as "0660"',
    r"^[a-z][a-z0-9]{1,5}$": "2 to 6 lower-case letters and digits, a letter first",
    r"^[a-z0-9][a-z0-9-]{0,31}$": "1 to 32 lower-case letters, digits and hyphens, no hyphen first",
    ID_PATTERN: (
        "an id: 1 to 64 letters, digits, dots, hyphens and underscores, a letter or digit first"
    ),
    r"^[A-Za-z0-9.:\[\]-]{1,255}$": "a host as in a Host header: a name or an address, and a port",
    r"^https?://[^\s/?#]+/?[^\s?#]*$": "a URL that begins with http:// or https://, without ? and #",
    r"^[a-z][a-z0-9+.-]*://[\x21-\x7e]*$": "a URI, as qemu:///system",
    r"^[^\x00-\x1f/]{1,255}$": "a name without a slash",
    r"^[\x21-\x7e]{1,255}$": "a name of 1 to 255 ASCII letters without blanks",
}
_PLAIN_WORDS: Final[Mapping[object, str]] = {
    bool: "true or false",
    Path: "an absolute path",
    Endpoint: "an address of the host and a port, as 127.0.0.1:9465 or [::1]:9465",
    NovaUrl: "a URL that ends after the port, as http://192.0.2.10:8775 or https://[2001:db8::1]",
}
_PLAIN: Final = re.compile(r"(?!(?:null|true|false)$)[a-zA-Z/][a-zA-Z0-9/_.@-]*", re.IGNORECASE)


def describe_kind(kind: object) -> str:
    """What something of this type takes, as `an integer from 0 to 4095, or null`."""
    kind, limits = _unwrap(kind)
    if get_origin(kind) in (Union, types.UnionType):
        others = [one for one in get_args(kind) if one is not type(None)]
        words = " or ".join(_kind_words(*_unwrap(one, limits)) for one in others)
        return f"{words}, or null" if len(others) < len(get_args(kind)) else words
    return _kind_words(kind, limits)


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


def _unwrap(kind: object, outer: Sequence[object] = ()) -> tuple[object, list[object]]:
    """The type inside `Annotated`, and all limits on it."""
    limits = list(outer)
    while get_origin(kind) is Annotated:
        kind, *metadata = get_args(kind)
        for item in metadata:
            limits.extend(getattr(item, "metadata", None) or [item])
    return kind, limits


def _kind_words(kind: object, limits: Sequence[object]) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(word) for word in inner)
    if origin is dict:
        held = held_sections(inner[1])
        values = "sections" if held is not None else describe_kind(inner[1])
        return f"a mapping of names to {values}"
    if origin is tuple:
        return _list_words(inner[0], limits)
    held = held_sections(kind)
    if held is not None:
        return f"a mapping of {', '.join(held.section.model_fields)}"
    if kind in {int, float}:
        return f"{'an integer' if kind is int else 'a number'}{_range_words(limits)}"
    return _PLAIN_WORDS.get(kind) or _text_words(limits)


def _list_words(item: object, limits: Sequence[object]) -> str:
    held = held_sections(item)
    if held is None:
        return f"a list, each {describe_kind(item)}"
    low, high = _limit(limits, "min_length"), _limit(limits, "max_length")
    number = "" if low is None or high is None else f"{low} to {high} "
    return f"a list of {number}sections"


def _text_words(limits: Sequence[object]) -> str:
    for limit in limits:
        pattern = getattr(limit, "pattern", None)
        if pattern is not None:
            return _PATTERNS.get(pattern, f"a text of the form {pattern}")
    return "a text, not empty" if _limit(limits, "min_length") is not None else "a text"


def _range_words(limits: Sequence[object]) -> str:
    low, high = _limit(limits, "ge"), _limit(limits, "le")
    return "" if low is None or high is None else f" from {low} to {high}"


def _limit(limits: Sequence[object], name: str) -> object:
    """One of pydantic's limits (`annotated_types` has a class with one field for each)."""
    found = (getattr(item, name, None) for item in limits)
    return next((value for value in found if value is not None), None)
