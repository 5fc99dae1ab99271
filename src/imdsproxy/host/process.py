"""Processes that outlive us: started detached, recognised in /proc, waited for and ended by pidfd.

A stored pid proves nothing, because another process may have it by now. A pidfd always refers to the same process. This
module also runs programs for their output, and manages threads and limits of our own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import os
import re
import resource
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from imdsproxy.errors import HostRefused, Ignoring, refusing
from imdsproxy.host.files import limit_log, open_log

PROC: Final = Path("/proc")

_T = TypeVar("_T")

_libc: Final = ctypes.CDLL(None, use_errno=True)

_SILENT_PROBES: Final = 2
"""Unanswered probes after which an idle worker counts as hung: within four seconds."""

_BUSY_PROBES: Final = 8
"""Unanswered probes after which a busy worker counts as hung: on an overloaded host it is only slow."""

_KILLED_WITHIN_S: Final = 5.0
_OPEN_FILES: Final = 65536
"""Limit of open files, as in our units. Without it a shell's soft limit is 1024: too few for several hostile
networks."""


async def readable(descriptor: int) -> None:
    """Wait until a descriptor is readable. No other task may wait for the same descriptor."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """State of a process, from `/proc/PID/stat` (proc_pid_stat(5)).

    Attributes:
        state: One letter: R running, S sleeping, D in disk sleep, T stopped, t traced, Z and X ended.
        ticks: Processor time used, in clock ticks (usually 10 ms each).
        started: Clock ticks after boot: with the pid, the identity of a process.
    """

    state: str
    parent: int
    ticks: int
    started: int


def _read(pid: int, name: str, proc: Path) -> str:
    """Return a file of a process; empty if there is none, or we may not read it."""
    # Without pathlib: some files are read every second.
    try:
        with open(f"{proc}/{pid}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 - see above
            return os.fsdecode(file.read())
    except OSError:
        return ""


def read_stat(pid: int, proc: Path = PROC) -> ProcessStat | None:
    """Return the state of a process; `None` if it is not visible, or is a zombie that only waits to be reaped."""
    # The name, in parentheses, may itself contain blanks and parentheses.
    fields = _read(pid, "stat", proc).rpartition(")")[2].split()
    if not fields or fields[0] in {"Z", "X"}:
        return None
    ticks = int(fields[11]) + int(fields[12])
    return ProcessStat(fields[0], int(fields[1]), ticks, int(fields[19]))


def read_rests(pid: int, proc: Path = PROC) -> int | None:
    """Return how often a process has blocked voluntarily (`voluntary_ctxt_switches` in proc_pid_status(5)).

    The number of a hung or stopped process does not grow. `None` means that there is no process.
    """
    found = re.search(r"(?m)^voluntary_ctxt_switches:\s*(\d+)", _read(pid, "status", proc))
    return None if found is None else int(found[1])


def command_name(pid: int, proc: Path = PROC) -> str:
    """Return the short name of a process; `?` if there is none, or we may not read it."""
    # A process may give itself a name that is not UTF-8.
    name = os.fsencode(_read(pid, "comm", proc)).decode(errors="replace")
    return name.rstrip("\n") or "?"


def read_arguments(pid: int, proc: Path = PROC) -> tuple[str, ...]:
    """Return a process's command line, its program first; empty if there is none, or we may not read it."""
    return tuple(_read(pid, "cmdline", proc).split("\0")[:-1])


def open_sockets(pid: int, proc: Path = PROC) -> Iterator[tuple[int, str]]:
    """Yield the inode of each open socket of a process, with the path of its descriptor."""
    # A process that ends during the scan holds no sockets.
    with contextlib.suppress(OSError), os.scandir(proc / str(pid) / "fd") as entries:
        for entry in entries:
            inode = socket_at(entry.path)
            if inode is not None:
                yield inode, entry.path


def socket_at(path: str) -> int | None:
    """Return the inode of the socket at a descriptor's path in `/proc`; `None` if it is closed, or no socket."""
    try:
        target = os.readlink(path)  # noqa: PTH115 - called for every descriptor of a host
    except OSError:
        return None
    return int(target[8:-1]) if target.startswith("socket:[") else None


