"""Records as values of the core: of `--file`, checked here with file and line and sent as JSON, and of the daemon."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from imdsproxy.cli.admin_client import AdminClient, path_to
from imdsproxy.core.model import Instance, Network
from imdsproxy.core.records import Refused, parse_instance, parse_network, render_record
from imdsproxy.errors import AdminError, RequestRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imdsproxy.cli.output import Note
    from imdsproxy.core.records import Records

_LINES: Final = 100

STDIN: Final = Path("-")


def read_bytes(path: Path) -> bytes:
    """A file's bytes, or standard input's for `-`; `RequestRefused` where it cannot be read."""
    try:
        return sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
    except OSError as error:
        raise RequestRefused(f"cannot read {path}: {error.strerror}") from error


def read_record_file(path: Path, note: Note) -> Records:
    """Every record of the file, or `RequestRefused` with all problems.

    `user_data_file` is read here, relative to the file: the daemon reads no file for a caller.
    """
    from imdsproxy.sources.file.record_file import (  # noqa: PLC0415 - `--help` need not load YAML
        decode_records,
        payload_reader,
    )

    name = "standard input" if path == STDIN else str(path)
    folder = Path.cwd() if path == STDIN else path.parent
    note(f"reading {name}", 0, 0)
    records, _ = decode_records(
        read_bytes(path),
        file=name,
        read_file=payload_reader(folder),
        note=lambda done, of: note(f"checking {name}", done, of),
    )
    if records.all_problems:
        raise RequestRefused(f"{name} is not acceptable", problems=records.all_problems)
    if not records.networks and not records.instances:
        raise RequestRefused(
            f"{name} holds no records", hint="it needs a list `networks:` or `instances:`"
        )
    return records


def render_lines(records: Records, note: Note) -> Iterator[bytes]:
    """The body of a bulk request: a record a line, some thousand bytes at a time."""
    lines: list[str] = []
    networks = ({"network": render_record(network)} for _, network in records.networks)
    instances = ({"instance": render_record(instance)} for _, instance in records.instances)
    of = len(records.networks) + len(records.instances)
    for done, record in enumerate(chain(networks, instances), 1):
        lines.append(f"{json.dumps(record)}\n")
        if len(lines) == _LINES or done == of:
            note("sending records", done, of)
            yield "".join(lines).encode()
            lines.clear()


def read_instance(daemon: AdminClient, instance: str) -> Instance:
    """One instance.

    Raises:
        NotFound: There is none of that id.
        AdminError: The daemon is of another version, and its records are not understood.
    """
    record = _record(daemon, "instances", instance)
    read = parse_instance(record)
    if isinstance(read, Refused):
        raise _unread("instance", instance)
    return read


def read_network(daemon: AdminClient, network: str) -> Network:
    """One network; raises as `read_instance`."""
    read = parse_network(_record(daemon, "networks", network))
    if isinstance(read, Refused):
        raise _unread("network", network)
    return read


def read_networks(daemon: AdminClient) -> list[Network]:
    """All networks; raises as `read_network`."""
    found: list[Network] = []
    for shape in cast("Sequence[Mapping[str, Mapping[str, object]]]", daemon.get("/v1/networks")):
        read = parse_network(shape["record"])
        if isinstance(read, Refused):
            raise _unread("network", str(shape["record"].get("id")))
        found.append(read)
    return found


def _record(daemon: AdminClient, kind: str, name: str) -> object:
    shape = cast("Mapping[str, object]", daemon.get(path_to(kind, name)))
    return shape["record"]


def _unread(what: str, name: str) -> AdminError:
    return AdminError(
        f"the daemon's record of {what} {name} is not understood",
        hint="is the daemon of the same version as this command?",
    )
