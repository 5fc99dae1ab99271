"""Reader of record files. A separate process reads large files.

Reading a file of 50 MB takes Python gigabytes and minutes. With a separate process the event loop does not wait, and
the memory is freed afterwards.
"""

import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Final, TypeAlias, cast

import structlog

from imdsproxy.errors import Problem
from imdsproxy.model.claims import claim_places
from imdsproxy.model.entities import Instance, Network
from imdsproxy.model.packed import PackedInstance
from imdsproxy.model.records import LISTS
from imdsproxy.model.records import Path as PathInFile
from imdsproxy.model.records.schema import Field, LineOf, Refused
from imdsproxy.reconcile.progress import Progress
from imdsproxy.sources.file.record_file import payload_reader, read_records
from imdsproxy.sources.in_force import Entry

Signature: TypeAlias = "tuple[int, ...] | None"

_LARGEST: Final = 512 * 1024 * 1024
_APART: Final = 1024 * 1024
"""Minimum size in bytes of files read by a separate process."""

_TOGETHER: Final = 200
_CHILD: Final = f"import sys; from {__name__} import send_contents; send_contents(sys.argv[1])"


_Take: TypeAlias = "Callable[[str, Entry[Any], float], None]"
"""Receives the kind of a record, its entry, and the share of the file read so far."""


@dataclass(slots=True)
class FileContents:
    """Content of a record file.

    Attributes:
        entries: Entries by kind (`networks` or `instances`), in the file's order; instances are `PackedInstance`.
        payloads: Files that the records name, with their signatures when read.
        problems: Problems of the whole file; if there are any, its records do not count.
        nameless: Problems of records whose id cannot be read, by kind.
    """

    entries: dict[str, list[Entry[Any]]] = field(
        default_factory=lambda: {kind: [] for kind in LISTS}
    )
    payloads: dict[Path, Signature] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    blank: bool = False
    nameless: dict[str, tuple[Problem, ...]] = field(
        default_factory=lambda: dict.fromkeys(LISTS, ())
    )


def read_contents(path: Path, progress: Progress) -> FileContents:
    """Read a file and report the progress of a large file. Blocks."""
    signature = signature_of(path)
    if signature is not None and _APART <= signature[1] <= _LARGEST:
        return _read_apart(path, progress)
    contents = FileContents()
    _read(path, contents, lambda kind, entry, _share: contents.entries[kind].append(entry))
    return contents


def _read(path: Path, contents: FileContents, take_entry: _Take) -> None:
    """Read a file in this process. Pass its entries to `take_entry`, and store everything else in `contents`."""
    read = payload_reader(path.parent)

    def read_payload(field: Field) -> bytes:
        payload = path.parent / field.value
        contents.payloads[payload] = signature_of(payload)
        return read(field)

    def take(
        place: PathInFile, record: Network | Instance | Refused, line_of: LineOf, share: float
    ) -> None:
        kind = str(place[0])
        if isinstance(record, Refused) and record.id is None:
            contents.nameless[kind] += record.problems
            return
        take_entry(kind, _entry(record, path.name, place, line_of), share)

    try:
        data = _read_regular(path)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        contents.problems = (Problem("file", reason, "correct or remove the file", str(path)),)
    else:
        contents.blank = not data.strip()
        contents.problems = read_records(data, file=str(path), take=take, read_file=read_payload)


def _entry(
    record: Network | Instance | Refused, file: str, place: PathInFile, line_of: LineOf
) -> Entry[Any]:
    position = int(place[1])
    if isinstance(record, Refused):
        return Entry(str(record.id), file, position, problems=record.problems)
    line = line_of(place)
    if isinstance(record, Network):
        return Entry(record.id, file, position, line, record)
    lines = (line_of((*place, *part)) for _, part in claim_places(record))
    offsets = tuple(None if one is None else one - (line or 0) for one in lines)
    return Entry(
        record.id, file, position, line, PackedInstance.of(record), offsets=_share(offsets)
    )


@lru_cache
def _share(offsets: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return offsets


def _read_apart(path: Path, progress: Progress) -> FileContents:
    entries = FileContents().entries
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
                for kind, entry in part[0]:
                    entries[kind].append(entry)
        except (EOFError, pickle.UnpicklingError):
            part = None
        except BaseException:
            process.kill()
            raise
        finally:
            progress.end(step)
    if part is None:
        reason = f"the process that read it ended with status {process.returncode}"
        hint = "split the file, or check for a lack of memory (dmesg)"
        return FileContents(problems=(Problem("file", reason, hint, str(path)),))
    log.info("read a large record file")
    contents: FileContents = part[0]
    contents.entries = entries
    return contents


def send_contents(path: str) -> None:
    """Write the content of a file to standard output, for the parent process.

    It is written in parts, to limit memory in both processes and to let the parent's other threads run.
    """
    contents, waiting = FileContents(), list[tuple[str, Entry[Any]]]()

    def send(what: object, share: float | None) -> None:
        pickle.dump((what, share), sys.stdout.buffer)
        sys.stdout.buffer.flush()

    def take_entry(kind: str, entry: Entry[Any], share: float) -> None:
        waiting.append((kind, entry))
        if len(waiting) >= _TOGETHER:
            send(waiting, share)
            waiting.clear()

    _read(Path(path), contents, take_entry)
    send(waiting, 1)
    send(contents, None)


def signature_of(path: Path) -> Signature:
    """Return a file's signature, which differs after a change; `None` if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns, status.st_dev)


def _read_regular(path: Path) -> bytes:
    # O_NONBLOCK, because opening a FIFO would wait for a writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        if status.st_size > _LARGEST:
            raise OSError(f"it is larger than {_LARGEST} bytes")
        return stream.read()
