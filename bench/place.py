"""The measurements' own directory, one run at a time, and what a killed run left."""

from __future__ import annotations

import contextlib
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.lab import Lab
from bench.procs import end_all, find_by_argument

__all__ = ["ALTERNATIVE", "BenchError", "alone", "choose", "clear", "prepare", "sweep"]

ALTERNATIVE: Final = Path("/var/tmp/imdsbench")  # noqa: S108 - checked for its mark before use
_MARK: Final = ".imdsbench"
_LONGEST: Final = 60
"""A socket's path has at most 107 bytes; HAProxy needs some of them for itself."""


class BenchError(Exception):
    """Something that the measurements need did not come about; the message says what."""


def choose(repository: Path) -> Path:
    """`.bench` in the repository, or the alternative where the account of HAProxy cannot come there."""
    own = repository / ".bench"
    closed = any(
        parent.exists() and not parent.stat().st_mode & stat.S_IXOTH for parent in own.parents
    )
    return ALTERNATIVE if closed or len(str(own)) > _LONGEST else own


def prepare(directory: Path) -> None:
    """Make the directory, empty.

    Raises:
        BenchError: It holds files that are none of ours.
    """
    if directory.exists() and not (directory / _MARK).exists() and any(directory.iterdir()):
        raise BenchError(f"{directory} is not empty and not of these measurements")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    (directory / _MARK).touch()


def sweep(directory: Path, lab: Lab) -> tuple[int, int]:
    """End processes that run on the directory, and remove the networks; how many of both there were.

    A controller goes first: it would start again what it watches.
    """
    ended: set[int] = set()
    for _ in range(5):
        left = find_by_argument(directory)
        if not left:
            break
        ended |= left
        end_all(left)
    return len(ended), lab.sweep()


def clear(directory: Path) -> None:
    """Remove the directory and everything in it."""
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Holds a lock that leaves no file and ends with the process.

    Raises:
        BenchError: Other measurements run on this machine.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind("\0imdsproxy-bench")
        except OSError as error:
            raise BenchError("another script/bench runs on this machine") from error
        yield
