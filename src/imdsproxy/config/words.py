"""The schema in words: what a field takes, and what pydantic's findings mean to an operator."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, get_args, get_origin

from imdsproxy.config.change import Change
from imdsproxy.config.endpoint import Endpoint
from imdsproxy.config.schema import Section, Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

__all__ = ["Finding", "Setting", "explain_finding", "iterate_settings", "render_value"]

_PATTERNS: Final[Mapping[str, str]] = {
    r"^[a-z_][a-z0-9_-]{0,30}\$?$": "an account name",
    r"^[A-Za-z0-9:_.@-]{1,200}\.service$": "a systemd unit, as `name.service`",
    r"^0?[0-7]{3}$": 'three octal digits in quotes, as "0660"',
    r"^[a-z][a-z0-9]{1,5}$": "2 to 6 lower-case letters and digits, a letter first",
}

_PLAIN: Final = re.compile(r"(?!(?:null|true|false)$)[a-zA-Z/][a-zA-Z0-9/_.@-]*", re.IGNORECASE)
_PLAIN_WORDS: Final[Mapping[object, str]] = {
    bool: "true or false",
    Path: "an absolute path",
    Endpoint: "an address of the host and a port, as 127.0.0.1:9465 or [::1]:9465",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the schema.

    Attributes:
        path: `haproxy.maxconn`.
        takes: What may be written, as `an integer from 0 to 4095`.
        default: The default as YAML and JSON write it.
    """

    path: str
    takes: str
    default: object
    description: str
    change: Change

    @property
    def variable(self) -> str:
        """The environment variable that overrides it."""
        return "IMDSPROXY_" + self.path.upper().replace(".", "__")


@dataclass(frozen=True, slots=True)
class Finding:
    """One of pydantic's errors in the operator's words; `field` is a path of the schema."""

    field: str
    reason: str
    hint: str


def iterate_settings(section: type[Section] = Settings, prefix: str = "") -> Iterator[Setting]:
    """Every setting in the schema's order."""
    defaults = section().model_dump(mode="json")
    for name, field in section.model_fields.items():
        inner = subsection(field)
        if inner is not None:
            yield from iterate_settings(inner, f"{prefix}{name}.")
            continue
        extra = field.json_schema_extra
        change = extra["change"] if isinstance(extra, Mapping) else Change.RESTART
        yield Setting(
            path=prefix + name,
            takes=_takes(field),
            default=defaults[name],
            description=field.description or "",
            change=Change(str(change)),
        )


def subsection(field: FieldInfo) -> type[Section] | None:
    """The section class that a field holds, if it holds one."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def render_value(value: object) -> str:
    """A default or a value as one would write it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def explain_finding(error: ErrorDetails) -> Finding:
    """Say one pydantic error as path, reason and what would be right."""
    location = [str(part) for part in error["loc"]]
    context = error.get("ctx", {})
    if error["type"] == "cross":
        path = [*location, *filter(None, [str(context["field"])])]
        return Finding(".".join(path), str(context["reason"]), str(context["hint"]))
    if error["type"] == "extra_forbidden":
        return _unknown(location)
    field = _field_at(location)
    if error["type"] in {"model_type", "model_attributes_type"} or field is None:
        names = ", ".join(_names_at(location))
        return Finding(".".join(location), "is a section, not a value", f"a mapping of {names}")
    return Finding(".".join(location), _reason(error), f"takes {_takes(field)}")


def _reason(error: ErrorDetails) -> str:
    written = error["input"]
    if error["type"] in {"path", "endpoint"}:
        return str(error["msg"])
    shown = render_value(written) if isinstance(written, str | int | float | None) else "this"
    return f"{_clip(shown)} is not acceptable"


def _clip(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _unknown(location: Sequence[str]) -> Finding:
    siblings = _names_at(location[:-1])
    near = difflib.get_close_matches(location[-1], siblings, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings)}"
    return Finding(".".join(location), "there is no such setting", hint)


def _names_at(location: Sequence[str]) -> list[str]:
    section: type[Section] | None = Settings
    for name in location:
        if section is None or name not in section.model_fields:
            return []
        section = subsection(section.model_fields[name])
    return [] if section is None else list(section.model_fields)


def _field_at(location: Sequence[str]) -> FieldInfo | None:
    section: type[Section] | None = Settings
    field: FieldInfo | None = None
    for name in location:
        if section is None or name not in section.model_fields:
            return None
        field = section.model_fields[name]
        section = subsection(field)
    return field


def _takes(field: FieldInfo) -> str:
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    words = " or ".join(_kind_words(kind, _limits(field)) for kind in kinds)
    nullable = len(kinds) < len(_alternatives(field.annotation))
    return f"{words}, or null" if nullable else words


def _alternatives(annotation: object) -> tuple[object, ...]:
    if get_origin(annotation) is Literal:
        return (annotation,)
    arguments = get_args(annotation)
    if type(None) not in arguments:
        return (annotation,)
    return arguments


def _limits(field: FieldInfo) -> list[object]:
    """The field's own metadata and that of the type inside `X | None`."""
    inner = [
        item
        for kind in _alternatives(field.annotation)
        for item in getattr(kind, "__metadata__", ())
    ]
    flat: list[object] = []
    for item in [*field.metadata, *inner]:
        flat.extend(getattr(item, "metadata", None) or [item])
    return flat


def _kind_words(kind: object, limits: Sequence[object]) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(word) for word in get_args(kind))
    plain = getattr(kind, "__origin__", kind)
    if plain in {int, float}:
        return f"{'an integer' if plain is int else 'a number'}{_range_words(limits)}"
    if plain in _PLAIN_WORDS:
        return _PLAIN_WORDS[plain]
    for limit in limits:
        pattern = getattr(limit, "pattern", None)
        if pattern is not None:
            return _PATTERNS[pattern]
    return "a text, not empty" if _limit(limits, "min_length") is not None else "a text"


def _range_words(limits: Sequence[object]) -> str:
    low, high = _limit(limits, "ge"), _limit(limits, "le")
    return "" if low is None or high is None else f" from {low} to {high}"


def _limit(limits: Sequence[object], name: str) -> object:
    """One of pydantic's limits (`annotated_types` has a class with one field for each)."""
    return next((getattr(item, name) for item in limits if hasattr(item, name)), None)
