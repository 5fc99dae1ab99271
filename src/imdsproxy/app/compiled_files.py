"""Compiled records and passwords on disk, as the record loop writes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from imdsproxy.core.compiled import CompiledRecord
from imdsproxy.core.model import InstanceId
from imdsproxy.serving.passwords import PasswordStore
from imdsproxy.serving.store import apply_record, list_records, remove_record

__all__ = ["DiskFiles"]


@dataclass(slots=True)
class DiskFiles:
    """See `imdsproxy.app.record_loop.CompiledFiles`."""

    directory: Path
    passwords: PasswordStore
    group: int | None

    def apply(self, instance: InstanceId, record: CompiledRecord) -> None:
        """Have exactly this record on disk."""
        apply_record(self.directory, instance, record, group=self.group)

    def remove(self, instance: InstanceId) -> None:
        """Have no record and no password of the instance."""
        remove_record(self.directory, instance)
        self.passwords.remove(instance)

    def instances(self) -> Iterable[InstanceId]:
        """Every instance that has a record on disk."""
        return list_records(self.directory)
