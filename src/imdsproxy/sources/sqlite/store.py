"""The embedded store, one call at a time: records as rows, written as a whole or not at all.

Everything here blocks and, `sync` apart, belongs to one thread; `source` brings
it into the event loop.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Final
from urllib.parse import quote

from imdsproxy.core.inventory import address_keys
from imdsproxy.core.model import (
    Instance,
    InstanceId,
    Network,
    NetworkId,
    StoredBytes,
    digest_of,
)
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.packed import FORMAT, PackedInstances
from imdsproxy.core.records import (
    Path as RecordPath,
)
from imdsproxy.core.records import (
    Records,
    Refused,
    parse_instance,
    parse_network,
    parse_records,
    render_record,
)
from imdsproxy.core.timing import Progress
from imdsproxy.errors import Problem, SourceRefused, SourceUnavailable
from imdsproxy.host.files import open_locked
from imdsproxy.sources.api import Tally
from imdsproxy.sources.in_force import taken_address, taken_id
from imdsproxy.sources.sqlite_file import open_store, store_failures

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
# Columns hold what is looked up by; all else is the record as JSON, in the form of `core.records`.
# User data is apart, as it is: up to 16 MiB of any bytes. That no address is there twice holds for
# whatever program writes.

PACKED: Final = """
CREATE TABLE IF NOT EXISTS packed (
    instance TEXT PRIMARY KEY NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
    stamp BLOB NOT NULL,
    data BLOB NOT NULL
) STRICT, WITHOUT ROWID
"""
"""Records as `core.packed` has them in memory, so that a start need not parse each one. A row that is missing, or has
another stamp than the rows beside it, is made again: it is no part of what a version of the store promises."""

MIGRATIONS: Final[tuple[str, ...]] = (_VERSION_1,)
"""What takes a store from one version (`user_version`) to the next; statements between
semicolons. Never changed, only added to."""

_EVERYTHING: Final = """
    SELECT id, record, length(user_data),
        (SELECT group_concat(network || '/' || address, ' ') FROM
            (SELECT network, address FROM addresses WHERE instance = id ORDER BY network, address)),
        (SELECT group_concat(network, ' ') FROM
            (SELECT network FROM ports WHERE instance = id ORDER BY network)),
        stamp, data
    FROM instances LEFT JOIN packed ON instance = id
