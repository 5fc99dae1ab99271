"""Keeps each instance's compiled record on disk equal to the inventory, and says what it was compiled of."""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import structlog

from imdsproxy import __version__
from imdsproxy.core.compiled import FORMAT as COMPILED_FORMAT
from imdsproxy.core.compiled import compile_instance, compiled_path, network_mark
from imdsproxy.core.documents.ec2 import list_warnings, warn_of_names
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId, Upstream
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.packed import FORMAT as PACKED_FORMAT
from imdsproxy.errors import ImdsproxyError, Problem, SourceError
from imdsproxy.serving.store import DiskFiles, read_signature
from imdsproxy.sources.sqlite_file import open_store, store_failures, transaction

COMPILER: Final = f"{__version__} {COMPILED_FORMAT} {PACKED_FORMAT} ".encode()
"""Which program compiled a record: another one may make another record of the same."""

_SCHEMA: Final = (
    """
CREATE TABLE compiled (
    instance TEXT PRIMARY KEY NOT NULL,
    compiled_of BLOB NOT NULL,
    revision TEXT NOT NULL,
    file TEXT NOT NULL
) STRICT, WITHOUT ROWID
""",
)
_TOGETHER: Final = 1000
"""Rows that are written at once: some milliseconds. What a killed controller has not written is compiled again."""

_T = TypeVar("_T")

Row: TypeAlias = tuple[bytes, str, str]
"""What a record was compiled of, its revision, and the file's signature then."""


@dataclass(slots=True)
class CompiledIndex:
    """What each compiled record was made of, so that a start reads and compiles only those that differ.

    A row counts only while the file is the one that was written for it. It may be deleted at any time: all records are
    compiled at the next start then.

    Args:
        path: An SQLite file. It is not synced: after a power cut it may be damaged, and is made again.
    """

    path: Path
    _connection: sqlite3.Connection | None = None
    _broken: bool = False
    _unsaved: dict[InstanceId, Row | None] = field(default_factory=dict)

    def find(self, instances: Iterable[InstanceId]) -> Mapping[InstanceId, Row]:
        """The rows of these."""
        wanted = list(instances)
        query = "SELECT compiled.* FROM json_each(?) JOIN compiled ON instance = value"
        named = [json.dumps(wanted)]
        rows = self._use(lambda connection: connection.execute(query, named).fetchall())
        found = {InstanceId(instance): (row[0], row[1], row[2]) for instance, *row in rows or ()}
        # What is not written yet is newer.
        newest = {one: self._unsaved.get(one, found.get(one)) for one in wanted}
        return {one: row for one, row in newest.items() if row is not None}

    def note(self, instance: InstanceId, row: Row | None) -> None:
        """Have this row, or none."""
        self._unsaved[instance] = row
        if len(self._unsaved) >= _TOGETHER:
            self.save()

    def save(self) -> None:
        """Write what is not written yet. What fails here costs a start its time, and nothing else."""
        unsaved, self._unsaved = self._unsaved, {}

        def write(connection: sqlite3.Connection) -> None:
            gone = [(one,) for one in unsaved]
            rows = [(one, *row) for one, row in unsaved.items() if row is not None]
            with transaction(connection):
                connection.executemany("DELETE FROM compiled WHERE instance = ?", gone)
                connection.executemany("INSERT INTO compiled VALUES (?, ?, ?, ?)", rows)

        if unsaved:
            self._use(write)

    def close(self) -> None:
        """Let go of the file until it is needed again, and of the memory that SQLite has for it."""
        self.save()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _use(self, work: Callable[[sqlite3.Connection], _T]) -> _T | None:
        if self._broken:
            return None
        try:
            with store_failures(self.path):
                if self._connection is None:
                    self._connection = open_store(self.path, _SCHEMA)
                    self._connection.execute("PRAGMA synchronous = OFF")
                return work(self._connection)
        except SourceError as error:
            self._broken = True
            structlog.get_logger().warning(
                "the next start compiles all records", reason=error.message, file=str(self.path)
            )
            self.close()
            # Where it cannot be removed it is damaged still, and the next start gives up as well.
            with contextlib.suppress(OSError):
                self.path.unlink()
            return None


@dataclass(slots=True)
class Compiling:
    """Instances that are still to be looked at, and what was found of the others.

    Attributes:
        unneeded: Those whose records on disk are not needed any more.
        lost: Those of them that no source has.
        keys: Addresses whose records change; `None` where all addresses are looked at anyway.
    """

    left: set[InstanceId]
    unneeded: list[InstanceId] = field(default_factory=list)
    lost: set[InstanceId] = field(default_factory=set)
    keys: set[AddressKey] | None = None


