"""What a record file holds, read here or, where it is large, by another process.

A file of 50 MB takes gigabytes and minutes of Python to read. In a process of its own neither the event loop waits for
it, nor does the memory stay.
"""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Final, TypeAlias, cast

import structlog

from imdsproxy.core.model import Instance, Network
from imdsproxy.core.packed import PackedInstance
from imdsproxy.core.records import Field, LineOf, Refused
from imdsproxy.core.records import Path as PathInFile
from imdsproxy.core.timing import Progress
from imdsproxy.errors import Problem
from imdsproxy.sources.file.record_file import payload_reader, read_records
from imdsproxy.sources.in_force import Entry, claim_places

Signature: TypeAlias = "tuple[int, ...] | None"

_Send: TypeAlias = "Callable[[FileContents, float], None]"
"""Takes some records, and the share of the file that is read."""

_LARGEST: Final = 512 * 1024 * 1024
_APART: Final = 1024 * 1024
"""Bytes from which on a process is worth its start."""

_TOGETHER: Final = 200
_CHILD: Final = f"import sys; from {__name__} import send_contents; send_contents(sys.argv[1])"


@dataclass(slots=True)
class FileContents:
    """A file's records in order.

    Attributes:
        payloads: The files that its records name, with their state when they were read.
        problems: What is wrong with it as a whole; then it has no records.
        blank: There is nothing in it at all.
        nameless: What is wrong with records whose id cannot be read, by kind.
    """

    networks: list[Entry[Network]] = field(default_factory=list)
    instances: list[Entry[PackedInstance]] = field(default_factory=list)
    payloads: dict[Path, Signature] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    blank: bool = False
    nameless: dict[str, tuple[Problem, ...]] = field(
        default_factory=lambda: {"networks": (), "instances": ()}
    )


def read_contents(path: Path, progress: Progress) -> FileContents:
    """Read a file; blocks for as long as that takes. `progress` shows how far a large one is."""
    networks: list[Entry[Network]] = []
    instances: list[Entry[PackedInstance]] = []

    def keep(part: FileContents, _share: float) -> None:
        networks.extend(part.networks)
        instances.extend(part.instances)

    signature = signature_of(path)
    apart = signature is not None and _APART <= signature[1] <= _LARGEST
    contents = _read_apart(path, keep, progress) if apart else _read(path, keep)
    if not contents.problems:
        contents.networks, contents.instances = networks, instances
    return contents


def _read(path: Path, send: _Send) -> FileContents:
    """Read a file here; what is not `send` its records, some at a time."""
    contents = FileContents()
    read = payload_reader(path.parent)

    def read_payload(field: Field) -> bytes:
        payload = path.parent / field.value
        contents.payloads[payload] = signature_of(payload)
        return read(field)

    def take(
        place: PathInFile, record: Network | Instance | Refused, line_of: LineOf, share: float
    ) -> None:
        _add(contents, path.name, place, record, line_of)
        if len(contents.networks) + len(contents.instances) >= _TOGETHER:
            send(FileContents(contents.networks, contents.instances), share)
            contents.networks, contents.instances = [], []

    try:
        data = _read_regular(path)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        contents.problems = (Problem("file", reason, "mend or remove it", str(path)),)
        return contents
    contents.blank = not data.strip()
    contents.problems = read_records(data, file=str(path), take=take, read_file=read_payload)
    send(FileContents(contents.networks, contents.instances), 1)
    return replace(contents, networks=[], instances=[])


def _read_apart(path: Path, keep: _Send, progress: Progress) -> FileContents:
    log = structlog.get_logger().bind(file=str(path))
    log.info("reading a large record file")
    step = f"reading {path}, percent"
    progress.note(step, 0, 100)
    command = [sys.executable, "-P", "-c", _CHILD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        stream = cast("IO[bytes]", process.stdout)
        try:
            while (part := pickle.load(stream))[1] is not None:  # noqa: S301 - our own process wrote it
                progress.note(step, int(part[1] * 100), 100)
                keep(*part)
        except (EOFError, pickle.UnpicklingError):
            part = None
        except BaseException:
            process.kill()
            raise
        finally:
            progress.end(step)
    if part is None:
        reason = f"the process that read it ended with status {process.returncode}"
        hint = "split the file, or look for a lack of memory (dmesg)"
        return FileContents(problems=(Problem("file", reason, hint, str(path)),))
    log.info("read")
    contents: FileContents = part[0]
    return contents


def send_contents(path: str) -> None:
    """Write what a file holds to standard output, for the process that started this one.

    In parts, so that neither process has more of it in memory than it must, and the reader's other threads go on.
    """

    def send(*part: object) -> None:
        pickle.dump(part, sys.stdout.buffer)
        sys.stdout.buffer.flush()

    send(_read(Path(path), send), None)


def _add(
    contents: FileContents,
    name: str,
    place: PathInFile,
    record: Network | Instance | Refused,
    line_of: LineOf,
) -> None:
    kind, position = str(place[0]), _position(place)
    if isinstance(record, Refused):
        if record.id is None:
            contents.nameless[kind] += record.problems
        else:
            refused: Entry[Any] = Entry(record.id, name, position, problems=record.problems)
            (contents.networks if kind == "networks" else contents.instances).append(refused)
    elif isinstance(record, Network):
        entry = Entry(record.id, name, position, line_of(place), record)
        contents.networks.append(entry)
    else:
        first = line_of(place) or 0
        lines = (line_of((*place, *part)) for _, part in claim_places(record))
        offsets = tuple(None if one is None else one - first for one in lines)
        contents.instances.append(
            Entry(
                record.id,
                name,
                position,
                line_of(place),
                PackedInstance.of(record),
                offsets=_share(offsets),
            )
        )


@lru_cache
def _share(offsets: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return offsets


def _position(path: tuple[str | int, ...]) -> int:
    return path[1] if len(path) > 1 and isinstance(path[1], int) else 0


def signature_of(path: Path) -> Signature:
    """A file's state, by which a change shows; `None` where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns, status.st_dev)


def _read_regular(path: Path) -> bytes:
    # Not blocking: opening a FIFO would wait for a writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if status.st_size > _LARGEST:
            raise OSError(f"it is larger than {_LARGEST} bytes")
        return stream.read()
