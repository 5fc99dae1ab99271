"""What the proxy's program does on the host: run HAProxy, look at accounts and ports, write and lock its file.

A configuration file belongs to the HAProxy that runs with it. The program that starts a proxy writes its file, locks it
(flock(2)) and hands the open file on to HAProxy, which keeps it, and so the lock, for its whole life. A locked file is
in use: it is neither replaced nor removed. No pid can be mistaken for another process's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.errors import HaproxyMissing, HostRefused
from imdsproxy.host.files import is_file_at, open_locked, sweep_unfinished
from imdsproxy.host.refusal import host_refused

_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_IPV6: Final = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
_SYSLOG: Final = Path("/dev/log")
_START_DEADLINE_S: Final = 30.0
_UMASK: Final = 0o027
_MODE: Final = 0o640
_DIRECTORY_MODE: Final = 0o755
_FOREIGN_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of a program: exit status (negative: the signal), and standard error."""

    status: int
    errors: str


class Host:
    """The host, as the program sees and changes it."""

    def find_haproxy(self, search: str | None = None) -> str:
        """The path of HAProxy on `search` (`PATH` without it) or in the system's places, or `HaproxyMissing`."""
        named = os.environ.get("PATH", "") if search is None else search
        # An agent's rootwrap may leave little of PATH.
        for directory in f"{named}:{_SYSTEM_PATH}".split(":"):
            candidate = Path(directory, "haproxy")
            # In this order: a directory that may not be looked into is no error then.
            if directory and os.access(candidate, os.X_OK) and candidate.is_file():
                return str(candidate)
        raise HaproxyMissing(
            "there is no haproxy on PATH", hint="install HAProxy 3.0 or newer (apt install haproxy)"
        )

    def has_ipv6(self) -> bool:
        """Whether devices of this namespace get IPv6, as Neutron's agents ask it (oslo.utils, `is_ipv6_enabled`)."""
        return _IPV6.exists() and _IPV6.read_text().strip() == "0"

    def has_syslog(self) -> bool:
        """Whether a syslog daemon listens."""
        return os.access(_SYSLOG, os.F_OK)

    def ids(self) -> tuple[int, int]:
        """This process's own effective user and group."""
        return os.geteuid(), os.getegid()

    def drop_groups(self) -> None:
        """Give up this process's supplementary groups."""
        try:
            os.setgroups([])
        except OSError as error:
            raise host_refused("give up the supplementary groups", error) from error

    def become(self, arguments: list[str]) -> None:
        """Become another program (execv(3)); `HaproxyMissing` where it cannot be run."""
        try:
            os.execv(arguments[0], arguments)  # noqa: S606 - no shell is meant
        except OSError as error:
            raise HaproxyMissing(f"cannot run {arguments[0]}: {error.strerror}") from error

    def end(self, pid: int) -> None:
        """End a process, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def run(
        self,
        arguments: Sequence[str],
        descriptor: int,
        *,
        alone: bool,
        deadline_s: float = _START_DEADLINE_S,
    ) -> Ended:
        """Start a program in a session of its own, and wait until it and all that write for it have ended or let go.

        Args:
            arguments: Its path and its arguments.
            descriptor: An open file that it inherits beside the standard ones.
            alone: Without this process's supplementary groups, which takes root.
            deadline_s: After that it is ended.

        Raises:
            HaproxyMissing: It cannot be run.
            HostRefused: It did not end in time.
        """
        try:
            process = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                umask=_UMASK,
                start_new_session=True,
                extra_groups=[] if alone else None,
                pass_fds=(descriptor,),
            )
        except OSError as error:
            raise HaproxyMissing(
                f"cannot run {arguments[0]}: {error.strerror}", hint="install HAProxy 3.0 or newer"
            ) from error
        with process:
            try:
                _, errors = process.communicate(timeout=deadline_s)
            except subprocess.TimeoutExpired as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise HostRefused(
                    f"{arguments[0]} has not come up within {deadline_s:g} s",
                    hint=f"see what it waits for: {' '.join(arguments)}",
                ) from error
        return Ended(process.returncode, errors.decode("utf-8", "replace"))

    def runs_with(self, pid: int, name: str, *, proc: Path = Path("/proc")) -> bool:
        """Whether this process is a HAProxy with a file of this name in its command line; one that is dead is not."""
        try:
            words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return False
        except OSError as error:
            raise host_refused(f"look at process {pid}", error) from error
        program, *rest = (Path(os.fsdecode(word)).name for word in words)
        return "haproxy" in program and name in rest

    def try_to_bind(self, port: int, *, dual_stack: bool) -> None:
        """Say now what HAProxy would say of the port, in words that its log would have to be searched for.

        Raises:
            HostRefused: Another program listens there.
            PrivilegeMissing: The port takes root.
        """
        import socket  # noqa: PLC0415 - HAProxy that goes into the background says it itself

        family = socket.AF_INET6 if dual_stack else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                if dual_stack:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                probe.bind(("::" if dual_stack else "0.0.0.0", port))  # noqa: S104 - as the proxy itself
            except OSError as error:
                raise host_refused(
                    f"listen on port {port}",
                    error,
                    hint=f"see who does: ss -ltnp 'sport = :{port}'",
                ) from error


def check_directory(path: Path, purpose: str, *, hint: str) -> None:
    """See that a directory is there.

    Raises:
        HostRefused: It is not; says what for it is wanted.
        PrivilegeMissing: This process may not look.
    """
    try:
        there = path.is_dir()
    except OSError as error:
        raise host_refused(f"look at {path}", error) from error
    if not there:
        raise HostRefused(f"there is no directory {path} for the {purpose}", hint=hint)


def claim_file(path: Path, data: bytes) -> int:
    """Have a file with exactly `data`, mode 0640 whatever the umask is, and the lock on it.

    A reader sees the old bytes or the new ones. Of several that want the same file one gets it.

    Returns:
        The open file. The lock goes when its last copy is closed.

    Raises:
        HostRefused: It is in use, or the file system refused; then it is as it was.
        PrivilegeMissing: This process may not write there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        # Locked while it is replaced: no other process can come between.
        before = _lock(path, os.O_RDWR | os.O_CREAT)
        new = -1
        try:
            new = _lock(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(new, rest) :]
            os.fchmod(new, _MODE)
            temporary.replace(path)
        except BaseException:
            if new >= 0:
                os.close(new)
            if not os.fstat(before).st_size:
                # It was made just now.
                path.unlink()
            raise
        finally:
            temporary.unlink(missing_ok=True)
            os.close(before)
    except OSError as error:
        raise host_refused(f"write {path}", error) from error
    return new


