"""Our SQLite files: opening, error messages, and caches that survive a restart."""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeVar

from imdsproxy.errors import Problem, SourceCorrupt, SourceError, SourceRefused, SourceUnavailable

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

APPLICATION_ID: Final = 0x494D4453
"""`IMDS`: SQLite's `application_id`, which marks our files."""

_BUSY_S: Final = 5.0
_DAMAGED: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_HINTS: Final = {
    sqlite3.SQLITE_FULL: "make room on the file system of {directory}",
    sqlite3.SQLITE_READONLY: "make {path} and {directory} writable for imdsproxy",
    sqlite3.SQLITE_CANTOPEN: "create {directory}, writable for imdsproxy",
    sqlite3.SQLITE_PERM: "make {path} writable for imdsproxy",
    sqlite3.SQLITE_BUSY: "another program holds {path}: end its transaction",
    sqlite3.SQLITE_LOCKED: "another program holds {path}: end its transaction",
    sqlite3.SQLITE_IOERR: "look at the disk of {directory} and at the kernel's log",
}
_PRAGMAS: Final = (
    "journal_mode = WAL",
    # Committed data survives a kill -9. `Store.sync` makes it survive a power cut before it is acknowledged. FULL does
    # that inside each commit, and guests would wait for the disk (measured: 4 to 10 ms against 0.15 ms).
    "synchronous = NORMAL",
    "foreign_keys = ON",
    "trusted_schema = OFF",
    "cell_size_check = ON",
    "journal_size_limit = 67108864",
)


_REFILL: Final = (
    "put a copy from a backup there, or what `sqlite3 {name} .recover` saves, or nothing; start it, and add what is"
    " missing with `imdsproxy instance add --file`"
)


@contextmanager
def store_failures(path: Path, *, refill: str = _REFILL) -> Iterator[None]:
    """Convert failures of the store at `path` into a `SourceError`.

    Args:
        refill: Hint on how to restore the content after moving a damaged file aside; `{name}` is the file's name.

    Raises:
        SourceCorrupt: The file is damaged or not an SQLite database.
        SourceUnavailable: Another failure; a retry can succeed once the cause is gone.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise _sqlite_failure(path, error, refill) from error
    except OSError as error:
        raise SourceUnavailable(
            f"the store {path} cannot be used: {error.strerror or error}",
            hint=f"create {path.parent}, writable for imdsproxy",
        ) from error


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the block's statements as one atomic transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # After some errors, such as a full disk, SQLite has already rolled back.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _sqlite_failure(path: Path, error: sqlite3.Error, refill: str) -> SourceError:
    # The low byte is the primary result code. The rest of an extended code does not change what to do.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in _DAMAGED:
        return SourceCorrupt(
            f"the store {path} is damaged ({error}); guests are served what is known, nothing is"
            " deleted",
            hint=f"stop imdsproxy; move {path}, {path.name}-wal and {path.name}-shm aside; "
            + refill.format(name=path.name),
        )
    hint = _HINTS.get(code, "see the message; nothing has been changed")
    return SourceUnavailable(
        f"the store {path} refuses: {error}", hint=hint.format(path=path, directory=path.parent)
    )


def open_store(path: Path, migrations: Sequence[str]) -> sqlite3.Connection:
    """Open the file for the calling thread only. Create or migrate it if needed.

    A file of a newer version, or of another program, is never changed.

    Args:
        migrations: Migrations from each version (`user_version`) to the next: SQL statements separated by semicolons.

    Raises:
        SourceRefused: The file is of a newer version or of another program.
        sqlite3.Error: SQLite refuses.
        OSError: The file or its directory cannot be created.
    """
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    # The file contains user-data: create it with mode 0600, whatever the umask is.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
    # Another program may have stored invalid UTF-8: this must spoil only its own row.
    connection.text_factory = lambda data: data.decode("utf-8", "backslashreplace")
    try:
        version = _check_version(connection, path, len(migrations))
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").fetchall()
        if version < len(migrations):
            with transaction(connection):
                for statement in ";".join(migrations[version:]).split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {len(migrations)}")
    except BaseException:
        connection.close()
        raise
    return connection


def _check_version(connection: sqlite3.Connection, path: Path, newest: int) -> int:
    version = _pragma(connection, "user_version")
    application = _pragma(connection, "application_id")
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if application != APPLICATION_ID and (application or version or tables):
        raise SourceRefused(
            f"{path} is a database of another program",
            hint="correct sources.sqlite.path, or move the file away",
        )
    if version > newest:
        raise SourceRefused(
            f"the store {path} has version {version}, this imdsproxy knows up to {newest}",
            hint="run the newer imdsproxy that wrote it, or restore a copy from before the upgrade",
        )
    return version


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


@dataclass(slots=True)
class SideCache(Generic[_Key, _Value]):
    """Cache in an SQLite file that may be deleted at any time: it is created again.

    Attributes:
        path: Path of the file, which is created when there is something to keep.
        read: Yields all values in the file with their keys.
        write: Stores a value under its key; `None` deletes the stored value.
        lost: Text of `problem`, as "records in force are not kept".
        problem: Problem while the file cannot be used.
    """

    path: Path
    schema: str
    read: Callable[[sqlite3.Connection], Iterable[tuple[_Key, _Value]]]
    write: Callable[[sqlite3.Connection, _Key, _Value | None], None]
    subject: str
    lost: str
    problem: Problem | None = None
    _unsaved: dict[_Key, _Value | None] = field(default_factory=dict)

    def load(self) -> tuple[tuple[_Key, _Value], ...]:
        """Return all values with their keys; empty if the file is missing or cannot be used. Blocks."""
        try:
            with store_failures(self.path):
                if self.path.exists():
                    with closing(open_store(self.path, (self.schema,))) as connection:
                        return tuple(self.read(connection))
        except SourceError as error:
            self._note(error)
        return ()

    def keep(self, changes: Mapping[_Key, _Value | None]) -> None:
        """Queue changes for `save`; `None` deletes a value."""
        self._unsaved.update(changes)

    def save(self) -> None:
        """Write the queued changes; failed writes are retried by the next call. Blocks."""
        pending, self._unsaved = self._unsaved, {}
        if not pending:
            return
        try:
            with (
                store_failures(self.path),
                closing(open_store(self.path, (self.schema,))) as connection,
                transaction(connection),
            ):
                for key, value in pending.items():
                    self.write(connection, key, value)
        except SourceError as error:
            self._unsaved = {**pending, **self._unsaved}
            self._note(error)
        else:
            self.problem = None

    def _note(self, error: SourceError) -> None:
        self.problem = Problem(
            self.subject,
            f"{self.lost} over a restart: {error.message}",
            f"{error.hint}; if the file is deleted, imdsproxy makes a new one",
            str(self.path),
        )
