"""The embedded store: records as rows, written atomically, one call at a time.

All calls block. Except for `sync` and `fetch` they belong to one thread; `source` connects them to the event loop.
"""

import json
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Final
from urllib.parse import quote

from imdsproxy.errors import Problem, RecordConflict, SourceUnavailable
from imdsproxy.host.files import open_locked
from imdsproxy.host.sqlite_file import open_store, store_failures, transaction
from imdsproxy.model.claims import address_keys, claim_places, taken_address, taken_id
from imdsproxy.model.entities import (
    Instance,
    InstanceId,
    Network,
    NetworkId,
    StoredBytes,
    digest_of,
)
from imdsproxy.model.observation import Observation
from imdsproxy.model.packed import FORMAT, PackedInstances
from imdsproxy.model.records import (
    Findings,
    Records,
    Refused,
    parse_listed,
    parse_records,
    render_record,
)
from imdsproxy.model.records import Path as RecordPath
from imdsproxy.reconcile.progress import Progress

_VERSION_1: Final = """
CREATE TABLE networks (id TEXT PRIMARY KEY NOT NULL, record TEXT NOT NULL) STRICT;
CREATE TABLE instances (id TEXT PRIMARY KEY NOT NULL, record TEXT NOT NULL, user_data BLOB) STRICT;
CREATE TABLE ports (
    network TEXT NOT NULL,
    instance TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
    PRIMARY KEY (network, instance)
) STRICT, WITHOUT ROWID;
CREATE INDEX ports_by_instance ON ports (instance);
CREATE TABLE addresses (
    network TEXT NOT NULL,
    address TEXT NOT NULL,
    instance TEXT NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
    PRIMARY KEY (network, address)
) STRICT, WITHOUT ROWID;
CREATE INDEX addresses_by_instance ON addresses (instance)
"""
# Columns contain the search keys; the rest is the record as JSON, in the form of `model.records`.
# User data has its own column: up to 16 MiB of arbitrary bytes. The primary key of `addresses`
# keeps addresses unique, whatever program writes.

PACKED: Final = """
CREATE TABLE IF NOT EXISTS packed (
    instance TEXT PRIMARY KEY NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
    stamp BLOB NOT NULL,
    data BLOB NOT NULL
) STRICT, WITHOUT ROWID
"""
"""Records in the packed form of `model.packed`, so that a start need not parse each record. A row that is missing, or
whose stamp does not match the other tables, is created again: the table is no part of the store's versioned schema."""

MIGRATIONS: Final[tuple[str, ...]] = (_VERSION_1,)
"""Migrations from each version (`user_version`) to the next: statements separated by semicolons. Never change an entry,
only append."""

_EVERYTHING: Final = """
    SELECT id, record, length(user_data),
        (SELECT group_concat(network || '/' || address, ' ') FROM
            (SELECT network, address FROM addresses WHERE instance = id ORDER BY network, address)),
        (SELECT group_concat(network, ' ') FROM
            (SELECT network FROM ports WHERE instance = id ORDER BY network)),
        stamp, data
    FROM instances LEFT JOIN packed ON instance = id
"""
"""Each instance with its claims, and with its stamp and data in packed form."""

_USER_DATA: Final = "SELECT user_data FROM instances WHERE id = ?"
_PUT_NETWORK: Final = """
    INSERT INTO networks VALUES (?, ?)
    ON CONFLICT (id) DO UPDATE SET record = excluded.record WHERE record != excluded.record
"""
_PUT_INSTANCE: Final = """
    INSERT INTO instances VALUES (?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET record = excluded.record, user_data = excluded.user_data
    WHERE record != excluded.record OR user_data IS NOT excluded.user_data
"""

_STORING: Final = "storing instances"
_READING: Final = "reading the store"
_NOTED: Final = 1000
_NAMED: Final = 20
"""Maximum number of instances named in a refusal."""