def remove_unclaimed(path: Path) -> bool:
    """Remove the file, and what writers that were killed left beside it; whether it was there.

    Raises:
        HostRefused: It is in use, or the file system refused.
        PrivilegeMissing: This process may not remove it.
    """
    try:
        held = _lock(path, os.O_RDONLY)
        path.unlink(missing_ok=True)
        # HAProxy's own, of a start that was killed.
        path.with_suffix(".pid").unlink(missing_ok=True)
        os.close(held)
        removed = True
    except FileNotFoundError:
        removed = False
    except OSError as error:
        raise host_refused(f"remove {path}", error) from error
    sweep_unfinished(path.parent)
    return removed


def _lock(path: Path, flags: int) -> int:
    """The file of this name, open and locked."""
    while True:
        descriptor = open_locked(path, flags | os.O_NOFOLLOW)
        if descriptor is None:
            raise HostRefused(
                f"{path} is in use: its proxy runs, or is being started",
                hint=f"end the haproxy that has it in its command line: pgrep -af {path.stem}",
            )
        # Another process may have replaced it between opening and locking.
        if is_file_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Ensure a directory in which only its owner writes; what is made on the way is 0755 or tighter.

    A directory that others may write to would let them choose the configuration of a HAProxy that root starts.

    Raises:
        HostRefused: The file system refused, or something else of that name is there.
        PrivilegeMissing: This process may not make it, or not tighten it.
    """
    try:
        for directory in (*reversed(path.parents), path):
            if not directory.exists():
                directory.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & _FOREIGN_WRITE:
            path.chmod(mode & ~_FOREIGN_WRITE)
        if not path.is_dir():
            raise NotADirectoryError(20, "Not a directory")
    except OSError as error:
        raise host_refused(
            f"create the directory {path}", error, hint="choose another place with --state-path"
        ) from error
