"""Takes away what a test process that was killed leaves behind: processes, namespaces, directories.

It is a process that waits for the end of its input, which comes with the end of the tests however they end.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

_NETNS = Path("/run/netns")


def reap_at_the_end(*, directory: Path | None = None, namespaces: str | None = None) -> None:
    """Have these gone when this process has ended.

    Args:
        directory: With every process that has it on its command line, and every mount below it.
        namespaces: All whose names begin so, with the processes in them.
    """
    line = f"directory {directory}" if directory is not None else f"namespaces {namespaces}"
    reaper = _reaper(os.getpid())
    reaper.write(f"{line}\n")
    reaper.flush()


@functools.cache
def _reaper(_pid: int) -> IO[str]:
    words = [sys.executable, "-S", __file__]
    # Not to be waited for: it ends after this process.
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    process.returncode = 0
    assert process.stdin is not None
    return process.stdin


def reap(directories: Sequence[Path] = (), namespaces: tuple[str, ...] = ()) -> None:
    """Have directories gone with their processes and mounts, and all namespaces whose names begin so."""
    left = [one for one in directories if one.exists()]
    # What one of them starts again while it ends goes the second time.
    for _ in range(2):
        for pid, _ in processes_of(left):
            _kill(pid)
    names = sorted(one.name for one in _NETNS.iterdir()) if _NETNS.is_dir() else []
    for name in names:
        if name.startswith(namespaces):
            listed = subprocess.run(
                ["/usr/sbin/ip", "netns", "pids", name], capture_output=True, text=True, check=False
            )
            for word in listed.stdout.split():
                _kill(int(word))
            subprocess.run(["/usr/sbin/ip", "netns", "del", name], check=False)
    for directory in left:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if line.split()[1].startswith(f"{directory}/"):
                subprocess.run(["/usr/bin/umount", "--lazy", line.split()[1]], check=False)
        shutil.rmtree(directory, ignore_errors=True)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def processes_of(directories: Sequence[Path]) -> Iterator[tuple[int, str]]:
    """The processes that have one of these on their command lines, or are in it, with those lines."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                place = (entry / "cwd").readlink()
                if any(f"{one}/" in words or one == place for one in directories):
                    yield int(entry.name), words


if __name__ == "__main__":
    kinds: dict[str, list[str]] = {"directory": [], "namespaces": []}
    for line in sys.stdin.read().splitlines():
        kind, _, name = line.partition(" ")
        kinds[kind].append(name)
    reap([Path(name) for name in kinds["directory"]], tuple(kinds["namespaces"]))