class ProcessHandle:
    """Process held by pidfd: the handle refers to this process even if its pid is reused."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._status: int | None = None

    def alive(self) -> bool:
        """Return whether the process has not ended; a zombie has ended."""
        ended = select.poll()
        ended.register(self._descriptor, select.POLLIN)
        return not ended.poll(0)

    async def wait(self) -> int | None:
        """Wait until the process has ended, without polling.

        Return the exit status or negative signal number of our child; `None` for other processes.
        """
        # A duplicate, because several tasks may wait, and an event loop watches a descriptor only once.
        watched = os.dup(self._descriptor)
        try:
            await readable(watched)
        finally:
            os.close(watched)
        return self._reap()

    def _reap(self) -> int | None:
        # A child can be reaped only once, but several tasks may need its status.
        with contextlib.suppress(ChildProcessError):
            result = os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG)
            if result is not None:
                exited = result.si_code == os.CLD_EXITED
                self._status = result.si_status if exited else -result.si_status
        return self._status

    def kill(self, number: signal.Signals = signal.SIGTERM) -> bool:
        """Send a signal; return false if the process has already ended."""
        action = f"send {number.name} to process {self.pid}"
        with refusing(action), contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)
            return True
        return False

    async def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        # A process in disk sleep ends later.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILLED_WITHIN_S):
                await self.wait()

    async def stop(self, grace_s: float) -> bool:
        """Send SIGTERM, then SIGKILL after `grace_s` seconds; return whether the process ended before."""
        self.kill(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.wait()
        except TimeoutError:
            self.kill(signal.SIGKILL)
            await self.wait()
            return False
        return True

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_process(pid: int) -> ProcessHandle | None:
    """Return a handle on a running process; `None` if there is none."""
    none = Ignoring(errno.ESRCH, errno.EINVAL, errno.ENOENT)
    with refusing(f"open process {pid}"), none, contextlib.suppress(OverflowError):
        handle = ProcessHandle(pid, os.pidfd_open(pid))
        if handle.alive():
            return handle
        handle.close()
    return None


async def wait_gone(pid: int) -> None:
    """Wait until the process has ended; return at once if there is none."""
    handle = open_process(pid)
    if handle is None:
        # Reap our child if it has ended: it stays a zombie until then.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it does not block
        return
    try:
        await handle.wait()
    finally:
        handle.close()


def find_processes(program: str, arguments: AbstractSet[str]) -> list[ProcessHandle]:
    """Return all running processes whose program name contains `program` and whose arguments include `arguments`."""
    found: list[ProcessHandle] = []
    for entry in PROC.iterdir():
        words = read_arguments(int(entry.name)) if entry.name.isdecimal() else ()
        if words and program in Path(words[0]).name and arguments <= set(words):
            handle = open_process(int(entry.name))
            found += [] if handle is None else [handle]
    return found


def spawn_logged(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str]
) -> tuple[ProcessHandle, int]:
    """Start a process in its own session, so that it outlives us and our terminal.

    Return the process, and the offset in the log at which its output begins. Raises `HostRefused` if the process could
    not be started, `OSError` if the log cannot be opened.
    """
    limit_log(log)
    with os.fdopen(open_log(log), "ab") as sink, refusing(f"start {arguments[0]}"):
        offset = sink.tell()
        child = subprocess.Popen(
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env=dict(environment),
            cwd="/",
            start_new_session=True,
        )
        descriptor = os.pidfd_open(child.pid)
    # `ProcessHandle.wait` reaps the child. Without a return code, Popen would warn when it is collected.
    child.returncode = 0
    return ProcessHandle(child.pid, descriptor), offset


@dataclass(frozen=True, slots=True)
class Doubt:
    """Evidence of consecutive unanswered probes that a worker hangs.

    `ticks` is the processor time that the worker had used at the first probe, `stat` its state at the last.
    """

    worker: int = 0
    silent: int = 0
    ticks: int = 0
    stat: ProcessStat | None = None

    def after_silence(self, worker: int, stat: ProcessStat | None) -> Doubt:
        if worker != self.worker or not self.silent:
            return Doubt(worker, 1, 0 if stat is None else stat.ticks, stat)
        return Doubt(worker, self.silent + 1, self.ticks, stat)

    @property
    def hung(self) -> bool:
        """Return whether the worker must be killed; false if it has ended, because its master replaces it."""
        if self.stat is None or self.silent < _SILENT_PROBES:
            return False
        # A worker in disk sleep cannot be killed before the disk answers, and one that waits for a processor is slow.
        idle = self.stat.ticks == self.ticks and self.stat.state not in {"D", "R"}
        return idle or self.stat.state in {"T", "t"} or self.silent >= _BUSY_PROBES


async def run_program(*arguments: str, deadline_s: float, errors: bool = True) -> tuple[int, str]:
    """Run a program to its end, without a shell; return its exit status (negative: the signal) and output.

    The program has its own process group, which is killed at the deadline and on cancellation. `errors` adds standard
    error. Raises `HostRefused` if the program did not end in time, `OSError` if the program cannot be started.
    """
    # Not asyncio's function: if cancelled during a start, that kills the program but not the program's children.
    process = subprocess.Popen(  # noqa: ASYNC220 - a millisecond
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        output, _ = await asyncio.to_thread(process.communicate, None, deadline_s)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            if process.stdout is not None:
                process.stdout.close()
            raise HostRefused(
                f"{' '.join(arguments)} did not end within {deadline_s:g} s and was killed",
                hint="run it by hand to see what it waits for",
            ) from error
        raise
    return process.returncode, output.decode("utf-8", "replace").strip()


def start_thread(work: Callable[[], _T], name: str) -> asyncio.Future[_T]:
    """Run blocking work in a daemon thread: a thread that hangs does not delay the end of this process."""
    done: Future[_T] = Future()
    # From here on the future cannot be cancelled.
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(done)


def raise_descriptor_limit() -> None:
    """Raise this process's limit of open files to that of our units, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int:
    """Return the limit of open files of this process and its children; -1 for no limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return -1 if hard == resource.RLIM_INFINITY else hard


def leave_no_dumps() -> None:
    """Disable core dumps of this process and its children.

    Their memory holds keys and documents. Our units set the same limit; without them a shell's limit would apply.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def release_memory() -> None:
    """Return free memory to the kernel, if the C library can (`malloc_trim(3)`, glibc only)."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def freeze_garbage() -> None:
    """Collect garbage, then exclude all objects from later collections: most data from the start stays."""
    gc.collect()
    gc.freeze()
    gc.enable()
    release_memory()


@contextlib.contextmanager
def garbage_left() -> Iterator[None]:
    """Disable garbage collection while many lasting objects are created, and exclude them from later collections."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()


def call_libc(name: str, *arguments: object) -> int:
    """Call a C library function that the standard library lacks; raise `OSError` if the function returned -1."""
    result = int(getattr(_libc, name)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
