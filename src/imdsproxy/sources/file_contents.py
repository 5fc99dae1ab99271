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
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, TypeAlias

import structlog

from imdsproxy.errors import Problem
from imdsproxy.sources.clash import claim_places
from imdsproxy.sources.in_force import Entry
from imdsproxy.sources.record_file import decode_records, payload_reader

if TYPE_CHECKING:
    from imdsproxy.core.model import Instance, Network
    from imdsproxy.core.records import Refused, Unreadable

__all__ = ["FileContents", "Signature", "read_contents", "send_contents", "signature_of"]

Signature: TypeAlias = "tuple[int, ...] | None"

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
        nameless_networks: What is wrong with networks whose id cannot be read.
        nameless_instances: The same of instances.
    """

    networks: list[Entry[Network]] = field(default_factory=list)
    instances: list[Entry[Instance]] = field(default_factory=list)
    payloads: dict[Path, Signature] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    blank: bool = False
    nameless_networks: tuple[Problem, ...] = ()
    nameless_instances: tuple[Problem, ...] = ()


def read_contents(path: Path) -> FileContents:
    """Read a file; blocks for as long as that takes."""
    signature = signature_of(path)
    if signature is None or not _APART <= signature[1] <= _LARGEST:
        return _read(path)
    log = structlog.get_logger().bind(file=str(path), bytes=signature[1])
    log.info("reading a large record file")
    command = [sys.executable, "-P", "-c", _CHILD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            contents = None if process.stdout is None else _receive(process.stdout)
        except (EOFError, pickle.UnpicklingError):
            contents = None
        except BaseException:
            process.kill()
            raise
    if contents is None:
        reason = f"the process that read it ended with status {process.returncode}"
        hint = "split the file, or look for a lack of memory (dmesg)"
        return FileContents(problems=(Problem("file", reason, hint, str(path)),))
    log.info("read", networks=len(contents.networks), instances=len(contents.instances))
    return contents


def _read(path: Path) -> FileContents:
    contents = FileContents()
    read = payload_reader(path.parent)

    def read_payload(payload: str) -> bytes | Unreadable:
        contents.payloads[path.parent / payload] = signature_of(path.parent / payload)
        return read(payload)

    try:
        data = _read_regular(path)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        contents.problems = (Problem("file", reason, "mend or remove it", str(path)),)
        return contents
    contents.blank = not data.strip()
    records, line_of = decode_records(data, file=str(path), read_file=read_payload)
    contents.problems = records.problems
    contents.networks += [
        Entry(network.id, path.name, _position(place), line_of(place), network)
        for place, network in records.networks
    ]
    contents.instances += [
        Entry(
            instance.id,
            path.name,
            _position(place),
            line_of(place),
            instance,
            lines=tuple(line_of((*place, *part)) for _, part in claim_places(instance)),
        )
        for place, instance in records.instances
    ]
    contents.nameless_networks = _add_refused(
        contents.networks, path.name, records.refused_networks
    )
    contents.nameless_instances = _add_refused(
        contents.instances, path.name, records.refused_instances
    )
    return contents


def _add_refused(
    entries: list[Entry[Network]] | list[Entry[Instance]], name: str, refused: tuple[Refused, ...]
) -> tuple[Problem, ...]:
    nameless: list[Problem] = []
    for each in refused:
        if each.id is None:
            nameless += each.problems
        else:
            entries.append(Entry(each.id, name, len(entries), problems=each.problems))
    return tuple(nameless)


def _position(path: tuple[str | int, ...]) -> int:
    return path[1] if len(path) > 1 and isinstance(path[1], int) else 0


def send_contents(path: str) -> None:
    """Write what a file holds to standard output, for the process that started this one.

    In parts: to take in all of it at once would hold up the reader's other threads.
    """
    contents, stream = _read(Path(path)), sys.stdout.buffer
    networks, instances = iter(contents.networks), iter(contents.instances)
    contents.networks, contents.instances = [], []
    pickle.dump(contents, stream)
    while part := (list(islice(networks, _TOGETHER)), list(islice(instances, _TOGETHER))):
        pickle.dump(part, stream)
        if not any(part):
            return


def _receive(stream: IO[bytes]) -> FileContents:
    contents: FileContents = pickle.load(stream)  # noqa: S301 - our own process wrote it
    while any(part := pickle.load(stream)):  # noqa: S301 - as above
        contents.networks += part[0]
        contents.instances += part[1]
    return contents


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