@dataclass(slots=True)
class Store:
    """The store at `path`, open and locked until `close`.

    `problems`: problems of rows that were not valid records at the last `load`, by table and id. Such rows are not in
    force, and stay in the file.

    Raises:
        SourceUnavailable: Another process has locked the store, or the file system refuses.
        SourceRefused: The store is newer than this program, or of another program.
        SourceCorrupt: The store is damaged.
    """

    path: Path
    now: Callable[[], float] = time.time
    progress: Progress = field(default_factory=Progress)
    problems: dict[tuple[str, str], tuple[Problem, ...]] = field(default_factory=dict)
    _reading: Lock = field(default_factory=Lock)
    _lock: int = field(init=False)
    _connection: sqlite3.Connection = field(init=False)
    _reader: sqlite3.Connection = field(init=False)

    def __post_init__(self) -> None:
        path = self.path
        with store_failures(path):
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._lock = lock_store(path)
            try:
                self._connection = open_store(path, MIGRATIONS)
                self._connection.execute(PACKED)
                # User-data is in memory only while needed. Any thread may read it.
                self._reader = _open_to_read(path)
            except BaseException:
                os.close(self._lock)
                raise

    def close(self) -> None:
        try:
            with self._reading:
                self._reader.close()
            self._connection.close()
        finally:
            os.close(self._lock)

    def sync(self) -> None:
        """Flush all committed data to the disk; from any thread.

        Committed records are in SQLite's write-ahead log until a checkpoint, which SQLite itself syncs
        (https://www.sqlite.org/pragma.html#pragma_synchronous).
        """
        # Open only the log: closing any descriptor of the database would drop SQLite's locks on the database.
        log = self.path.with_name(f"{self.path.name}-wal")
        with store_failures(self.path), log.open("rb") as stream:
            os.fdatasync(stream.fileno())

    def fetch(self, instance: InstanceId) -> bytes:
        """Return an instance's current user-data; from any thread.

        Raises `SourceError`: the instance has no user-data, or the store cannot be read.
        """
        with self._reading, store_failures(self.path):
            row = self._reader.execute(_USER_DATA, (instance,)).fetchone()
        if row is None or row[0] is None:
            raise SourceUnavailable(f"the store {self.path} has no user-data of {instance}")
        return bytes(row[0])

    # Reading

    def load(self) -> Observation:
        """Load all records. Rows without a valid record are noted in `problems` and not changed."""
        networks: dict[NetworkId, Network] = {}
        instances = PackedInstances()
        self.problems.clear()
        execute = self._connection.execute
        with store_failures(self.path), transaction(self._connection):
            # Other programs do not enforce foreign keys by default, and may have left orphaned rows.
            for table in ("addresses", "ports"):
                execute(f"DELETE FROM {table} WHERE instance NOT IN (SELECT id FROM instances)")  # noqa: S608 - a constant
            for key, text in execute("SELECT id, record FROM networks ORDER BY id"):
                network = self._parse_row("networks", key, text)
                if isinstance(network, Network):
                    networks[network.id] = network
                elif isinstance(network, Refused):
                    self._quarantine("networks", key, network)
            (total,) = execute("SELECT count(*) FROM instances").fetchone()
            for number, row in enumerate(execute(f"{_EVERYTHING} ORDER BY id")):
                key, text, size, claims, ports, stamp, data = row
                if number % _NOTED == _NOTED - 1:
                    self.progress.note(_READING, number, total)
                if data is not None and stamp == _stamp(text, claims, ports, size):
                    instances.put_plain(key, data, None if size is None else self.fetch)
                    continue
                instance = self._read_anew(key, text)
                if isinstance(instance, Instance):
                    instances[instance.id] = instance
                    self._keep_packed(instances, instance.id)
                elif isinstance(instance, Refused):
                    self._quarantine("instances", key, instance)
        self.progress.end(_READING)
        return Observation(networks=networks, instances=instances)

    def _read_anew(self, key: str, text: str) -> Network | Instance | Refused:
        """Parse an instance that another program may have written, and claim its addresses."""
        (user_data,) = self._connection.execute(_USER_DATA, (key,)).fetchone() or (None,)
        instance = self._parse_row("instances", key, text, user_data)
        if isinstance(instance, Instance):
            self._release(instance.id)
            problems = self._claim(instance, ("instances", key))
            if problems:
                self._release(instance.id)
                return Refused(tuple(problems))
        return instance

    def _parse_row(
        self, kind: str, key: str, text: str, user_data: bytes | None = None
    ) -> Network | Instance | Refused:
        try:
            record: object = json.loads(text)
        except (ValueError, RecursionError):
            record = text
        if isinstance(record, dict) and user_data is not None:
            record["user_data"] = user_data
        found = parse_listed((kind, key), record, Findings(str(self.path)))
        if not isinstance(found, Refused) and found.id != key:
            reason = f"the row of {key} holds the record of {found.id}"
            return Refused((Problem("id", reason),))
        return self._leave(found) if isinstance(found, Instance) else found

    def _quarantine(self, kind: str, key: str, refused: Refused) -> None:
        command = f"imdsproxy {kind.removesuffix('s')} set {key}"
        hint = f"it is not in force; write it again with `{command}`, or remove it"
        self.problems[kind, key] = tuple(
            replace(one, hint=hint, file=str(self.path)) for one in refused.problems
        )

    def _leave(self, instance: Instance) -> Instance:
        data = instance.user_data
        if not isinstance(data, bytes):
            return instance
        stored = StoredBytes(len(data), digest_of(data), instance.id, self.fetch)
        return replace(instance, user_data=stored)

    def _keep_packed(self, packed: PackedInstances, instance: InstanceId) -> None:
        data = packed.plain(instance)
        if data is None:
            return
        row = self._connection.execute(f"{_EVERYTHING} WHERE id = ?", (instance,)).fetchone()
        _, text, size, claims, ports, _, _ = row
        self._connection.execute(
            "INSERT OR REPLACE INTO packed (instance, stamp, data) VALUES (?, ?, ?)",
            (instance, _stamp(text, claims, ports, size), data),
        )

    # Writing

    def put(
        self, networks: Collection[Network], instances: Collection[Instance], *, bulk: bool = True
    ) -> Observation:
        """Write all records or none.

        An instance without a creation time keeps the stored creation time. A new instance without one gets the
        current time.

        `bulk`: whether problems name the record: `instances[3].ports[0].mac`, not `ports[0].mac`. Raises
        `RecordConflict`: an id occurs twice, or an address belongs to another instance.
        """
        problems = [*_repeated("networks", networks), *_repeated("instances", instances)]
        changed_networks: dict[NetworkId, Network] = {}
        # Keep instances packed: a write may have hundreds of thousands.
        changed: dict[InstanceId, RecordPath] = {}
        packed = PackedInstances()
        with store_failures(self.path), transaction(self._connection):
            for network in networks:
                if self._put_row(_PUT_NETWORK, network.id, _dump(network)):
                    changed_networks[network.id] = network
            for number, reported in enumerate(instances):
                instance = self._with_creation(reported)
                text = _dump(replace(instance, user_data=None))
                if self._put_row(_PUT_INSTANCE, instance.id, text, instance.user_data):
                    changed[instance.id] = ("instances", number) if bulk else ()
                    packed[instance.id] = self._leave(instance)
                if number % _NOTED == _NOTED - 1:
                    self.progress.note(_STORING, number // 2, len(instances))
            # Release all addresses before claiming any: they may move among the records of one write.
            freed: dict[tuple[str, str], InstanceId] = {}
            for key in changed:
                freed.update(dict.fromkeys(self._release(key), key))
            moved = False
            for number, (key, path) in enumerate(changed.items()):
                instance = packed[key]
                problems += self._claim(instance, path)
                places = ((network, str(address)) for network, address in address_keys(instance))
                moved = moved or any(freed.get(place, key) != key for place in places)
                self._keep_packed(packed, key)
                if number % _NOTED == _NOTED - 1:
                    self.progress.note(_STORING, (len(instances) + number) // 2, len(instances))
            self.progress.end(_STORING)
            if problems:
                raise RecordConflict("the store refuses the records", problems=problems)
        return Observation(networks=changed_networks, instances=packed, moves=moved)

    def remove_network(self, network: NetworkId) -> Observation:
        """Remove a network, if it exists; raise `RecordConflict` if instances have ports in the network."""
        with store_failures(self.path), transaction(self._connection):
            users = self._connection.execute(
                "SELECT instance FROM ports WHERE network = ? ORDER BY instance", (network,)
            ).fetchall()
            found = self._put_row("DELETE FROM networks WHERE id = ?", network)
            if found and users:
                raise _in_use(network, [str(row[0]) for row in users])
        return Observation(networks_removed=(network,) if found else ())

    def remove_instance(self, instance: InstanceId) -> Observation:
        with store_failures(self.path), transaction(self._connection):
            found = self._put_row("DELETE FROM instances WHERE id = ?", instance)
        return Observation(instances_removed=(instance,) if found else ())

    def _put_row(self, statement: str, *values: object) -> bool:
        return self._connection.execute(statement, values).rowcount > 0

    def _with_creation(self, instance: Instance) -> Instance:
        if instance.created_at is not None:
            return instance
        row = self._connection.execute(
            "SELECT record FROM instances WHERE id = ?", (instance.id,)
        ).fetchone()
        if row is None:
            return replace(instance, created_at=int(self.now()))
        # An unknown creation time of an existing instance stays unknown: otherwise a finished boot would begin anew.
        known = self._parse_row("instances", instance.id, row[0])
        created_at = known.created_at if isinstance(known, Instance) else None
        return replace(instance, created_at=created_at)

    # Claims

    def _release(self, instance: InstanceId) -> list[tuple[str, str]]:
        self._connection.execute("DELETE FROM ports WHERE instance = ?", (instance,))
        released = "DELETE FROM addresses WHERE instance = ? RETURNING network, address"
        return self._connection.execute(released, (instance,)).fetchall()

    def _claim(self, instance: Instance, path: RecordPath) -> list[Problem]:
        self._connection.executemany(
            "INSERT OR IGNORE INTO ports (network, instance) VALUES (?, ?)",
            {(port.network, instance.id) for port in instance.ports},
        )
        problems = []
        # Claim each address once: it may also be the MAC's link-local address.
        for key in dict.fromkeys(key for key, _ in claim_places(instance)):
            place = key[0], str(key[1])
            if not self._put_row(
                "INSERT OR IGNORE INTO addresses VALUES (?, ?, ?)", *place, instance.id
            ):
                (holder,) = self._connection.execute(
                    "SELECT instance FROM addresses WHERE network = ? AND address = ?", place
                ).fetchone()
                if holder != instance.id:
                    problems.append(taken_address(instance, key, holder, path=path))
        return problems


def lock_store(path: Path) -> int:
    """Lock the store against other imdsproxy processes while the returned descriptor is open.

    SQLite's own locks allow several writers in turn, which would overwrite each other's changes. Raises
    `SourceUnavailable`: another process holds the lock; `OSError`: the lock file cannot be created.
    """
    lock = path.with_name(f"{path.name}.lock")
    descriptor = open_locked(lock, os.O_RDWR | os.O_CREAT)
    if descriptor is None:
        holder = lock.read_text("ascii", "replace").strip() or "unknown"
        raise SourceUnavailable(
            f"the store {path} is in use by another imdsproxy, process {holder}",
            hint="stop that process; a store has one writer",
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _open_to_read(path: Path, more: str = "") -> sqlite3.Connection:
    where = f"file:{quote(str(path))}?mode=ro{more}"
    return sqlite3.connect(where, uri=True, check_same_thread=False)


def read_store(path: Path) -> Records:
    """Read the records of a store; none if the file is missing. One byte stands for each instance's user-data.

    Raises `SourceUnavailable`: the file cannot be read, or is no store.
    """
    if not path.exists():
        return Records()
    # Without a log the file is complete, and SQLite can read it without creating files beside it.
    whole = "" if path.with_name(f"{path.name}-wal").exists() else "&immutable=1"
    try:
        with closing(_open_to_read(path, whole)) as store:
            networks = [
                json.loads(text) for (text,) in store.execute("SELECT record FROM networks")
            ]
            instances = [
                {**json.loads(text), **({"user_data": "?"} if filled else {})}
                for text, filled in store.execute(
                    "SELECT record, user_data IS NOT NULL FROM instances"
                )
            ]
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise SourceUnavailable(f"cannot read {path}: {error}") from error
    return parse_records({"networks": networks, "instances": instances}, Findings(str(path)))


def _stamp(text: object, claims: object, ports: object, user_data: object) -> bytes:
    made_of = f"{FORMAT}\n{claims}\n\n{ports}\n\n{user_data}\n{text}"
    return blake2b(made_of.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _in_use(network: NetworkId, users: Sequence[str]) -> RecordConflict:
    more = "" if len(users) <= _NAMED else f" and {len(users) - _NAMED} more"
    return RecordConflict(
        f"{len(users)} instance{'s have ports' if len(users) > 1 else ' has a port'} in network {network}",
        hint="remove or change these first",
        problems=[
            Problem("id", f"instance {', '.join(users[:_NAMED])}{more}: a port is in {network}")
        ],
    )


def _repeated(kind: str, records: Collection[Network | Instance]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for number, one in enumerate(records):
        if one.id in first:
            yield taken_id(one.id, path=(kind, number), place=f"{kind}[{first[one.id]}]")
        first.setdefault(one.id, number)


def _dump(record: Network | Instance) -> str:
    return json.dumps(render_record(record), ensure_ascii=False, separators=(",", ":"))
