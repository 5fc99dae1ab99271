"""What the proxy's program asks of the host, each a function that a test can put another in the place of."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.app.account import group_name, user_name
from imdsproxy.errors import HaproxyMissing, HostRefused
from imdsproxy.host.refusal import host_refused

__all__ = [
    "Ended",
    "Surroundings",
    "check_directory",
    "find_haproxy",
    "has_ipv6",
    "has_syslog",
    "run_to_end",
    "runs_with",
    "try_to_bind",
]

_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_IPV6: Final = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
_SYSLOG: Final = Path("/dev/log")
_START_DEADLINE_S: Final = 30.0
_UMASK: Final = 0o027


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of a program: exit status (negative: the signal), standard output and error."""

    status: int
    output: str
    said: str


def find_haproxy(search: str | None = None) -> str | None:
    """The path of HAProxy on `search` (`PATH` without it) or in the system's places; `None` without one."""
    named = os.environ.get("PATH", "") if search is None else search
    # An agent's rootwrap may leave little of PATH.
    for directory in f"{named}:{_SYSTEM_PATH}".split(":"):
        candidate = Path(directory, "haproxy")
        # In this order: a directory that may not be looked into is no error then.
        if directory and os.access(candidate, os.X_OK) and candidate.is_file():
            return str(candidate)
    return None


def has_ipv6() -> bool:
    """Whether devices of this namespace get IPv6, as Neutron's agents ask it (oslo.utils, `is_ipv6_enabled`)."""
    try:
        return _IPV6.read_text().strip() == "0"
    except FileNotFoundError:
        return False


def has_syslog() -> bool:
    """Whether somebody takes log messages here."""
    return os.access(_SYSLOG, os.F_OK)


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


def run_to_end(
    arguments: Sequence[str],
    descriptor: int,
    *,
    alone: bool,
    deadline_s: float = _START_DEADLINE_S,
) -> Ended:
    """Start a program in a session of its own, and wait until it and all that write for it have ended or let go.

    Args:
        arguments: Its path and what it is told.
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
            stdout=subprocess.PIPE,
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
            output, said = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise HostRefused(
                f"{arguments[0]} has not come up within {deadline_s:g} s",
                hint=f"see what it waits for: {' '.join(arguments)}",
            ) from error
    return Ended(
        process.returncode, output.decode("utf-8", "replace"), said.decode("utf-8", "replace")
    )


def runs_with(pid: int, name: str, *, proc: Path = Path("/proc")) -> bool:
    """Whether this process is a HAProxy with a file of this name in its command line; one that is dead is not."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError as error:
        raise host_refused(f"look at process {pid}", error) from error
    program, *rest = (Path(os.fsdecode(word)).name for word in words)
    return "haproxy" in program and name in rest


def try_to_bind(port: int, *, dual_stack: bool) -> None:
    """Say now what HAProxy would say of the port, in words that its log would have to be searched for.

    Raises:
        HostRefused: Somebody listens there.
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
                f"listen on port {port}", error, hint=f"see who does: ss -ltnp 'sport = :{port}'"
            ) from error


def _ids() -> tuple[int, int]:
    return os.geteuid(), os.getegid()


def _drop_groups() -> None:
    try:
        os.setgroups([])
    except OSError as error:
        raise host_refused("give up the supplementary groups", error) from error


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The host, as the program sees it.

    Attributes:
        execute: Becomes another program: path and arguments (execv(3)). Does not return.
        run: Runs one to its end, see `run_to_end`.
        find_program: HAProxy's path.
        user_name: An account's name, of its name or id.
        group_name: A group's.
        ids: This process's own effective user and group.
        drop_groups: Gives up this process's supplementary groups.
        has_ipv6: Whether to listen for IPv6.
        has_syslog: Whether there is somewhere to log to.
        try_to_bind: See there.
    """

    execute: Callable[[str, list[str]], object] = os.execv
    run: Callable[..., Ended] = run_to_end
    find_program: Callable[[], str | None] = find_haproxy
    user_name: Callable[[str], str] = user_name
    group_name: Callable[[str], str] = group_name
    ids: Callable[[], tuple[int, int]] = _ids
    drop_groups: Callable[[], None] = _drop_groups
    has_ipv6: Callable[[], bool] = has_ipv6
    has_syslog: Callable[[], bool] = has_syslog
    try_to_bind: Callable[..., None] = try_to_bind
