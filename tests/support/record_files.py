"""Compiled records on disk whose writes a test sees, and refuses."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from imdsproxy.documents.compiled import CompiledRecord, compiled_path
from imdsproxy.documents.store import DiskFiles, PasswordStore
from imdsproxy.errors import HostRefused
from imdsproxy.model.entities import Instance, InstanceId
from support.guest_records import compiled


def write_record(
    directory: Path, instance: Instance, *, group: int | None = None
) -> CompiledRecord:
    """Have the instance's record below the directory."""
    record = compiled(instance)
    DiskFiles(directory, PasswordStore(directory / "passwords"), group).apply(instance.id, record)
    return record


@dataclass(slots=True)
class LoggedFiles(DiskFiles):
    """Compiled records on disk.

    Attributes:
        refuse: Whose records cannot be written.
        log: What was written and removed.
        after: Called after each write.
    """

    refuse: set[InstanceId] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    after: Callable[[InstanceId], None] = lambda _: None

    def apply(self, instance: InstanceId, record: CompiledRecord) -> None:
        if instance in self.refuse:
            raise HostRefused("the disk is full", hint="make room")
        self.log.append(f"write {instance}")
        DiskFiles.apply(self, instance, record)
        self.after(instance)

    def remove(self, instance: InstanceId) -> None:
        self.log.append(f"remove {instance}")
        DiskFiles.remove(self, instance)

    def content(self, instance: InstanceId) -> bytes:
        return (self.directory / compiled_path(instance)).read_bytes()


def last_written(path: Path) -> tuple[int, int]:
    """Inode and time of change of a file: both stay while the file is only read."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns
