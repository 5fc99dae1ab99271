"""SQLite's and the file system's refusals in the words of who must act."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, Final

from imdsproxy.errors import SourceCorrupt, SourceError, SourceUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["store_failures"]

_DAMAGED: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_HINTS: Final = {
    sqlite3.SQLITE_FULL: "make room on the file system of {directory}",
    sqlite3.SQLITE_READONLY: "make {path} and {directory} writable for imdsproxy",
    sqlite3.SQLITE_CANTOPEN: "make {directory}, writable for imdsproxy",
    sqlite3.SQLITE_PERM: "make {path} writable for imdsproxy",
    sqlite3.SQLITE_BUSY: "another program holds {path}: end its transaction",
    sqlite3.SQLITE_LOCKED: "another program holds {path}: end its transaction",
    sqlite3.SQLITE_IOERR: "look at the disk of {directory} and at the kernel's log",
}


@contextlib.contextmanager
def store_failures(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the store at `path` into a `SourceError`.

    Raises:
        SourceCorrupt: The file is damaged, or no SQLite database.
        SourceUnavailable: Anything else; trying again can help once somebody has acted.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise _sqlite_failure(path, error) from error
    except OSError as error:
        raise SourceUnavailable(
            f"the store {path} cannot be used: {error.strerror or error}",
            hint=f"make {path.parent}, writable for imdsproxy",
        ) from error


def _sqlite_failure(path: Path, error: sqlite3.Error) -> SourceError:
    # The low byte is the kind; the rest of an extended code says more than anybody can act on.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in _DAMAGED:
        return SourceCorrupt(
            f"the store {path} is damaged ({error}); guests are served what is known, nothing is"
            " deleted",
            hint=f"stop imdsproxy; move {path}, {path.name}-wal and {path.name}-shm aside; put a copy"
            f" from a backup there, or what `sqlite3 {path.name} .recover` saves, or nothing; start"
            " it, and add what is missing with `imdsproxy instance add --file`",
        )
    hint = _HINTS.get(code, "see the message; nothing has been changed")
    return SourceUnavailable(
        f"the store {path} refuses: {error}", hint=hint.format(path=path, directory=path.parent)
    )
