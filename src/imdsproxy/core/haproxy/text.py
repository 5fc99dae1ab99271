"""HAProxy's configuration as text: rules as HAProxy's manual has them, and `<name>` where a value goes (ADR 45).

A template holds one rule a line. Four things are added to HAProxy's language:

- `<name>` stands for a value, which quotes itself. A plain string is no value. An empty one takes the space before it
  with it, and an `if` that has no condition left goes too.
- `[flag]` or `[!flag]` before a line: the line is there if the value of that name is true, or false. A line that names
  a value of `None` isn't there either.
- A line that is indented further than the first one continues the line before.
- `#` begins a comment, which isn't written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, TypeAlias

BANNER: Final = "# made by imdsproxy; changes are overwritten; content"

_BARE: Final = re.compile(r"[A-Za-z0-9_./:@%,|!=<>+*?^~(){}\[\]-]+")
_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NAME: Final = re.compile(r"( ?)<([a-z][a-z0-9_]*)>")
_FLAG: Final = re.compile(r"\[(!?)([a-z][a-z0-9_]*)\] +")


class UnquotableWord(ValueError):
    """The word holds a line break, NUL or another control character: no quoting makes it safe."""


def quote(word: str) -> str:
    """One word of a configuration line, in strong quotes if a character of it needs them.

    Source: HAProxy configuration manual, section 2.2 "Quoting and escaping".

    Raises:
        UnquotableWord: The word holds a control character other than TAB.
    """
    # Nearly all words are bare, and a thousand networks have twenty thousand of them.
    if _BARE.fullmatch(word):
        return word
    if _FORBIDDEN.search(word):
        raise UnquotableWord(f"control character in {word!r}")
    return "'" + word.replace("'", "'\\''") + "'"


@dataclass(frozen=True, slots=True)
class Word:
    """A name, path, pattern or anything else that is one word, or a part of one."""

    text: str

    def __str__(self) -> str:
        return quote(self.text)


@dataclass(frozen=True, slots=True)
class Option:
    """A keyword and its word; neither is written where the word is `None`."""

    keyword: str
    word: str | None

    def __str__(self) -> str:
        return "" if self.word is None else f"{self.keyword} {quote(self.word)}"


@dataclass(frozen=True, slots=True)
class Text:
    """Lines that are finished."""

    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.lines)


def raw(text: str) -> Text:
    """A part of a line, as HAProxy reads it."""
    return Text((text,) if text else ())


Value: TypeAlias = Word | Option | Text | int | None


@dataclass(frozen=True, slots=True)
class _Line:
    flags: tuple[tuple[str, bool], ...]
    parts: tuple[str, ...]
    """Text, then a space or nothing, a name, text, and so on."""


@lru_cache(maxsize=512)
def _parse(template: str) -> tuple[_Line, ...]:
    lines: list[str] = []
    first = None
    for line in template.splitlines():
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        first = indent if first is None else first
        if indent > first:
            lines[-1] += f" {text}"
        else:
            lines.append(text)
    return tuple(map(_parse_line, lines))


def _parse_line(line: str) -> _Line:
    flags: list[tuple[str, bool]] = []
    while (found := _FLAG.match(line)) is not None:
        flags.append((found[2], not found[1]))
        line = line[found.end() :]
    return _Line(tuple(flags), tuple(_NAME.split(line)))


@dataclass(frozen=True, slots=True)
class Form:
    """The values that the templates of one configuration may name."""

    values: Mapping[str, Value] = field(default_factory=dict)

    def fill(self, *templates: str | Text, **more: Value) -> Text:
        """The lines of templates, and of texts that are finished.

        Args:
            templates: What is to be written, in this order.
            more: Values of these templates alone.

        Raises:
            UnquotableWord: A value holds a control character.
            KeyError: A template names a value that isn't there.
            TypeError: A value is a plain string.
        """
        values = {**self.values, **more} if more else self.values
        lines: list[str] = []
        for template in templates:
            if isinstance(template, Text):
                lines += template.lines
                continue
            for line in _parse(template):
                if all(bool(values[flag]) is wanted for flag, wanted in line.flags):
                    lines += _fill_line(line.parts, values)
        return Text(tuple(lines))

    def section(self, header: str, *templates: str | Text, **more: Value) -> Text:
        """A section of the file: its header line, and lines below it as of `fill`."""
        body = self.fill(*templates, **more)
        return Text((str(self.fill(header, **more)), *(f"  {line}" for line in body.lines)))


def _fill_line(parts: tuple[str, ...], values: Mapping[str, Value]) -> Iterable[str]:
    line = parts[0]
    for space, name, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        value = values[name]
        if value is None:
            return ()
        text = _write(name, value)
        line += f"{space if text else ''}{text}{rest}"
    return [one for one in line.removesuffix(" if").split("\n") if one]


def _write(name: str, value: object) -> str:
    if not isinstance(value, Word | Option | Text | int) or isinstance(value, bool):
        raise TypeError(f"<{name}> is {value!r}, which doesn't quote itself")
    return str(value)


def render(sections: Iterable[Text]) -> str:
    """A whole file, its first line a banner with the hash of the rest."""
    body = "\n".join(f"{section}\n" for section in sections)
    digest = hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
    return f"{BANNER} {digest}\n\n{body}"
