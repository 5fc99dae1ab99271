"""Record files: bytes in, records out, and every problem with its file and line.

The file source, the command line's `--file` and the tests read them all through here.
"""

from __future__ import annotations

import json
import pathlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias, TypeVar

from imdsproxy.config.strict_yaml import Decoded, Tree, Undecodable, decode_yaml, find_part
from imdsproxy.core.model import Instance, Network
from imdsproxy.core.records import LISTS, TABLES, Records, Tables, parse_each, parse_listed
from imdsproxy.core.records.schema import (
    MAX_PAYLOAD,
    Fault,
    Field,
    Findings,
    LineOf,
    Path,
    ReadFile,
    Refused,
)
from imdsproxy.errors import Problem

_T = TypeVar("_T")
_NOTED: Final = 500

Note: TypeAlias = "Callable[[int, int], None]"
"""Takes how much is done, of how much."""

_DEEPEST: Final = 100
_TOO_DEEP: Final = f"nested deeper than {_DEEPEST} levels"
_MOST_DIGITS: Final = 1000
"""Of a whole number: guests are given it as it is, and not all of them read more (Python: 4,300)."""
_NO_VALUES: Final = {"NaN", "Infinity", "-Infinity"}
"""JavaScript's, which the standard library accepts."""
_TOKEN: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]|[^][{}":, \t\r\n]+')
"""Of what is JSON: a text, a bracket, or another value. Possessive: user data is a text of up to 22 MB, and a place to
come back to for each of its characters would take gigabytes."""

SUFFIXES = (".yaml", ".yml", ".json")
"""How the names of record files end."""


TakeRecord: TypeAlias = "Callable[[Path, Network | Instance | Refused, LineOf, float], None]"
"""Takes a record, its path in the file, where its parts stand, and how much of the file is read, from 0 to 1."""


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
        data: The file's bytes: UTF-8, JSON where `file` ends so, else YAML.
        file: Its name, for the problems.
        take: Given each record. What it got holds only if the file itself has no problems.
        read_file: Reads what `user_data_file` names (`payload_reader`); without it the key is refused.
        tables: What the records may have.

    Returns:
        What is wrong with the file itself.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"is not UTF-8: byte {data[error.start]:#04x}"
        hint = "save it as UTF-8; binary goes as !!binary"
        return (Problem("file", reason, hint, file, line),)

    def take_item(path: Path, item: Decoded, share: float) -> None:
        findings = Findings(file, item.line_of, read_file)
        found = parse_listed(path, item.value, findings, item.faults, tables)
        take(path, found, item.line_of, share)

    # YAML record by record: the tree of a large file is 60 times its size.
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
    """All records of a file; arguments as of `read_records`.

    `note` is given now and then how many records were checked, and an estimate of how many there are.
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
    """The one JSON value in `text` (RFC 8259), with all lines; blank text is `None`, as an empty YAML file is.

    The standard library decodes it, and a second reading of its tokens finds where everything is. The YAML reader is no
    substitute: libyaml refuses the surrogate pairs that JSON writes for characters beyond U+FFFF, reads U+2028 in a
    text as a line break, accepts what is no JSON, and takes four times as long (3.4 s against 0.7 s for 20,000
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
        Fault(path, "is there twice", "keep one of the two", line_at(position))
        for path, position in places.repeated
    )
    return Decoded(value, lambda path: line_at(find_part(tree, path)), faults)


def _first_of_each(pairs: Iterable[tuple[str, _T]]) -> dict[str, _T]:
    values: dict[str, _T] = {}
    for key, value in pairs:
        values.setdefault(key, value)
    return values


class _Places:
    """Where the parts of a JSON text are; `repeated` are the keys that are there twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _TOKEN.finditer(text)
        self.repeated: list[tuple[Path, int]] = []

    def tree(self, token: re.Match[str], path: Path) -> Tree:
        """The value that begins with that token."""
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
    """Reads files named by records; a relative name is looked up in `directory`."""

    def read(field: Field) -> bytes:
        path = directory / field.value
        try:
            # Asked first: opening a FIFO would wait for ever, and reading a device would never end.
            if not path.is_file():
                hint = "an absolute path, or one beside the record file"
                none = f"{path} is no regular file" if path.exists() else f"there is no file {path}"
                raise field.error(none, hint)
            if path.stat().st_size > MAX_PAYLOAD:
                raise field.error(f"{path} is larger than {MAX_PAYLOAD} bytes", "at most 16 MiB")
            data: bytes = path.read_bytes()
        except OSError as error:
            reason = f"{path} cannot be read: {error.strerror}"
            raise field.error(reason, "mend its permissions") from error
        return data

    return read
