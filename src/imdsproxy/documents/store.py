"""Files of instances: compiled records, written by the controller, and passwords, written by the document server.

A record is replaced by a rename, so a reader sees the whole old file or the whole new one. Records are not synced to
disk: after a power cut a record may be damaged. Its checksums reveal that, and the controller writes it again from its
source at the next start. A guest encrypts its password with its ssh key and posts it (`/openstack/…/password`), so that
the owner can read it. The guest posts it once in an instance's life, so it is synced to disk before the guest gets its
answer.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from imdsproxy.documents.compiled import CompiledRecord, compiled_path, parse_compiled
from imdsproxy.documents.dialects.respond import DocumentTree
from imdsproxy.errors import refusing
from imdsproxy.host import files
from imdsproxy.model.entities import InstanceId

_SUFFIX: Final = ".rec"
_FILE_MODE: Final = 0o640
_DIRECTORY_MODE: Final = 0o750
_KEPT_CONTENT: Final = 256 * 1024
"""Maximum size in bytes of content kept in memory with its record; user-data of longer content is read on request."""

_TREE_COST: Final = 32 * 1024
"""Assumed memory of a parsed record with its documents, in bytes; measured: 10 to 30 kB."""

_PERMISSION_HINT: Final = "the document server's account must be able to write the directory"
_DENIED: Final = "check its owner and mode"

Signature: TypeAlias = tuple[int, int, int]


def read_signature(path: str | Path) -> Signature | None:
    """Return the file's signature, which changes when the file is replaced; `None` if there is no file."""
    with suppress(OSError):
        return _signature(os.stat(path))  # noqa: PTH116 - half the cost of Path.stat, on every request
    return None


def _signature(status: os.stat_result) -> Signature:
    return status.st_mtime_ns, status.st_ino, status.st_size


@dataclass(frozen=True, slots=True)
class PasswordStore:
    """Directory of passwords, which must exist; several processes may use it at once."""

    directory: Path

    def read(self, instance_id: InstanceId) -> bytes | None:
        """Return the instance's password, `None` if it has none; raise `HostRefused` if the file is unreadable."""
        action = f"read the password of {instance_id}"
        # The document server owns the directory: a symbolic link in it must not make the controller read another file.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with (
            refusing(action, denied=_PERMISSION_HINT),
            suppress(FileNotFoundError),
            os.fdopen(os.open(self._path(instance_id), flags), "rb") as file,
        ):
            return file.read()
        return None

    def keep(self, instance_id: InstanceId, password: bytes) -> bool:
        """Store a password for good; return `False` if the instance already has one, which stays.

        If two passwords arrive at once, one is stored, and no reader sees a part of it. Raises `HostRefused` if the
        file system is full or read-only; nothing is stored.
        """
        path = self._path(instance_id)
        new = path.with_name(f".{path.name}.{threading.get_native_id()}.new")
        files.write_atomic(new, password, mode=_FILE_MODE, durable=True)
        kept, action = False, f"keep the password of {instance_id}"
        with refusing(action, denied=_PERMISSION_HINT), suppress(FileExistsError):
            try:
                # Like O_EXCL, a hard link fails if the name exists, but it makes the whole file appear at once.
                path.hardlink_to(new)
                kept = True
            finally:
                new.unlink(missing_ok=True)
        if kept:
            files.sync_directory(self.directory)
        return kept

    def replace(self, instance_id: InstanceId, password: bytes, group: int | None) -> None:
        """Store this password in place of any other, readable for the group; raises as `keep`."""
        # Write the file outside the directory: inside, the document server could create another file with that name.
        new = self.directory.with_name(f".password-{instance_id}.new")
        owner = None if group is None else (-1, group)
        files.write_atomic(new, password, mode=_FILE_MODE, owner=owner, durable=True)
        with refusing(f"keep the password of {instance_id}", denied=_PERMISSION_HINT):
            new.replace(self._path(instance_id))
        files.sync_directory(self.directory)

    def instances(self) -> frozenset[InstanceId]:
        """Return every instance that has a password here; raises as `read`."""
        with refusing("list the passwords", denied=_PERMISSION_HINT), suppress(FileNotFoundError):
            return frozenset(InstanceId(path.name) for path in self.directory.iterdir())
        return frozenset()

    def changed_at(self) -> int:
        """Return the time of the directory's last change, in nanoseconds; 0 without a directory; raises as `read`."""
        with (
            refusing("check the passwords for changes", denied=_PERMISSION_HINT),
            suppress(FileNotFoundError),
        ):
            return self.directory.stat().st_mtime_ns
        return 0

    def remove(self, instance_id: InstanceId) -> bool:
        """Remove the instance's password; return `False` if it has none."""
        action = f"remove the password of {instance_id}"
        return files.remove_file(self._path(instance_id), action, denied=_PERMISSION_HINT)

    def _path(self, instance_id: InstanceId) -> Path:
        return self.directory / instance_id


