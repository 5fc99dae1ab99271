"""The measurements' own directory, one run at a time, and what a killed run left."""

from __future__ import annotations

import contextlib
import resource
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.lab import Lab
from bench.procs import end_all, find_by_argument, wait_until

__all__ = [
    "ALTERNATIVE",
    "BenchError",
    "alone",
    "choose",
    "clear",
    "mounts_below",
    "prepare",
    "put_in_memory",
    "raise_open_files",
    "sweep",
]

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
    clear(directory)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    (directory / _MARK).touch()


def sweep(directory: Path, lab: Lab) -> tuple[int, int]:
    """End processes that run on the directory, remove its mounts and the networks.

    A controller starts again what it watches, so processes are looked for more than once.

    Returns:
        How many processes and networks there were.
    """
    ended: set[int] = set()
    for _ in range(5):
        left = find_by_argument(directory)
        if not left:
            break
        ended |= left
        end_all(left)
    for mount in mounts_below(directory, Path("/proc/self/mountinfo").read_text()):
        subprocess.run(["/usr/bin/umount", "--lazy", str(mount)], check=False)
    return len(ended), lab.sweep()


def put_in_memory(directory: Path) -> None:
    """Have a directory, made if need be, on a tmpfs of its own: what /run is on a host with an init.

    Raises:
        BenchError: It cannot be mounted.
    """
    directory.mkdir(exist_ok=True)
    done = subprocess.run(
        ["/usr/bin/mount", "-t", "tmpfs", "-o", "mode=755,size=512m", "imdsbench", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"cannot mount a tmpfs on {directory}: {done.stderr.strip()}")


def raise_open_files() -> int:
    """Let this process and its children open as many files as they may; how many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def mounts_below(directory: Path, mountinfo: str) -> list[Path]:
    """The mount points inside a directory, the innermost first (proc(5), /proc/PID/mountinfo)."""
    points = [Path(line.split()[4].replace("\\040", " ")) for line in mountinfo.splitlines()]
    return [point for point in reversed(points) if point.is_relative_to(directory)]


def clear(directory: Path) -> None:
    """Remove the directory and everything in it; its mark last, so that a next run may go on with it."""
    for one in directory.iterdir() if directory.exists() else ():
        if one.is_dir():
            shutil.rmtree(one, ignore_errors=True)
        elif one.name != _MARK:
            one.unlink()
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def alone(patience_s: float = 0) -> Iterator[None]:
    """Holds a lock that leaves no file and ends with the process.

    Args:
        patience_s: How long to wait for others.

    Raises:
        BenchError: Other measurements run on this machine.
    """
    with socket.socket(socket.AF_UNIX) as lock:

        def bound() -> bool:
            with contextlib.suppress(OSError):
                lock.bind("\0imdsproxy-bench")
                return True
            return False

        if not bound() and not wait_until(bound, patience_s, every_s=0.2):
            raise BenchError("another script/bench runs on this machine")
        yield
