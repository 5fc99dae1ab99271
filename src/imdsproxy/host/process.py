"""Processes that outlive us: started detached, known again by /proc, waited for and ended by pidfd.

A pid alone says nothing: another process may have it since it was written down. A process is held by a pidfd, which
never changes its meaning. Also: programs that are run for their answer, and threads and limits of our own process.
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
"""Unanswered probes after which a worker that does nothing counts as hung: within four seconds."""

_BUSY_PROBES: Final = 8
"""The same for one that works all the while: on a host that is out of processor time it is only slow."""

_KILLED_WITHIN_S: Final = 5.0
_OPEN_FILES: Final = 65536
"""As our units have it; without them a shell's soft limit is 1024, which a few hostile networks could use up."""


async def readable(descriptor: int) -> None:
    """Wait until a descriptor, for which no other task waits, can be read."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """The state of a process, from `/proc/PID/stat` (proc_pid_stat(5)).

    Attributes:
        state: One letter: R running, S sleeping, D in the disk, T stopped, t traced, Z and X ended.
        parent: Its parent's pid.
        ticks: Processor time used, in clock ticks (usually 10 ms each).
        started: Clock ticks after boot: with the pid, the identity of a process.
    """

    state: str
    parent: int
    ticks: int
    started: int


def _read(pid: int, name: str, proc: Path) -> str:
    """A file of a process; empty where there is none, or we may not look."""
    try:
        return os.fsdecode((proc / str(pid) / name).read_bytes())
    except OSError:
        return ""


def read_stat(pid: int, proc: Path = PROC) -> ProcessStat | None:
    """The state of a process; `None` when we can see none, or a zombie that only waits to be reaped."""
    # The name, in parentheses, may hold blanks and parentheses itself.
    fields = _read(pid, "stat", proc).rpartition(")")[2].split()
    if not fields or fields[0] in {"Z", "X"}:
        return None
    ticks = int(fields[11]) + int(fields[12])
    return ProcessStat(fields[0], int(fields[1]), ticks, int(fields[19]))


def read_rests(pid: int, proc: Path = PROC) -> int | None:
    """How often a process has blocked voluntarily (`voluntary_ctxt_switches` in proc_pid_status(5)).

    One that hangs, or is stopped, does not any more. `None` when there is none.
    """
    found = re.search(r"(?m)^voluntary_ctxt_switches:\s*(\d+)", _read(pid, "status", proc))
    return None if found is None else int(found[1])


def command_name(pid: int, proc: Path = PROC) -> str:
    """The short name of a process; `?` where there is none, or we may not look."""
    # Any process may give itself a name that is no UTF-8.
    name = os.fsencode(_read(pid, "comm", proc)).decode(errors="replace")
    return name.rstrip("\n") or "?"


def read_arguments(pid: int, proc: Path = PROC) -> tuple[str, ...]:
    """The command line of a process, its program first; nothing where there is none, or we may not look."""
    return tuple(_read(pid, "cmdline", proc).split("\0")[:-1])


def open_sockets(pid: int, proc: Path = PROC) -> Iterator[tuple[int, str]]:
    """The inode of each socket that a process has open, with the path of its descriptor."""
    # A process that ends while it is looked at holds nothing any more.
    with contextlib.suppress(OSError), os.scandir(proc / str(pid) / "fd") as entries:
        for entry in entries:
            inode = socket_at(entry.path)
            if inode is not None:
                yield inode, entry.path


def socket_at(path: str) -> int | None:
    """The inode of the socket at a descriptor's path in `/proc`; `None` where it is no socket, or is closed."""
    try:
        target = os.readlink(path)  # noqa: PTH115 - called for every descriptor of a host
    except OSError:
        return None
    return int(target[8:-1]) if target.startswith("socket:[") else None