@dataclass(slots=True)
class DiskFiles:
    """Compiled records and passwords, as the record loop writes them; the document server's group may read records."""

    directory: Path
    passwords: PasswordStore
    group: int | None = None

    def apply(self, instance: InstanceId, record: CompiledRecord) -> None:
        """Write the record to disk unless it is there; raise `HostRefused` if the file system is full or read-only."""
        if _has_content(f"{self.directory}/{compiled_path(instance)}", record.content):
            return
        path = self.directory / compiled_path(instance)
        owner = None if self.group is None else (-1, self.group)
        if not path.parent.is_dir():
            files.ensure_directory(self.directory, mode=_DIRECTORY_MODE, owner=owner)
            files.ensure_directory(path.parent, mode=_DIRECTORY_MODE, owner=owner)
        files.write_atomic(path, record.content, mode=_FILE_MODE, owner=owner)

    def remove(self, instance: InstanceId) -> None:
        """Remove the record and the password of the instance; raise `HostRefused` if the file system is read-only."""
        path = self.directory / compiled_path(instance)
        files.remove_file(path, f"remove the compiled record {path}", denied=_DENIED)
        self.passwords.remove(instance)

    def instances(self) -> Iterator[InstanceId]:
        """Yield every instance that has a record on disk, in no order."""
        action = f"list the compiled records in {self.directory}"
        with refusing(action, denied=_DENIED), suppress(FileNotFoundError):
            for shard in os.scandir(self.directory):
                for entry in os.scandir(shard.path) if shard.is_dir() else ():
                    if entry.name.endswith(_SUFFIX) and not entry.name.startswith("."):
                        yield InstanceId(entry.name.removesuffix(_SUFFIX))


def _has_content(path: str, content: bytes) -> bool:
    # Plain descriptors, because a start reads all records, and `Path` would take three times as long. If a file cannot
    # be read, writing it again repairs the fault or reports it.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(descriptor, len(content) + 1) == content
        finally:
            os.close(descriptor)
    return False


@dataclass(frozen=True, slots=True)
class LoadedRecord:
    """Record in memory; its content is `None` if it has too many bytes."""

    path: Path
    tree: DocumentTree
    content: bytes | None
    signature: Signature
    cost: int


@dataclass(slots=True)
class RecordReader:
    """Reader of parsed records, with a cache of `capacity` bytes; each use checks whether the file has changed."""

    directory: Path
    capacity: int
    _loaded: dict[InstanceId, LoadedRecord] = field(default_factory=dict)
    _spent: int = 0

    def load(self, instance_id: InstanceId, *, fresh: bool = False) -> LoadedRecord | None:
        """Return the instance's record as on disk now, even with an unchanged signature if `fresh`; `None` for none.

        Raises `RecordCorrupt` if the file fails a checksum, `HostRefused` if the file cannot be read.
        """
        held = self._loaded.pop(instance_id, None)
        self._spent -= 0 if held is None else held.cost
        if held is None or fresh or read_signature(held.path) != held.signature:
            held = self._read(self.directory / compiled_path(instance_id))
        if held is not None:
            self._loaded[instance_id] = held
            self._spent += held.cost
            while self._spent > self.capacity and len(self._loaded) > 1:
                self._spent -= self._loaded.pop(next(iter(self._loaded))).cost
        return held

    @staticmethod
    def open_content(loaded: LoadedRecord) -> BinaryIO | None:
        """Open the record's file to read parts of it; return `None` if it has been replaced since it was loaded."""
        file = _open(loaded.path)
        if file is not None and _signature(os.fstat(file.fileno())) != loaded.signature:
            file.close()
            return None
        return file

    @staticmethod
    def _read(path: Path) -> LoadedRecord | None:
        file = _open(path)
        if file is None:
            return None
        with file:
            signature = _signature(os.fstat(file.fileno()))
            content = file.read()
        record = parse_compiled(content)
        kept = content if len(content) <= _KEPT_CONTENT else None
        cost = _TREE_COST + len(record["vendor_data"] or b"") + len(kept or b"")
        return LoadedRecord(path, DocumentTree(record), kept, signature, cost)


def _open(path: Path) -> BinaryIO | None:
    with refusing(f"read the compiled record {path}", denied=_DENIED), suppress(FileNotFoundError):
        return path.open("rb")
    return None
