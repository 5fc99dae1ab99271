"""The demonstration's own directory: where and whose it is; and one demonstration at a time."""

from __future__ import annotations

import contextlib
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from demo.processes import CommandError

__all__ = ["ALTERNATIVE", "alone", "choose", "prepare", "unfit"]

ALTERNATIVE: Final = Path("/var/tmp/imdsdemo")  # noqa: S108 - checked for its mark before use
_MARK: Final = ".imdsdemo"
_PARTS: Final = ("run", "state", "roots", "reads", "cloud-init")
_LONGEST: Final = 60
"""A socket's path has at most 107 bytes; HAProxy needs some of them for itself."""


def unfit(directory: Path) -> str | None:
    """Why the daemon cannot live there, or `None`."""
    if len(str(directory)) > _LONGEST:
        return f"its name has more than {_LONGEST} characters, too many for the sockets in it"
    if set(str(directory)) & set(":,\\ "):
        return "its name has a character that mount options cannot have"
    for parent in directory.parents:
        if parent.exists() and not parent.stat().st_mode & stat.S_IXOTH:
            return f"{parent} is closed to the account of HAProxy"
    return None


def choose(wanted: Path | None, repository: Path) -> Path:
    """The directory asked for, else `.demo` in the repository, else the alternative.

    Raises:
        CommandError: The one asked for is unfit.
    """
    if wanted is not None:
        reason = unfit(wanted.absolute())
        if reason is not None:
            raise CommandError(f"cannot use {wanted}: {reason}")
        return wanted.absolute()
    own = repository / ".demo"
    return own if unfit(own) is None else ALTERNATIVE


def prepare(directory: Path) -> None:
    """Makes the directory, or empties it of an earlier run's files.

    Raises:
        CommandError: It holds files that no demonstration put there.
    """
    mark = directory / _MARK
    if directory.exists() and not mark.exists() and any(directory.iterdir()):
        raise CommandError(f"{directory} is not empty and not of this demonstration")
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    mark.touch()
    for part in _PARTS:
        shutil.rmtree(directory / part, ignore_errors=True)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Holds a lock that leaves no file and ends with the process.

    Raises:
        CommandError: Another demonstration runs on this machine.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind("\0imdsproxy-demo")
        except OSError as error:
            raise CommandError("another script/demo runs on this machine") from error
        yield
