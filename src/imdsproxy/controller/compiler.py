"""Compiler of instances' records on disk, and the index of their inputs."""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, TypeAlias, TypeVar

import structlog

from imdsproxy import __version__
from imdsproxy.documents.compiled import FORMAT as COMPILED_FORMAT
from imdsproxy.documents.compiled import compile_instance, compiled_path, network_mark
from imdsproxy.documents.dialects.ec2 import list_warnings, warn_of_names
from imdsproxy.documents.store import DiskFiles, read_signature
from imdsproxy.errors import ImdsproxyError, Problem, SourceError
from imdsproxy.host.sqlite_file import open_store, store_failures, transaction
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId, Upstream
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.packed import FORMAT as PACKED_FORMAT
from imdsproxy.reconcile.part import Impact, Part

COMPILER: Final = f"{__version__} {COMPILED_FORMAT} {PACKED_FORMAT} ".encode()
"""Program and format versions that compiled a record; another version may compile another record."""

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
"""Rows written in one transaction: some milliseconds. After a kill, rows not yet written are compiled again."""

_T = TypeVar("_T")

Row: TypeAlias = tuple[bytes, str, str]
"""Digest of a record's inputs, the record's revision, and the file's signature after the write."""


@dataclass(slots=True)
class CompiledIndex:
    """Index of compiled records' inputs, so that a start reads and compiles only records that differ.

    A row counts only while the file's signature matches. The index may be deleted at any time: the next start then
    compiles all records.

    Args:
        path: SQLite file. It is not synced: it may be damaged after a power cut, and is then created again.
    """

    path: Path
    _connection: sqlite3.Connection | None = None
    _broken: bool = False
    _unsaved: dict[InstanceId, Row | None] = field(default_factory=dict)

    def find(self, instances: Iterable[InstanceId]) -> Mapping[InstanceId, Row]:
        wanted = list(instances)
        query = "SELECT compiled.* FROM json_each(?) JOIN compiled ON instance = value"
        named = [json.dumps(wanted)]
        rows = self._use(lambda connection: connection.execute(query, named).fetchall())
        found = {InstanceId(instance): (row[0], row[1], row[2]) for instance, *row in rows or ()}
        # Rows that are not written yet are newer.
        newest = {one: self._unsaved.get(one, found.get(one)) for one in wanted}
        return {one: row for one, row in newest.items() if row is not None}

    def note(self, instance: InstanceId, row: Row | None) -> None:
        """Set or delete the instance's row; the write may come later."""
        self._unsaved[instance] = row
        if len(self._unsaved) >= _TOGETHER:
            self.save()

    def save(self) -> None:
        """Write pending rows. A failure only makes the next start slower."""
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
        """Save the rows and close the file until its next use, to free SQLite's memory."""
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
            # If the file cannot be removed, it is still damaged at the next start, which gives up as well.
            with contextlib.suppress(OSError):
                self.path.unlink()
            return None


@dataclass(slots=True)
class Compiling:
    """Instances that still have to be compiled, and results of the others.

    Attributes:
        unneeded: Instances whose records on disk are obsolete.
        lost: Instances among them that no source reports.
        keys: Addresses whose records change; `None` if the round plans all addresses anyway.
    """

    left: set[InstanceId]
    unneeded: list[InstanceId] = field(default_factory=list)
    lost: set[InstanceId] = field(default_factory=set)
    keys: set[AddressKey] | None = None


@dataclass(slots=True)
class RecordCompiler(Part):
    """Compiler that writes and removes records on disk.

    Args:
        serves: Whether a document server answers guests from these records.

    Attributes:
        revisions: Revisions of the records on disk that guests may read.
        failures: Reasons why records could not be written or removed. The previous record stays on disk and in force.
    """

    impact: ClassVar = Impact.HARMS
    inventory: Inventory
    files: DiskFiles
    index: CompiledIndex
    region: Callable[[], str | None] = lambda: None
    serves: bool = True
    revisions: dict[InstanceId, str] = field(default_factory=dict)
    failures: dict[InstanceId, Problem] = field(default_factory=dict)
    warnings: dict[InstanceId, tuple[Problem, ...]] = field(default_factory=dict)
    _marks: dict[NetworkId, tuple[Network | None, bytes]] = field(default_factory=dict)

    def problems(self) -> Iterable[Problem]:
        if self.revisions and not self.serves:
            yield Problem(
                "documents.enabled",
                f"is off, but imdsproxy has documents for {len(self.revisions)} instances: their guests get 503",
                "switch it on, or give the records `upstream: nova`",
            )

    async def report(self) -> Mapping[str, object]:
        return {"warnings": list_warnings(one for found in self.warnings.values() for one in found)}

    def compile(
        self, instances: Iterable[InstanceId], compiling: Compiling, *, starting: bool
    ) -> None:
        """Update these instances' records on disk. Instances whose documents come from Nova need none.

        Args:
            starting: Whether some of the sources' instances have never been compiled by this process.
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
                    # If the instance comes back before it is compiled again, no guest may read its old record.
                    self.revisions.pop(instance, None)
            elif known.upstream is Upstream.NOVA:
                if instance in self.revisions or starting:
                    compiling.unneeded.append(instance)
            else:
                marks = (self._mark(port.network) for port in known.ports)
                made_of = self.inventory.instances.digest(instance, b"".join((salt, *marks)))
                compiled_of[instance] = made_of
        if compiling.keys is None:
            # The row of an instance that has just changed has another digest, so only a full pass reads rows.
            rows = self.index.find(compiled_of)
        for instance, made_of in compiled_of.items():
            before = self.revisions.get(instance)
            known = self.inventory.instances[instance]
            self._compile(known, made_of, rows.get(instance), starting=starting)
            if compiling.keys is not None and self.revisions.get(instance) != before:
                compiling.keys |= self.inventory.addresses_of(instance)

    def remove(self, instance: InstanceId) -> None:
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
        """Update an instance's record on disk; skip it if `row` has the same digest and the file's signature."""
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
        # At a start, `status` lists the warnings; a log line for each would be too many.
        if found and found != before and not starting:
            structlog.get_logger().warning(
                "guests see other names than the record has",
                instance=instance,
                warnings=list_warnings(found),
            )

    def _fail(self, instance: InstanceId, error: ImdsproxyError) -> None:
        self.failures[instance] = Problem(f"instances.{instance}", error.message, error.hint)
