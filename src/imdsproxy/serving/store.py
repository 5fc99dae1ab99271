"""Files of instances: compiled records, written by the controller, and passwords, written by the document server.

A record is replaced by a rename, so a reader sees the old file or the new one, whole. Nothing is synced to
the disk: after a power cut a record may be damaged, which its checksums show, and the controller writes it anew
from its source when it starts. A guest encrypts its password with its ssh key and posts it
(`/openstack/…/password`); the owner reads it. It is posted once in an instance's life, so it is synced to the disk
before the guest gets its answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from imdsproxy.core.compiled import CompiledRecord, compiled_path, parse_compiled
from imdsproxy.core.documents.respond import DocumentTree
from imdsproxy.core.model import InstanceId
from imdsproxy.errors import HostRefused
from imdsproxy.host.files import ensure_directory, remove_file, sync_directory, write_atomic
from imdsproxy.host.refusal import host_refused

_SUFFIX: Final = ".rec"
_FILE_MODE: Final = 0o640
_DIRECTORY_MODE: Final = 0o750
_KEPT_CONTENT: Final = 256 * 1024
"""Bytes of content that are kept in memory with a record; from longer ones user-data is read when asked for."""

_TREE_COST: Final = 32 * 1024
"""What a parsed record with its documents is reckoned at, in bytes; measured: 10 to 30 kB."""

_PERMISSION_HINT: Final = "the document server's account must be able to write the directory"
_DENIED: Final = "check the owner and mode of it"

_Signature: TypeAlias = tuple[int, int, int]


def apply_record(
    directory: Path, instance_id: InstanceId, record: CompiledRecord, *, group: int | None = None
) -> bool:
    """Have the instance's record on disk; `True` when it had to be written.

    Args:
        directory: The documents directory; made if need be.
        instance_id: Whose record it is.
        record: What is to be there.
        group: The group id that may read it (the document server's); `None` leaves it.

    Raises:
        HostRefused: The file system is full or read-only; what was there before still is.
        PrivilegeMissing: This process may not write there.
    """
    if _has_content(f"{directory}/{compiled_path(instance_id)}", record.content):
        return False
    path = directory / compiled_path(instance_id)
    owner = None if group is None else (-1, group)
    try:
        write_atomic(path, record.content, mode=_FILE_MODE, owner=owner)
    except HostRefused:
        if path.parent.is_dir():
            raise
        ensure_directory(directory, mode=_DIRECTORY_MODE, owner=owner)
        ensure_directory(path.parent, mode=_DIRECTORY_MODE, owner=owner)
        write_atomic(path, record.content, mode=_FILE_MODE, owner=owner)
    return True


def _has_content(path: str, content: bytes) -> bool:
    # By descriptor: a start looks at all records, and `Path` would take three times as long.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        # Whatever keeps it from being read, writing it anew mends or reports it.
        return False
    try:
        return os.read(descriptor, len(content) + 1) == content
    except OSError:
        return False
    finally:
        os.close(descriptor)


def remove_record(directory: Path, instance_id: InstanceId) -> bool:
    """Take the instance's record away; `False` when there was none.

    Raises:
        HostRefused: The file system is read-only.
        PrivilegeMissing: This process may not write there.
    """
    path = directory / compiled_path(instance_id)
    return remove_file(path, f"remove the compiled record {path}", denied=_DENIED)


def list_records(directory: Path) -> Iterator[InstanceId]:
    """The instances that have a record, in no order.

    Raises:
        HostRefused: The directory cannot be read.
        PrivilegeMissing: This process may not read it.
    """
    try:
        for shard in os.scandir(directory):
            for entry in os.scandir(shard.path) if shard.is_dir() else ():
                if entry.name.endswith(_SUFFIX) and not entry.name.startswith("."):
                    yield InstanceId(entry.name.removesuffix(_SUFFIX))
    except FileNotFoundError:
        return
    except OSError as error:
        action = f"list the compiled records in {directory}"
        raise host_refused(action, error, denied=_DENIED) from error


@dataclass(frozen=True, slots=True)
class LoadedRecord:
    """A record in memory.

    Attributes:
        content: The file's bytes, or `None` where they are too many to be kept.
    """

    path: Path
    tree: DocumentTree
    content: bytes | None
    signature: _Signature

    @property
    def cost(self) -> int:
        """Roughly the bytes of memory that it takes."""
        vendor_data = self.tree.record["vendor_data"] or b""
        return _TREE_COST + len(vendor_data) + len(self.content or b"")


class RecordReader:
    """Gives records, parsed; keeps those that were asked for last, and looks each time whether they still hold.

    Args:
        directory: The documents directory.
        capacity: Bytes of memory to spend on records; one record is always kept.
    """

    def __init__(self, directory: Path, *, capacity: int) -> None:
        self._directory = directory
        self._capacity = capacity
        self._loaded: dict[InstanceId, LoadedRecord] = {}
        self._spent = 0

    def load(self, instance_id: InstanceId, *, fresh: bool = False) -> LoadedRecord | None:
        """The instance's record as it is on disk now; `None` when it has none.

        Args:
            instance_id: Whose record.
            fresh: Read the file even if it looks the same as before.

        Raises:
            RecordCorrupt: It fails a checksum.
            HostRefused: It cannot be read.
            PrivilegeMissing: This process may not read it.
        """
        held = self._loaded.pop(instance_id, None)
        self._spent -= 0 if held is None else held.cost
        if held is None or fresh or not self._still_holds(held):
            held = self._read(instance_id)
        if held is not None:
            self._loaded[instance_id] = held
            self._spent += held.cost
            while self._spent > self._capacity and len(self._loaded) > 1:
                self._spent -= self._loaded.pop(next(iter(self._loaded))).cost
        return held

    def open_content(self, loaded: LoadedRecord) -> BinaryIO | None:
        """The record's file, to read pieces of; `None` when it has been replaced since it was loaded.

        Raises:
            HostRefused: It cannot be read.
            PrivilegeMissing: This process may not read it.
        """
        file = _open(loaded.path)
        if file is None:
            return None
        if _signature(os.fstat(file.fileno())) != loaded.signature:
            file.close()
            return None
        return file

    @staticmethod
    def _still_holds(loaded: LoadedRecord) -> bool:
        try:
            return _signature(os.stat(loaded.path)) == loaded.signature  # noqa: PTH116 - half the cost of Path.stat, on every request
        except OSError:
            return False

    def _read(self, instance_id: InstanceId) -> LoadedRecord | None:
        path = self._directory / compiled_path(instance_id)
        file = _open(path)
        if file is None:
            return None
        with file:
            signature = _signature(os.fstat(file.fileno()))
            content = file.read()
        record = parse_compiled(content)
        kept = content if len(content) <= _KEPT_CONTENT else None
        return LoadedRecord(path, DocumentTree(record), kept, signature)


def _open(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        action = f"read the compiled record {path}"
        raise host_refused(action, error, denied=_DENIED) from error


def _signature(status: os.stat_result) -> _Signature:
    return status.st_mtime_ns, status.st_ino, status.st_size


@dataclass(slots=True)
class DiskFiles:
    """Compiled records and passwords, as the record loop writes them.

    Args:
        directory: Of the records.
        passwords: Of their instances.
        group: Who may read them; `None` for this process's.
    """

    directory: Path
    passwords: PasswordStore
    group: int | None

    def apply(self, instance: InstanceId, record: CompiledRecord) -> None:
        """Write exactly this record."""
        apply_record(self.directory, instance, record, group=self.group)

    def remove(self, instance: InstanceId) -> None:
        """Remove the record and the password of the instance."""
        remove_record(self.directory, instance)
        self.passwords.remove(instance)

    def instances(self) -> Iterable[InstanceId]:
        """Every instance that has a record on disk."""
        return list_records(self.directory)


class PasswordStore:
    """A directory of passwords; several processes may use it at once.

    Args:
        directory: Must exist, and be writable for this process to keep anything.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, instance_id: InstanceId) -> bytes | None:
        """The instance's password; `None` when it has posted none.

        Raises:
            HostRefused: It cannot be read.
            PrivilegeMissing: This process may not read it.
        """
        try:
            # The directory is the document server's: a link in it must not have the controller read another file.
            descriptor = os.open(
                self._path(instance_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            )
            with os.fdopen(descriptor, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            action = f"read the password of {instance_id}"
            raise host_refused(action, error, denied=_PERMISSION_HINT) from error

    def keep(self, instance_id: InstanceId, password: bytes) -> bool:
        """Keep a password for good; `False` when the instance has one already, which stays.

        Of two that come at once, one is kept, and no reader ever sees a part of it.

        Raises:
            HostRefused: The file system is full or read-only; nothing is kept.
            PrivilegeMissing: This process may not write there.
        """
        path = self._path(instance_id)
        new = path.with_name(f".{path.name}.{threading.get_native_id()}.new")
        write_atomic(new, password, mode=_FILE_MODE, durable=True)
        try:
            # A link fails where the name exists, as O_EXCL does, but brings the whole file with it.
            path.hardlink_to(new)
        except FileExistsError:
            return False
        except OSError as error:
            action = f"keep the password of {instance_id}"
            raise host_refused(action, error, denied=_PERMISSION_HINT) from error
        finally:
            new.unlink(missing_ok=True)
        sync_directory(self._directory)
        return True

    def remove(self, instance_id: InstanceId) -> bool:
        """Forget the instance's password; `False` when it has none.

        Raises:
            HostRefused: The file system is read-only.
            PrivilegeMissing: This process may not write there.
        """
        action = f"remove the password of {instance_id}"
        return remove_file(self._path(instance_id), action, denied=_PERMISSION_HINT)

    def _path(self, instance_id: InstanceId) -> Path:
        return self._directory / instance_id
