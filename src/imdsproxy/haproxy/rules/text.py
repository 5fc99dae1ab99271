"""Template language for HAProxy's configuration: rules as in HAProxy's manual, with `<name>` for a value (ADR 45).

A template, in a file `.cfg` of its own, holds one rule a line. It extends HAProxy's language:

- `<name>` stands for a value. A string is quoted, so it must not stand inside quotes; a `Text` is written unchanged. An
  empty value also removes the space before it, and an `if` without a remaining condition.
- `[flag]` or `[!flag]` before a line: the line is written if the value of that name is true, or false. A line that
  names a value of `None` is not written either.
- A line that is indented further than the first one continues the line before.
- `#` begins a comment, which is not written.
- A section whose name ends with `:` is a block: its lines are written where another template names the block, `<name>`,
  or `<name(value)>` if the block has an `<argument>`.
"""

from __future__ import annotations

import hashlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from textwrap import dedent
from typing import Final, TypeAlias

BANNER: Final = "# made by imdsproxy; changes are overwritten; content"

_BARE: Final = re.compile(r"[A-Za-z0-9_./:@%,|!=<>+*?^~(){}\[\]-]+")
_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NAME: Final = re.compile(r"( ?)<([a-z][a-z0-9_]*)(?:\(([a-z][a-z0-9_]*)\))?>")
_HEADER: Final = re.compile(r"^([^\s#].*)\n", re.MULTILINE)
_FLAG: Final = re.compile(r"\[(!?)([a-z][a-z0-9_]*)\] +")
_LINE: Final = re.compile(rf"^((?:{_FLAG.pattern})*)(.*)$", re.MULTILINE)


class UnquotableWord(ValueError):
    """The word holds a line break, NUL or another control character: no quoting makes it safe."""


@cache
def read_template(name: str) -> str:
    return (pkgutil.get_data(__package__, f"{name}.cfg") or b"").decode()


def quote(word: str) -> str:
    """Quote one word of a configuration line, with strong quotes if a character needs them.

    Source: HAProxy configuration manual, section 2.2 "Quoting and escaping". Raises `UnquotableWord` if the word holds
    a control character other than TAB.
    """
    # Nearly all words are bare, and a thousand networks have twenty thousand of them.
    if _BARE.fullmatch(word):
        return word
    if _FORBIDDEN.search(word):
        raise UnquotableWord(f"control character in {word!r}")
    return "'" + word.replace("'", "'\\''") + "'"


class Text(str):
    __slots__ = ()


def option(keyword: str, text: str | None) -> Text:
    return Text("" if text is None else f"{keyword} {quote(text)}")


@dataclass(frozen=True, slots=True)
class Block:
    """Lines of a template that other templates name, once for each row; `<argument>` is the value in parentheses."""

    template: str
    rows: Sequence[Mapping[str, Value]] = ({},)


Value: TypeAlias = str | Block | int | None
"""A string that is not a `Text` is quoted when written: a name, path, pattern or other single word."""


def name_values(values: Mapping[str, object], prefix: str = "") -> dict[str, Value]:
    """Return numbers and texts by their names in lower case: `header_network` for `HEADER_NETWORK`."""
    return {
        f"{prefix}{name.lower()}": value
        for name, value in values.items()
        if isinstance(value, str | int | None)
    }


@lru_cache(maxsize=512)
def _parse(template: str) -> list[tuple[list[tuple[str, str]], list[str]]]:
    """Return each line's flags, and its parts: text, then a space or nothing, a name, its argument, text, and so on."""
    rules = [one for one in template.splitlines() if one.strip() and one.lstrip()[0] != "#"]
    lines = _LINE.findall(re.sub(r"\n +", " ", dedent("\n".join(rules))))
    return [(_FLAG.findall(flags), _NAME.split(rest)) for flags, *_, rest in lines]


@lru_cache(maxsize=64)
def split_sections(text: str) -> Mapping[str, str]:
    """Return the lines below each header, a line without indent: of a section, or `NAME:` of a block."""
    _, *parts = _HEADER.split(text)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def blocks_of(*texts: str) -> dict[str, Block]:
    return {
        header.removesuffix(":"): Block(template)
        for text in texts
        for header, template in split_sections(text).items()
        if header.endswith(":")
    }


def fill(template: str, values: Mapping[str, Value]) -> list[str]:
    """Return the lines of a template.

    Raises `UnquotableWord` if a value holds a control character, `KeyError` if a template names a value that does not
    exist, `TypeError` if a value has a type that cannot be written.
    """
    lines: list[str] = []
    for flags, parts in _parse(template):
        if all(bool(values[name]) is not bool(negated) for negated, name in flags):
            lines += _fill_line(parts, values)
    return lines


def fill_sections(text: str, values: Mapping[str, Value]) -> Iterator[str]:
    """Yield the sections of a text, without its blocks (`split_sections`) and sections whose header is not written."""
    for header, template in split_sections(text).items():
        head = [] if header.endswith(":") else fill(header, values)
        if head:
            yield "\n".join((*head, *(f"  {line}" for line in fill(template, values))))


def _fill_line(parts: Sequence[str], values: Mapping[str, Value]) -> Iterable[str]:
    line = parts[0]
    for space, name, argument, rest in zip(*(parts[at::4] for at in range(1, 5)), strict=True):
        value = values[name]
        if value is None:
            return ()
        if isinstance(value, Block):
            inner = {**values, "argument": values[argument]} if argument else values
            filled = (
                fill(value.template, {**inner, **row} if row else inner) for row in value.rows
            )
            text = "\n".join(line for lines in filled for line in lines)
        else:
            text = _write(name, value)
        line += f"{space if text else ''}{text}{rest}"
    return [one for one in line.removesuffix(" if").split("\n") if one]


def _write(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"<{name}> is {value!r}, which can't be written")
    return quote(value) if isinstance(value, str) and not isinstance(value, Text) else str(value)


def render(sections: Iterable[str]) -> str:
    """Render a whole file; its first line is a banner with the hash of the rest."""
    body = "\n".join(f"{section}\n" for section in sections)
    digest = hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
    return f"{BANNER} {digest}\n\n{body}"