class ProcessHandle:
    """A process held by pidfd: whatever becomes of its pid, this is it or its end.

    Attributes:
        pid: Its pid.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._status: int | None = None

    def alive(self) -> bool:
        """Whether it has not ended yet; a zombie has."""
        ended = select.poll()
        ended.register(self._descriptor, select.POLLIN)
        return not ended.poll(0)

    async def wait(self) -> int | None:
        """Wait until it has ended, without polling.

        Returns:
            Its exit status, or the negative signal, when it is our child; else `None`.
        """
        # Its own descriptor: several tasks may wait, and a loop knows a descriptor only once.
        watched = os.dup(self._descriptor)
        try:
            await readable(watched)
        finally:
            os.close(watched)
        return self._reap()

    def _reap(self) -> int | None:
        # A child can be reaped once, but several tasks may want to know how it ended.
        with contextlib.suppress(ChildProcessError):
            result = os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG)
            if result is not None:
                exited = result.si_code == os.CLD_EXITED
                self._status = result.si_status if exited else -result.si_status
        return self._status

    def kill(self, number: signal.Signals = signal.SIGTERM) -> bool:
        """Send a signal; false when it has ended already.

        Raises:
            PrivilegeMissing: It belongs to another user.
        """
        action = f"send {number.name} to process {self.pid}"
        with refusing(action), contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)
            return True
        return False

    async def kill_group(self) -> None:
        """End one that `spawn_logged` started, with all of its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        # One that waits for a disk ends later.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILLED_WITHIN_S):
                await self.wait()

    async def stop(self, grace_s: float) -> bool:
        """SIGTERM, then SIGKILL after `grace_s` seconds; returns when it has ended.

        Returns:
            Whether it ended within the grace.
        """
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
        """Let go of the process, which goes on."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_process(pid: int) -> ProcessHandle | None:
    """A handle on a running process; `None` if there is none."""
    none = Ignoring(errno.ESRCH, errno.EINVAL, errno.ENOENT)
    with refusing(f"open process {pid}"), none, contextlib.suppress(OverflowError):
        handle = ProcessHandle(pid, os.pidfd_open(pid))
        if handle.alive():
            return handle
        handle.close()
    return None


async def wait_gone(pid: int) -> None:
    """Return when the process has ended, at once when there is none."""
    handle = open_process(pid)
    if handle is None:
        # A child of ours that has ended leaves a zombie until it is waited for.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it does not block
        return
    try:
        await handle.wait()
    finally:
        handle.close()


def find_processes(program: str, arguments: AbstractSet[str]) -> list[ProcessHandle]:
    """Every running process whose program's name holds `program`, and that has all these arguments."""
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
    """Start a process in a session of its own, that our end and our terminal's do not touch.

    Args:
        arguments: The program's path and its arguments; no shell is involved.
        log: Its standard output and error go to the end of this file.
        environment: All of its environment.

    Returns:
        The process, and where in the log its output begins.

    Raises:
        HostRefused: It could not be started.
        OSError: The log cannot be opened.
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
    # It is ours to reap, by `ProcessHandle.wait`: Popen would warn of it when it is collected.
    child.returncode = 0
    return ProcessHandle(child.pid, descriptor), offset


@dataclass(frozen=True, slots=True)
class Doubt:
    """What unanswered probes, one after the other, say of a worker.

    Attributes:
        worker: Whom they were for.
        silent: How many there were.
        ticks: Processor time that it had used at the first one.
        stat: How it was at the last one.
    """

    worker: int = 0
    silent: int = 0
    ticks: int = 0
    stat: ProcessStat | None = None

    def after_silence(self, worker: int, stat: ProcessStat | None) -> Doubt:
        """One more probe was not answered."""
        if worker != self.worker or not self.silent:
            return Doubt(worker, 1, 0 if stat is None else stat.ticks, stat)
        return Doubt(worker, self.silent + 1, self.ticks, stat)

    @property
    def hung(self) -> bool:
        """Waiting longer is no use. A worker that has ended is its master's business."""
        if self.stat is None or self.silent < _SILENT_PROBES:
            return False
        # One that waits for a disk can't be ended before the disk answers, and one that waits for a processor is slow.
        idle = self.stat.ticks == self.ticks and self.stat.state not in {"D", "R"}
        return idle or self.stat.state in {"T", "t"} or self.silent >= _BUSY_PROBES


async def run_program(
    *arguments: str, deadline_s: float, text: str = "", errors: bool = True
) -> tuple[int, str]:
    """Run a program to its end: its exit status (negative: the signal), and what it wrote.

    It has a process group of its own, which is killed at the deadline, and when this is cancelled.

    Args:
        arguments: Its path or name, and its arguments; no shell is involved.
        deadline_s: Seconds until it is killed.
        text: Its standard input.
        errors: With what it wrote to standard error.

    Raises:
        HostRefused: It did not end in time.
        OSError: It cannot be started.
    """
    # Not asyncio's own: cancelled while it starts a program, that kills the program and not its children.
    process = subprocess.Popen(  # noqa: ASYNC220 - a millisecond
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        output, _ = await asyncio.to_thread(process.communicate, text.encode(), deadline_s)
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
    """Do what blocks in a daemon thread: one that never comes back is not waited for when this process ends."""
    done: Future[_T] = Future()
    # From here on cancelling does not take it back.
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(done)


def raise_descriptor_limit() -> None:
    """Raise the limit of open files of this process and its children to that of our units, as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int:
    """How many files this process and those that it starts can have open at most; -1 for no limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return -1 if hard == resource.RLIM_INFINITY else hard


def leave_no_dumps() -> None:
    """Write no memory of this process, nor of those that it starts, to disk when one crashes.

    It holds keys and documents. Our units say the same; without them a shell's limit would count.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def release_memory() -> None:
    """Give free memory back to the kernel, as far as the C library can (`malloc_trim(3)`, of glibc alone)."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def freeze_garbage() -> None:
    """Collect garbage, and look for it from now on among what comes later only: what a start has read mostly stays."""
    gc.collect()
    gc.freeze()
    gc.enable()
    release_memory()


@contextlib.contextmanager
def garbage_left() -> Iterator[None]:
    """Look for no garbage while very much is made that stays, and later not among it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()


def call_libc(name: str, *arguments: object) -> int:
    """Call a function of the C library that the standard library lacks.

    Raises:
        OSError: It returned -1.
    """
    result = int(getattr(_libc, name)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
