"""Parser of record files: bytes in, records out, and every problem with its file and line.

The file source, the command line's `--file` and the tests all use this parser.
"""

from __future__ import annotations

import json
import pathlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias, TypeVar

from imdsproxy.config.strict_yaml import Decoded, Tree, Undecodable, decode_yaml, find_part
from imdsproxy.errors import Problem
from imdsproxy.model.entities import Instance, Network
from imdsproxy.model.records import LISTS, TABLES, Records, Tables, parse_each, parse_listed
from imdsproxy.model.records.schema import (
    MAX_PAYLOAD,
    Fault,
    Field,
    Findings,
    LineOf,
    Path,
    ReadFile,
    Refused,
)

_T = TypeVar("_T")
_NOTED: Final = 500

Note: TypeAlias = "Callable[[int, int], None]"
"""Receives the progress: the number of checked records and the estimated total."""

_DEEPEST: Final = 100
_TOO_DEEP: Final = f"nested deeper than {_DEEPEST} levels"
_MOST_DIGITS: Final = 1000
"""Maximum length of an integer: guests get the number unchanged, and not all can read more (Python: 4,300)."""
_NO_VALUES: Final = {"NaN", "Infinity", "-Infinity"}
"""JavaScript values that are not JSON, but that the standard library accepts."""
_TOKEN: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]|[^][{}":, \t\r\n]+')
"""Token of valid JSON: a string, a bracket, or another value. Possessive, because user data is a string of up to 22 MB,
and a backtracking position for each character would take gigabytes."""

SUFFIXES = (".yaml", ".yml", ".json")
"""File name suffixes of record files."""


TakeRecord: TypeAlias = "Callable[[Path, Network | Instance | Refused, LineOf, float], None]"
"""Receives a record's path in the file, the record, a function for its lines, and the share read, from 0 to 1."""


def read_records(
    data: bytes,
    *,
    file: str,
    take: TakeRecord,
    read_file: ReadFile | None = None,
    tables: Tables = TABLES,
) -> tuple[Problem, ...]:
    """Read the records of a file one by one.

    Args:
        data: Content of the file in UTF-8: JSON if `file` ends with `.json`, else YAML.
        take: Receives each record. The records count only if the file itself has no problems.
        read_file: Reads the file that `user_data_file` names (`payload_reader`); without it the key is refused.

    Returns problems of the file itself.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"is not UTF-8: byte {data[error.start]:#04x}"
        hint = "save the file as UTF-8; write binary data as !!binary"
        return (Problem("file", reason, hint, file, line),)

    def take_item(path: Path, item: Decoded, share: float) -> None:
        findings = Findings(file, item.line_of, read_file)
        found = parse_listed(path, item.value, findings, item.faults, tables)
        take(path, found, item.line_of, share)

    # YAML is decoded record by record: the tree of a large file is 60 times the file's size.
    decoded = (
        decode_json(text)
        if file.endswith(".json")
        else decode_yaml(text, lists=LISTS, take=take_item)
    )
    if isinstance(decoded, Undecodable):
        return (Problem("file", decoded.reason, "", file, decoded.line),)
    findings = Findings(file, decoded.line_of, read_file)
    for path, record, share in parse_each(decoded.value, findings, decoded.faults, tables):
        take(path, record, decoded.line_of, share)
    return tuple(findings.problems)


def decode_records(
    data: bytes,
    *,
    file: str,
    read_file: ReadFile | None = None,
    note: Note | None = None,
    tables: Tables = TABLES,
) -> Records:
    """Read all records of a file; arguments as for `read_records`.

    `note` receives the number of checked records, and the estimated total, after every 500 records.
    """
    found: list[tuple[Path, Network | Instance | Refused]] = []

    def take(
        path: Path, record: Network | Instance | Refused, _line_of: LineOf, share: float
    ) -> None:
        found.append((path, record))
        if note is not None and len(found) % _NOTED == 0:
            note(len(found), max(len(found), round(len(found) / share)))

    problems = read_records(data, file=file, take=take, read_file=read_file, tables=tables)
    return Records.of(found, problems)


def decode_json(text: str) -> Decoded | Undecodable:
    """Decode the single JSON value in `text` (RFC 8259), with all line numbers; blank text is `None`, as for YAML.

    The standard library decodes the value, and a second pass over the tokens finds the lines. The YAML reader is no
    substitute: libyaml refuses the surrogate pairs that JSON writes for characters beyond U+FFFF, reads U+2028 in a
    string as a line break, accepts text that is not JSON, and takes five times as long (3.4 s against 0.7 s for 20,000
    instances).
    """
    if not text.strip(" \t\r\n"):
        return Decoded(None, lambda _path: None)
    try:
        value = json.loads(text, object_pairs_hook=_first_of_each)
        places = _Places(text)
        tree = places.tree(next(places.tokens), ())
    except json.JSONDecodeError as error:
        return Undecodable(f"is not JSON: {error.msg}", line=error.lineno)
    except ValueError as error:
        return Undecodable(f"is not JSON: {error}")
    except RecursionError:
        return Undecodable(f"is not JSON: {_TOO_DEEP}")
    line_ends = [match.start() for match in re.finditer("\n", text)]

    def line_at(position: int) -> int:
        return bisect_left(line_ends, position) + 1

    faults = tuple(
        Fault(path, "appears twice", "keep one of the two", line_at(position))
        for path, position in places.repeated
    )
    return Decoded(value, lambda path: line_at(find_part(tree, path)), faults)


def _first_of_each(pairs: Iterable[tuple[str, _T]]) -> dict[str, _T]:
    values: dict[str, _T] = {}
    for key, value in pairs:
        values.setdefault(key, value)
    return values


class _Places:
    """Positions of the parts of a JSON text; `repeated` has the keys that occur twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _TOKEN.finditer(text)
        self.repeated: list[tuple[Path, int]] = []

    def tree(self, token: re.Match[str], path: Path) -> Tree:
        if token[0] in {"{", "["} and len(path) > _DEEPEST:
            raise json.JSONDecodeError(_TOO_DEEP, self.text, token.start())
        if token[0] in _NO_VALUES:
            raise json.JSONDecodeError("expected a value", self.text, token.start())
        if len(token[0]) > _MOST_DIGITS and token[0].lstrip("-").isdecimal():
            reason = f"a number has more than {_MOST_DIGITS} digits"
            raise json.JSONDecodeError(reason, self.text, token.start())
        if token[0] == "{":
            parts: dict[str, Tree] = {}
            while (name := next(self.tokens))[0] != "}":
                key = json.loads(name[0])
                _, inner = self.tree(next(self.tokens), (*path, key))
                if key in parts:
                    self.repeated.append(((*path, key), name.start()))
                parts.setdefault(key, (name.start(), inner))
            return token.start(), parts
        if token[0] == "[":
            items: list[Tree] = []
            while (item := next(self.tokens))[0] != "]":
                items.append(self.tree(item, (*path, len(items))))
            return token.start(), items
        return token.start(), None


def payload_reader(directory: pathlib.Path) -> ReadFile:
    """Return a reader of files named by records; relative names are resolved in `directory`."""

    def read(field: Field) -> bytes:
        path = directory / field.value
        try:
            # Check first: opening a FIFO would wait for ever, and reading a device would never end.
            if not path.is_file():
                hint = "an absolute path, or one beside the record file"
                none = (
                    f"{path} is not a regular file" if path.exists() else f"there is no file {path}"
                )
                raise field.error(none, hint)
            if path.stat().st_size > MAX_PAYLOAD:
                raise field.error(f"{path} is larger than {MAX_PAYLOAD} bytes", "at most 16 MiB")
            data: bytes = path.read_bytes()
        except OSError as error:
            reason = f"{path} cannot be read: {error.strerror}"
            raise field.error(reason, "correct its permissions") from error
        return data

    return read
