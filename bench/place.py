"""The directory of the measurements: one run at a time, and removal of leftovers."""

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
_LONGEST: Final = 57
"""A socket's path has at most 107 bytes, of which HAProxy and the directory of a group need some."""


class BenchError(Exception):
    """A precondition of the measurements failed; the message has the reason."""


def choose(repository: Path) -> Path:
    """Return `.bench` in the repository, or the alternative if that path is too long or closed to HAProxy's account."""
    own = repository / ".bench"
    closed = any(
        parent.exists() and not parent.stat().st_mode & stat.S_IXOTH for parent in own.parents
    )
    return ALTERNATIVE if closed or len(str(own)) > _LONGEST else own


def prepare(directory: Path) -> None:
    """Create the directory, empty.

    Raises:
        BenchError: The directory has foreign files.
    """
    if directory.exists() and not (directory / _MARK).exists() and any(directory.iterdir()):
        raise BenchError(f"{directory} is not empty and not of these measurements")
    clear(directory)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    (directory / _MARK).touch()


def sweep(directory: Path, lab: Lab) -> tuple[int, int]:
    """End processes that run on the directory, and remove its mounts and the networks.

    A controller restarts its processes, so the search is repeated.

    Returns:
        The numbers of processes and of networks.
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
    """Mount a tmpfs on a directory, creating the directory if needed, like /run on a host with an init.

    Raises:
        BenchError: The tmpfs cannot be mounted.
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
    """Raise the limit of open files of this process and its children to the maximum; return the limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def mounts_below(directory: Path, mountinfo: str) -> list[Path]:
    """Return the mount points inside a directory, the innermost first (proc(5), /proc/PID/mountinfo)."""
    points = [Path(line.split()[4].replace("\\040", " ")) for line in mountinfo.splitlines()]
    return [point for point in reversed(points) if point.is_relative_to(directory)]


def clear(directory: Path) -> None:
    """Remove the directory, its mark last, so that a later run can finish an interrupted removal."""
    for one in directory.iterdir() if directory.exists() else ():
        if one.is_dir():
            shutil.rmtree(one, ignore_errors=True)
        elif one.name != _MARK:
            one.unlink()
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def alone(patience_s: float = 0) -> Iterator[None]:
    """Hold a lock that leaves no file and ends with the process.

    Args:
        patience_s: Seconds to wait for other runs.

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