"""
"""Each instance with what others must not have, and what it was when it was packed."""

_STORING: Final = "storing instances"
_READING: Final = "reading the store"
_NOTED: Final = 1000
_NAMED: Final = 20
"""How many instances a refusal names."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything in the store.

    Attributes:
        problems: Of rows that are no good records, by table and id; they stay in the file, but are
            not in force.
    """

    networks: dict[NetworkId, Network] = field(default_factory=dict)
    instances: PackedInstances = field(default_factory=PackedInstances)
    problems: dict[tuple[str, str], tuple[Problem, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Written:
    """What a write has done: the records that differ from those before, and how many of each kind.

    Attributes:
        moved: An address went from one instance to another.
    """

    networks: dict[NetworkId, Network]
    instances: PackedInstances
    tally: Tally
    moved: bool = False


class Store:
    """The store at `path`, open and locked until `close`.

    Args:
        path: The file; made when it is not there.
        now: Unix time, for when instances came.

    Raises:
        SourceUnavailable: Another process has it, or the file system refuses.
        SourceRefused: It is newer than this program, or not ours.
        SourceCorrupt: It is damaged.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._log: int | None = None
        with store_failures(path):
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            self._lock = lock_store(path)
            try:
                self._connection = open_store(path, MIGRATIONS)
                self._connection.execute(PACKED)
                self._payloads = _Payloads(path)
            except BaseException:
                os.close(self._lock)
                raise

    def close(self) -> None:
        """Close the file and let others have it."""
        try:
            self._payloads.close()
            self._connection.close()
        finally:
            os.close(self._lock)
            if self._log is not None:
                os.close(self._log)

    def sync(self) -> None:
        """Have the disk keep all that is committed; from any one thread.

        Committed records are in SQLite's write-ahead log until a checkpoint takes them over, which
        SQLite itself syncs (https://www.sqlite.org/pragma.html#pragma_synchronous).
        """
        with store_failures(self._path):
            if self._log is None:
                # Never the database itself: closing any descriptor of it drops SQLite's locks on
                # it.
                log = self._path.with_name(f"{self._path.name}-wal")
                self._log = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
            os.fdatasync(self._log)

    # Reading

    def load(self, progress: Progress | None = None) -> Contents:
        """Everything; rows that hold no good record are reported and not changed."""
        contents = Contents()
        progress = progress or Progress()
        with store_failures(self._path), self._transaction():
            # Programs other than this one do not enforce references by default.
            for table in ("addresses", "ports"):
                self._connection.execute(
                    f"DELETE FROM {table} WHERE instance NOT IN (SELECT id FROM instances)"  # noqa: S608 - a constant
                )
            rows = self._connection.execute("SELECT id, record FROM networks ORDER BY id")
            for key, text in rows.fetchall():
                network = self._read_network(key, text)
                if isinstance(network, Network):
                    contents.networks[network.id] = network
                else:
                    contents.problems["networks", str(key)] = network
            (total,) = self._connection.execute("SELECT count(*) FROM instances").fetchone()
            every = self._connection.execute(f"{_EVERYTHING} ORDER BY id")
            for number, row in enumerate(every):
                key, text, bytes_of_user_data, claims, ports, stamp, data = row
                if number % _NOTED == _NOTED - 1:
                    progress.note(_READING, number, total)
                stamped = _stamp(text, claims, ports, bytes_of_user_data)
                if data is not None and stamp == stamped:
                    fetch = None if bytes_of_user_data is None else self._payloads.fetch
                    contents.instances.put_plain(InstanceId(key), data, fetch)
                    continue
                found = self._read_anew(key, text)
                if isinstance(found, Instance):
                    contents.instances[found.id] = found
                    self._keep_packed(contents.instances, found)
                else:
                    contents.problems["instances", str(key)] = found
        progress.end(_READING)
        return contents

    def _read_anew(self, key: object, text: object) -> Instance | tuple[Problem, ...]:
        (user_data,) = self._connection.execute(
            "SELECT user_data FROM instances WHERE id = ?", (key,)
        ).fetchone()
        instance = self._read_instance(key, text, user_data)
        return self._reclaim(instance) if isinstance(instance, Instance) else instance

    def _keep_packed(self, packed: PackedInstances, instance: Instance) -> None:
        data = packed.plain(instance.id)
        if data is None:
            return
        row = self._connection.execute(f"{_EVERYTHING} WHERE id = ?", (instance.id,)).fetchone()
        self._connection.execute(
            "INSERT OR REPLACE INTO packed (instance, stamp, data) VALUES (?, ?, ?)",
            (instance.id, _stamp(row[1], row[3], row[4], row[2]), data),
        )

    # Writing

    def put(
        self,
        networks: Iterable[Network],
        instances: Collection[Instance],
        *,
        bulk: bool = True,
        progress: Progress | None = None,
    ) -> Written:
        """Write all of them or none.

        An instance that does not say when it was made keeps what the store has of that. One that the store does
        not have was made now.

        Args:
            networks: To add or change.
            instances: The same.
            bulk: Problems name the record: `instances[3].ports[0].mac`, not `ports[0].mac`.
            progress: Where a long write says how far it is.

        Raises:
            SourceRefused: An id stands twice, or an address belongs to another instance.
        """
        networks = tuple(networks)
        problems = [
            *_repeated("networks", [network.id for network in networks]),
            *_repeated("instances", [instance.id for instance in instances]),
        ]
        tally = {"added": 0, "changed": 0, "unchanged": 0}
        changed_networks: dict[NetworkId, Network] = {}
        # Not as they are: a write may have hundreds of thousands.
        changed: dict[InstanceId, RecordPath] = {}
        packed = PackedInstances()
        progress = progress or Progress()
        with store_failures(self._path), self._transaction():
            for network in networks:
                done = self._put_row("networks", network.id, render_record(network))
                tally[done] += 1
                if done != "unchanged":
                    changed_networks[network.id] = network
            for number, reported in enumerate(instances):
                instance = self._with_creation(reported)
                done = self._put_instance_row(instance)
                tally[done] += 1
                if done != "unchanged":
                    changed[instance.id] = ("instances", number) if bulk else ()
                    packed[instance.id] = self._payloads.leave(instance)
                if number % _NOTED == _NOTED - 1:
                    progress.note(_STORING, number // 2, len(instances))
            # First let go, then take: addresses may move among the records of one write.
            freed: dict[tuple[str, str], InstanceId] = {}
            for key in changed:
                freed.update(dict.fromkeys(self._release(key), key))
            moved = False
            for number, (key, path) in enumerate(changed.items()):
                instance = packed[key]
                problems += self._claim(instance, path)
                moved = moved or _takes(instance, freed)
                self._keep_packed(packed, packed[key])
                if number % _NOTED == _NOTED - 1:
                    progress.note(_STORING, (len(instances) + number) // 2, len(instances))
            progress.end(_STORING)
            if problems:
                raise SourceRefused("the store refuses the records", problems=problems)
        return Written(changed_networks, packed, Tally(**tally), moved)

    def remove_network(self, network: NetworkId, *, force: bool) -> bool:
        """Remove a network; `False` when there is none.

        Raises:
            SourceRefused: Instances have ports in it, and it is not forced.
        """
        with store_failures(self._path), self._transaction():
            users = self._connection.execute(
                "SELECT instance FROM ports WHERE network = ? ORDER BY instance", (network,)
            ).fetchall()
            cursor = self._connection.execute("DELETE FROM networks WHERE id = ?", (network,))
            if cursor.rowcount and users and not force:
                raise _in_use(network, [str(row[0]) for row in users])
            return cursor.rowcount > 0

    def remove_instance(self, instance: InstanceId) -> bool:
        """Remove an instance; `False` when there is none."""
        with store_failures(self._path), self._transaction():
            cursor = self._connection.execute("DELETE FROM instances WHERE id = ?", (instance,))
            return cursor.rowcount > 0

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors, a full disk among them.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _put_row(self, table: str, key: str, record: object) -> str:
        text = _dump(record)
        row = self._connection.execute(
            f"SELECT record FROM {table} WHERE id = ?",  # noqa: S608 - a constant
            (key,),
        ).fetchone()
        if row is not None and row[0] == text:
            return "unchanged"
        self._connection.execute(
            f"INSERT INTO {table} (id, record) VALUES (?, ?)"  # noqa: S608 - a constant
            " ON CONFLICT (id) DO UPDATE SET record = excluded.record",
            (key, text),
        )
        return "added" if row is None else "changed"

    def _with_creation(self, instance: Instance) -> Instance:
        if instance.created_at is not None:
            return instance
        row = self._connection.execute(
            "SELECT record FROM instances WHERE id = ?", (instance.id,)
        ).fetchone()
        if row is None:
            return replace(instance, created_at=int(self._now()))
        # Of one that was there before, a time that is not known is not made up: a boot that was over would begin
        # anew.
        known = self._read_instance(instance.id, row[0], None)
        created_at = known.created_at if isinstance(known, Instance) else None
        return replace(instance, created_at=created_at)

    def _put_instance_row(self, instance: Instance) -> str:
        done = self._put_row("instances", instance.id, render_record(_without_payload(instance)))
        cursor = self._connection.execute(
            "UPDATE instances SET user_data = ? WHERE id = ? AND user_data IS NOT ?",
            (instance.user_data, instance.id, instance.user_data),
        )
        return "changed" if done == "unchanged" and cursor.rowcount else done

    # Who claims what

    def _release(self, instance: InstanceId) -> list[tuple[str, str]]:
        """Have it claim nothing; what it claimed, as network and address."""
        query = "SELECT network, address FROM addresses WHERE instance = ?"
        claimed = self._connection.execute(query, (instance,)).fetchall()
        self._connection.execute("DELETE FROM addresses WHERE instance = ?", (instance,))
        self._connection.execute("DELETE FROM ports WHERE instance = ?", (instance,))
        return claimed

    def _claim(self, instance: Instance, path: RecordPath) -> tuple[Problem, ...]:
        self._connection.executemany(
            "INSERT OR IGNORE INTO ports (network, instance) VALUES (?, ?)",
            {(port.network, instance.id) for port in instance.ports},
        )
        problems = []
        for key in sorted(address_keys(instance), key=_sortable):
            holder = self._holder(key)
            if holder is None:
                self._connection.execute(
                    "INSERT INTO addresses (network, address, instance) VALUES (?, ?, ?)",
                    (key[0], str(key[1]), instance.id),
                )
            elif holder != instance.id:
                problems.append(taken_address(instance, key, holder, path=path))
        return tuple(problems)

    def _holder(self, key: AddressKey) -> str | None:
        row = self._connection.execute(
            "SELECT instance FROM addresses WHERE network = ? AND address = ?",
            (key[0], str(key[1])),
        ).fetchone()
        return None if row is None else str(row[0])

    def _reclaim(self, instance: Instance) -> Instance | tuple[Problem, ...]:
        """Mend the claims of a record that another program has written, if no other record has them."""
        stored = self._connection.execute(
            "SELECT network, address FROM addresses WHERE instance = ?", (instance.id,)
        ).fetchall()
        wanted = {(network, str(address)) for network, address in address_keys(instance)}
        ports = self._connection.execute(
            "SELECT network FROM ports WHERE instance = ?", (instance.id,)
        ).fetchall()
        if set(stored) == wanted and {row[0] for row in ports} == {
            port.network for port in instance.ports
        }:
            return instance
        self._release(instance.id)
        problems = self._claim(instance, ("instances", instance.id))
        if not problems:
            return instance
        self._release(instance.id)
        return tuple(self._quarantined(problem, "instance", instance.id) for problem in problems)

    # Rows into records

    def _read_network(self, key: object, text: object) -> Network | tuple[Problem, ...]:
        record = _load(text)
        network = parse_network(record, path=("networks", str(key)), file=str(self._path))
        if isinstance(network, Network) and network.id == key:
            return network
        return self._garbage("network", key, network)

    def _read_instance(
        self, key: object, text: object, user_data: object
    ) -> Instance | tuple[Problem, ...]:
        record = _load(text)
        if isinstance(record, dict) and user_data is not None:
            record["user_data"] = user_data
        instance = parse_instance(record, path=("instances", str(key)), file=str(self._path))
        if isinstance(instance, Instance) and instance.id == key:
            return self._payloads.leave(instance)
        return self._garbage("instance", key, instance)

    def _garbage(
        self, kind: str, key: object, found: Network | Instance | Refused
    ) -> tuple[Problem, ...]:
        problems = (
            found.problems
            if isinstance(found, Refused)
            else (Problem("id", f"the row of {key} holds the record of {found.id}"),)
        )
        return tuple(self._quarantined(problem, kind, str(key)) for problem in problems)

    def _quarantined(self, problem: Problem, kind: str, key: str) -> Problem:
        hint = f"it is not in force; write it again with `imdsproxy {kind} set {key}`, or remove it"
        return replace(problem, hint=hint, file=str(self._path))


class _Payloads:
    """Reads user-data on demand, in any thread: it is in memory only for as long."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    def leave(self, instance: Instance) -> Instance:
        """The instance with its user-data left in the store."""
        data = instance.user_data
        if not isinstance(data, bytes):
            return instance
        stored = StoredBytes(len(data), digest_of(data), instance.id, self.fetch)
        return replace(instance, user_data=stored)

    def fetch(self, instance: InstanceId) -> bytes:
        """The user-data that the store has now.

        Raises:
            SourceError: It has none, or cannot be read.
        """
        with self._lock, store_failures(self._path):
            if self._closed:
                raise SourceUnavailable(f"the store {self._path} is closed")
            if self._connection is None:
                where = f"file:{quote(str(self._path))}?mode=ro"
                self._connection = sqlite3.connect(where, uri=True, check_same_thread=False)
            row = self._connection.execute(
                "SELECT user_data FROM instances WHERE id = ?", (instance,)
            ).fetchone()
        if row is None or row[0] is None:
            raise SourceUnavailable(f"the store {self._path} has no user-data of {instance}")
        return bytes(row[0])

    def close(self) -> None:
        """Read no more."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()


def lock_store(path: Path) -> int:
    """Keep others from writing to the store for as long as the descriptor given back is open.

    SQLite's own locks allow several writers in turn; ours would overwrite what they do not know of.

    Raises:
        SourceUnavailable: Another process has it.
        OSError: The lock file cannot be made.
    """
    lock = path.with_name(f"{path.name}.lock")
    descriptor = open_locked(lock, os.O_RDWR | os.O_CREAT)
    if descriptor is None:
        holder = lock.read_text("ascii", "replace").strip() or "unknown"
        raise SourceUnavailable(
            f"the store {path} is in use by another imdsproxy, process {holder}",
            hint="stop that one; a store has one writer",
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def read_store(path: Path) -> Records:
    """What the file holds; none holds nothing. User-data is not read: a byte stands for what there is of it.

    Raises:
        SourceUnavailable: It cannot be read, or is no store.
    """
    if not path.exists():
        return Records()
    # Without a log the file is whole, and SQLite need not make files beside it to read it.
    whole = "" if path.with_name(f"{path.name}-wal").exists() else "&immutable=1"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro{whole}", uri=True)) as store:
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
    return parse_records({"networks": networks, "instances": instances}, file=str(path))


def _takes(instance: Instance, freed: Mapping[tuple[str, str], InstanceId]) -> bool:
    """Whether an instance claims what another one has let go."""
    places = ((network, str(address)) for network, address in address_keys(instance))
    return any(freed.get(place, instance.id) != instance.id for place in places)


def _stamp(text: object, claims: object, ports: object, user_data: object) -> bytes:
    """What a packed record was made of."""
    made_of = f"{FORMAT}\n{claims}\n\n{ports}\n\n{user_data}\n{text}"
    return blake2b(made_of.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _in_use(network: NetworkId, users: Sequence[str]) -> SourceRefused:
    more = "" if len(users) <= _NAMED else f" and {len(users) - _NAMED} more"
    return SourceRefused(
        f"{len(users)} instance{'s have ports' if len(users) > 1 else ' has a port'} in network {network}",
        hint="remove or change these first",
        problems=[
            Problem("id", f"instance {', '.join(users[:_NAMED])}{more}: a port is in {network}")
        ],
    )


def _repeated(kind: str, ids: Sequence[str]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for number, key in enumerate(ids):
        if key in first:
            yield taken_id(key, path=(kind, number), place=f"{kind}[{first[key]}]")
        first.setdefault(key, number)


def _without_payload(instance: Instance) -> Instance:
    return instance if instance.user_data is None else replace(instance, user_data=None)


def _dump(record: object) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def _load(text: object) -> object:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return text


def _sortable(key: AddressKey) -> tuple[str, int, int]:
    network, address = key
    return network, address.version, int(address)
