"""Record files: bytes in, records out, and every problem with its file and line.

The file source, the command line's `--file` and the tests read them all through here.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Final, TypeAlias

from imdsproxy.config.strict_yaml import Decoded, Undecodable, decode_yaml
from imdsproxy.core.model import Instance, Network
from imdsproxy.core.records import (
    LISTS,
    MAX_PAYLOAD,
    LineOf,
    Note,
    Path,
    ReadFile,
    Records,
    Refused,
    Unreadable,
    parse_listed,
    parse_records,
)
from imdsproxy.errors import Problem
from imdsproxy.sources.file.strict_json import decode_json

_NOTED: Final = 500

SUFFIXES = (".yaml", ".yml", ".json")
"""How the names of record files end."""


TakeRecord: TypeAlias = "Callable[[Path, Network | Instance | Refused, LineOf, float], None]"
"""Takes a record, its path in the file, and how much of the file has been read, from 0 to 1."""


def decode_records(
    data: bytes,
    *,
    file: str,
    read_file: ReadFile | None = None,
    note: Note | None = None,
    take: TakeRecord | None = None,
) -> tuple[Records, LineOf]:
    """The records of a file, and where each part of it stands.

    Args:
        data: The file's bytes: UTF-8, JSON where `file` ends so, else YAML.
        file: Its name, for the problems.
        read_file: Reads what `user_data_file` names (`payload_reader`); without it the key is refused.
        note: Given the number of records that were checked, of how many; of a YAML file the latter is estimated.
        take: Given the records of a YAML file one by one, as far as they can be; the others are returned. What it
            got holds only if the file itself has no problems.
    """
    found: list[tuple[Path, Network | Instance | Refused]] = []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"is not UTF-8: byte {data[error.start]:#04x}"
        return _undecodable(
            Undecodable(reason, "save it as UTF-8; binary goes as !!binary", line), file
        )

    def take_item(path: Path, item: Decoded, share: float) -> None:
        record = parse_listed(
            path,
            item.value,
            read_file=read_file,
            file=file,
            line_of=item.line_of,
            faults=item.faults,
        )
        if take is not None:
            take(path, record, item.line_of, share)
            return
        found.append((path, record))
        if note is not None and len(found) % _NOTED == 0:
            note(len(found), max(len(found), round(len(found) / share)))

    # YAML record by record: the tree of a large file is 60 times its size.
    decoded = (
        decode_json(text)
        if file.endswith(".json")
        else decode_yaml(text, lists=LISTS, take=take_item)
    )
    if isinstance(decoded, Undecodable):
        return _undecodable(decoded, file)
    records = parse_records(
        decoded.value,
        read_file=read_file,
        file=file,
        line_of=decoded.line_of,
        faults=decoded.faults,
        note=note,
    )
    return records.with_listed(found), decoded.line_of


def _undecodable(fault: Undecodable, file: str) -> tuple[Records, LineOf]:
    problem = Problem("file", fault.reason, fault.hint, file, fault.line)
    return Records(problems=(problem,)), lambda _path: None


def payload_reader(directory: pathlib.Path) -> ReadFile:
    """Reads files named by records; a relative name is looked up in `directory`."""

    def read(name: str) -> bytes | Unreadable:
        path = directory / name
        try:
            # Asked first: opening a FIFO would wait for ever, and reading a device would never end.
            if not path.is_file():
                return Unreadable(_missing(path), "an absolute path, or one beside the record file")
            if path.stat().st_size > MAX_PAYLOAD:
                return Unreadable(f"{path} is larger than {MAX_PAYLOAD} bytes", "at most 16 MiB")
            return path.read_bytes()
        except OSError as error:
            return Unreadable(f"{path} cannot be read: {error.strerror}", "mend its permissions")

    return read


def _missing(path: pathlib.Path) -> str:
    return f"{path} is no regular file" if path.exists() else f"there is no file {path}"
