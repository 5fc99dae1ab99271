"""JSON (RFC 8259) with the line of everything, and duplicate keys reported.

The standard library's decoder has neither; its scanner for strings, in C, does the heavy part here. The YAML reader is
no substitute: libyaml refuses the surrogate pairs that JSON writes for characters beyond U+FFFF, reads U+2028 in a text
as a line break, accepts what is no JSON, and takes four times as long (3.4 s against 0.7 s for 20,000 instances).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from json import JSONDecodeError, decoder
from typing import Final, TypeAlias

from imdsproxy.config.strict_yaml import Decoded, Undecodable
from imdsproxy.core.records import Fault, Path

_DEEPEST: Final = 100
_BLANK: Final = re.compile(r"[ \t\r\n]*")
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,1000})(\.[0-9]+)?([eE][-+]?[0-9]+)?")
# Public by its name and in C; only the stubs leave it out.
_scan_string: Final = decoder.scanstring  # type: ignore[attr-defined]  # see above
_WORDS: Final = {"true": True, "false": False, "null": None}

_Tree: TypeAlias = "tuple[int, dict[str, _Tree] | list[_Tree] | None]"
"""Where a value begins (its key, in an object), and the same of its parts."""


def decode_json(text: str) -> Decoded | Undecodable:
    """The one JSON value in `text`; blank text is `None`, as an empty YAML file is."""
    scanner = _Scanner(text)
    start = scanner.skip(0)
    if start == len(text):
        return Decoded(None, lambda _path: None)
    try:
        value, end, tree = scanner.decode(start, ())
        end = scanner.skip(end)
    except JSONDecodeError as error:
        return Undecodable(f"is not JSON: {error.msg}", line=error.lineno)
    if end != len(text):
        line = text.count("\n", 0, end) + 1
        return Undecodable("is not JSON: text goes on after its end", line=line)
    line_ends = [match.start() for match in re.finditer("\n", text)]

    def line_of(path: Path) -> int | None:
        return bisect_left(line_ends, _position(tree, path)) + 1

    return Decoded(value, line_of, tuple(scanner.faults))


def _position(tree: _Tree, path: Path) -> int:
    position, parts = tree
    for step in path:
        if isinstance(parts, dict) and step in parts:
            position, parts = parts[str(step)]
        elif isinstance(parts, list) and isinstance(step, int) and step < len(parts):
            position, parts = parts[step]
        else:
            break
    return position


@dataclass(slots=True)
class _Scanner:
    text: str
    faults: list[Fault] = field(default_factory=list)

    def skip(self, position: int) -> int:
        match = _BLANK.match(self.text, position)
        return position if match is None else match.end()

    def decode(self, start: int, path: Path) -> tuple[object, int, _Tree]:
        """The value that begins at `start`, where it ends, and where its parts are."""
        text = self.text
        first = text[start : start + 1]
        if first == '"':
            value, end = _scan_string(text, start + 1)
            return value, end, (start, None)
        if first in "{[" and first and len(path) > _DEEPEST:
            raise JSONDecodeError(f"nested deeper than {_DEEPEST} levels", text, start)
        if first == "{":
            return self._object(start, path)
        if first == "[":
            return self._array(start, path)
        return self._word(start)

    def _word(self, start: int) -> tuple[object, int, _Tree]:
        match = _NUMBER.match(self.text, start)
        if match is not None:
            whole = match[1] is None and match[2] is None
            return int(match[0]) if whole else float(match[0]), match.end(), (start, None)
        for word, value in _WORDS.items():
            if self.text.startswith(word, start):
                return value, start + len(word), (start, None)
        raise JSONDecodeError("expected a value", self.text, start)

    def _object(self, start: int, path: Path) -> tuple[object, int, _Tree]:
        values: dict[str, object] = {}
        places: dict[str, _Tree] = {}
        position = self.skip(start + 1)
        if self.text.startswith("}", position):
            return values, position + 1, (start, places)
        while True:
            if not self.text.startswith('"', position):
                raise JSONDecodeError("expected a key in double quotes", self.text, position)
            place = position
            key, position = _scan_string(self.text, position + 1)
            position = self.skip(self._expect(":", self.skip(position)))
            value, position, tree = self.decode(position, (*path, key))
            if key in values:
                line = self.text.count("\n", 0, place) + 1
                fault = Fault((*path, key), "is there twice", "keep one of the two", line)
                self.faults.append(fault)
            else:
                values[key] = value
                places[key] = (place, tree[1])
            position = self.skip(position)
            if self.text.startswith("}", position):
                return values, position + 1, (start, places)
            position = self.skip(self._expect(",", position))

    def _array(self, start: int, path: Path) -> tuple[object, int, _Tree]:
        values: list[object] = []
        places: list[_Tree] = []
        position = self.skip(start + 1)
        if self.text.startswith("]", position):
            return values, position + 1, (start, places)
        while True:
            value, position, tree = self.decode(position, (*path, len(values)))
            values.append(value)
            places.append(tree)
            position = self.skip(position)
            if self.text.startswith("]", position):
                return values, position + 1, (start, places)
            position = self.skip(self._expect(",", position))

    def _expect(self, mark: str, position: int) -> int:
        if not self.text.startswith(mark, position):
            raise JSONDecodeError(f"expected {mark!r}", self.text, position)
        return position + 1
