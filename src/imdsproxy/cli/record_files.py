"""`--file`: records in YAML or JSON, checked here with file and line, sent as JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from imdsproxy.core.records import render_record
from imdsproxy.errors import RequestRefused
from imdsproxy.sources.record_file import decode_records, payload_reader

if TYPE_CHECKING:
    from imdsproxy.core.records import Json

__all__ = ["STDIN", "read_bytes", "read_record_file"]

STDIN: Final = Path("-")


def read_bytes(path: Path) -> bytes:
    """A file's bytes, or standard input's for `-`; `RequestRefused` where it cannot be read."""
    try:
        return sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
    except OSError as error:
        raise RequestRefused(f"cannot read {path}: {error.strerror}") from error


def read_record_file(path: Path) -> dict[str, Json]:
    """The body of a bulk request: every record of the file, or `RequestRefused` with all problems.

    `user_data_file` is read here, relative to the file: the daemon reads no file for a caller.
    """
    name = "standard input" if path == STDIN else str(path)
    folder = Path.cwd() if path == STDIN else path.parent
    records, _ = decode_records(read_bytes(path), file=name, read_file=payload_reader(folder))
    if records.all_problems:
        raise RequestRefused(f"{name} is not acceptable", problems=records.all_problems)
    if not records.networks and not records.instances:
        raise RequestRefused(
            f"{name} holds no records", hint="it needs a list `networks:` or `instances:`"
        )
    return {
        "networks": [render_record(network) for _, network in records.networks],
        "instances": [render_record(instance) for _, instance in records.instances],
    }