@dataclass(slots=True)
class RecordCompiler:
    """Writes and removes compiled records.

    Args:
        files: Where the document server reads them.
        region: The region that the settings name, as of now.

    Attributes:
        revisions: Of the records on disk that may be read.
        failures: Why a record could not be written or removed. The one before stays on disk and in force.
        warnings: Of instances whose documents differ from their records.
    """

    inventory: Inventory
    files: DiskFiles
    index: CompiledIndex
    region: Callable[[], str | None] = lambda: None
    revisions: dict[InstanceId, str] = field(default_factory=dict)
    failures: dict[InstanceId, Problem] = field(default_factory=dict)
    warnings: dict[InstanceId, tuple[Problem, ...]] = field(default_factory=dict)
    _marks: dict[NetworkId, tuple[Network | None, bytes]] = field(default_factory=dict)

    def compile(
        self, instances: Iterable[InstanceId], compiling: Compiling, *, starting: bool
    ) -> None:
        """Have the records of these on disk, as far as their documents are ours.

        Args:
            instances: Some of those that are left.
            compiling: Learns what was found.
            starting: Not everything that sources have has been compiled once.
        """
        compiled_of: dict[InstanceId, bytes] = {}
        rows: Mapping[InstanceId, Row] = {}
        salt = COMPILER + repr(self.region()).encode()
        for instance in instances:
            compiling.left.discard(instance)
            known = self.inventory.instances.get(instance)
            if known is None:
                if not self.inventory.sources_of_instance(instance):
                    compiling.unneeded.append(instance)
                    compiling.lost.add(instance)
                    # Were it to come back before it is compiled again, no guest may read what it was.
                    self.revisions.pop(instance, None)
            elif known.upstream is Upstream.NOVA:
                if instance in self.revisions or starting:
                    compiling.unneeded.append(instance)
            else:
                marks = (self._mark(port.network) for port in known.ports)
                made_of = self.inventory.instances.digest(instance, b"".join((salt, *marks)))
                compiled_of[instance] = made_of
        if compiling.keys is None:
            # The record of one that has just changed was compiled of something else.
            rows = self.index.find(compiled_of)
        for instance, made_of in compiled_of.items():
            before = self.revisions.get(instance)
            known = self.inventory.instances[instance]
            self._compile(known, made_of, rows.get(instance), starting=starting)
            if compiling.keys is not None and self.revisions.get(instance) != before:
                compiling.keys |= self.inventory.addresses_of(instance)

    def remove(self, instance: InstanceId) -> None:
        """Have no record and no password of the instance."""
        try:
            self.files.remove(instance)
        except ImdsproxyError as error:
            self._fail(instance, error)
            return
        self.index.note(instance, None)
        self.failures.pop(instance, None)
        self.revisions.pop(instance, None)
        self.warnings.pop(instance, None)

    def _mark(self, network_id: NetworkId) -> bytes:
        network = self.inventory.networks.get(network_id)
        known, mark = self._marks.get(network_id, (None, b"-"))
        if network is not known:
            mark = b"-" if network is None else network_mark(network)
            self._marks[network_id] = network, mark
        return mark

    def _signature(self, instance: InstanceId) -> str:
        found = read_signature(f"{self.files.directory}/{compiled_path(instance)}")
        return " ".join(map(str, found or ()))

    def _compile(
        self, known: Instance, compiled_of: bytes, row: Row | None, *, starting: bool
    ) -> None:
        """Have an instance's record on disk; it is there if its `row` is of just this, and of the file as it is."""
        instance = known.id
        try:
            if row is not None and row[0] == compiled_of and row[2] == self._signature(instance):
                revision = row[1]
            else:
                record = compile_instance(known, self.inventory.networks, self.region())
                revision = record.revision
                if self.revisions.get(instance) != revision or instance in self.failures:
                    self.files.apply(instance, record)
                    self.index.note(instance, (compiled_of, revision, self._signature(instance)))
        except ImdsproxyError as error:
            self._fail(instance, error)
            structlog.get_logger().error(
                "record not written", instance=instance, code=error.code, error=error.message
            )
            return
        self.failures.pop(instance, None)
        if self.revisions.get(instance) == revision:
            return
        self.revisions[instance] = revision
        before = self.warnings.pop(instance, ())
        if found := warn_of_names(known):
            self.warnings[instance] = found
        # At a start `status` lists them, and a line for each would be too many.
        if found and found != before and not starting:
            structlog.get_logger().warning(
                "guests see other names than the record has",
                instance=instance,
                warnings=list_warnings(found),
            )

    def _fail(self, instance: InstanceId, error: ImdsproxyError) -> None:
        self.failures[instance] = Problem(f"instances.{instance}", error.message, error.hint)
