"""Controller of the listener `unix`: decides whether HAProxy may bind the socket, and checks that it stays HAProxy's.

Problems of this listener disable only this listener, never another. A running process keeps the path unless the
settings allow a takeover.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import structlog

from imdsproxy.config.schema import UnixListenerSettings
from imdsproxy.errors import DataplaneError, HostRefused, Problem, RuntimeUnavailable, refusing
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.rules.config import AGENTS
from imdsproxy.haproxy.rules.model import UnixBind
from imdsproxy.haproxy.unix_listener.plan import (
    Takeovers,
    deduce_socket_mode,
    judge_socket,
    name_owners,
)
from imdsproxy.host.account import group_id, user_id
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import ensure_directory
from imdsproxy.host.socket_file import FileIdentity, give_socket, identify_file, remove_file
from imdsproxy.host.state import SeenSocket, SocketState
from imdsproxy.reconcile.part import Count, Gauge, Part
from imdsproxy.reconcile.progress import Backoff

_BIND: Final = re.compile(rf"^\s*bind unix@(\S+) name {AGENTS}\b", re.MULTILINE)
_LARGEST_ID: Final = 2**32 - 2

SocketLook: TypeAlias = Callable[[Path, Collection[int]], SeenSocket]
"""Observes the file at a path; see `SocketFiles.observe`."""


@dataclass(frozen=True, slots=True)
class UnixListenerReport:
    """The socket for Neutron's proxies, if it is enabled.

    Attributes:
        serving: HAProxy's socket is at the path.
        mode: The socket's mode, as `0644`; empty if the socket is not served.
        taken_over: How often HAProxy took the path from a running process since the controller started.
    """

    path: str
    serving: bool
    mode: str = ""
    user: int | None = None
    group: int | None = None
    problem: str = ""
    taken_over: int = 0
    taken_from: str = ""


@dataclass(slots=True)
class UnixListener(Part):
    """Chooses the bind before each change of HAProxy's configuration, and checks the socket afterwards.

    Attributes:
        bind: Bind for the configuration; `None` if the listener is off or disabled by a problem.
        rebind: Whether HAProxy must close its socket first: its next worker would get one that no client can reach.
    """

    settings: Callable[[], UnixListenerSettings]
    haproxy: Haproxy
    look: SocketLook
    clock: Clock
    bind: UnixBind | None = None
    problem: Problem | None = None
    serving: bool = False
    rebind: bool = False
    taken_over: int = 0
    taken_from: str = ""
    _taking: SeenSocket | None = None
    _takeovers: Takeovers = field(default_factory=Takeovers)
    _signature: FileIdentity | None = None
    _refused: tuple[UnixBind, Problem] | None = None
    _backoff: Backoff = field(default_factory=lambda: Backoff(5.0, 60.0))
    _again_at: float = 0.0

    async def choose(self) -> None:
        self.rebind, self._taking = False, None
        settings, bind, problem = self.settings(), None, None
        try:
            if settings.enabled:
                bind, problem = await self._choose(settings)
        except DataplaneError as error:
            reason = f"{error.message}: the unix listener is not served"
            problem = Problem("unix_listener", reason, error.hint)
        self._decide(bind, problem)

    async def _choose(
        self, settings: UnixListenerSettings
    ) -> tuple[UnixBind | None, Problem | None]:
        wanted, now = _prepare(settings), self.clock.monotonic()
        if self._refused is not None and self._refused[0] != wanted:
            self._refused = None
        # Each new attempt after a refusal costs a worker of HAProxy, so wait for the back-off.
        if self._refused is not None and now < self._again_at:
            return None, self._refused[1]
        has = bound_path(self.haproxy.in_force()) == wanted.path
        seen = await self._look(settings.path)
        if seen is None:
            # HAProxy is just starting, so the socket's owner is unknown: keep the earlier state.
            return wanted if has else None, self.problem
        pause_s = self._takeovers.pause_s if self._takeovers.pause_left_s(now) else 0.0
        problem = judge_socket(wanted.path, seen, take_over=settings.take_over, pause_s=pause_s)
        if problem is not None:
            return None, problem
        if seen.state is SocketState.FOREIGN:
            self._taking = seen
        # HAProxy would ignore an unchanged configuration, so make it rebind.
        runs = self._taking is not None and self.haproxy.processes is not None
        self.rebind = seen.orphaned or (runs and has)
        return wanted, None

    def disable_if_rejected(self, error: DataplaneError) -> bool:
        """Disable the listener if it caused, or may have caused, HAProxy's refusal. Return whether it did."""
        bind = self.bind
        if bind is None:
            return False
        words = (f"[{bind.path}]", f"frontend {AGENTS}")
        # If no HAProxy runs, try without the listener, whatever the reason.
        if self.haproxy.processes is not None and not any(word in error.message for word in words):
            return False
        reason = f"{error.message}: the unix listener is not served"
        problem = Problem("unix_listener.path", reason, "see which user and unit HAProxy runs as")
        if self._refused is None:
            self._backoff.succeed()
        self._again_at = self.clock.monotonic() + self._backoff.fail()
        self._refused = (bind, problem)
        self._decide(None, problem)
        self.rebind = False
        return True

    def clear_rejection(self) -> None:
        self._refused = None

    async def settle(self, before: str | None) -> None:
        """After a reload, set mode and owner of the socket, and remove the socket of an earlier path."""
        bind = self.bind
        if self._taking is not None and bind is not None:
            self._takeovers.note(self.clock.monotonic())
            self.taken_over += 1
            self.taken_from, self._taking = name_owners(self._taking), None
            structlog.get_logger().info(
                "unix listener taken over", path=bind.path, taken_from=self.taken_from
            )
        try:
            if before is not None and (bind is None or before != bind.path):
                await self._withdraw(Path(before))
            if bind is not None and self.changed():
                await self._confirm(bind)
        except DataplaneError as error:
            self.problem = Problem("unix_listener", error.message, error.hint)

    async def report(self) -> Mapping[str, object]:
        settings, bind = self.settings(), self.bind
        if not settings.enabled:
            return {}
        socket = UnixListenerReport(
            path=str(settings.path),
            serving=self.serving,
            mode="" if bind is None else bind.mode,
            user=None if bind is None else bind.user,
            group=None if bind is None else bind.group,
            problem="" if self.problem is None else self.problem.reason,
            taken_over=self.taken_over,
            taken_from=self.taken_from,
        )
        return {"unix_listener": socket}

    def unix_listener_serving(self) -> Gauge:
        """1 while HAProxy's socket is at unix_listener.path; no series if the unix listener is disabled."""
        return self.serving if self.settings().enabled else None

    def unix_listener_taken_over(self) -> Count:
        """Times that HAProxy took unix_listener.path from a running process.

        The count grows each time that process takes the path back.
        """
        return self.taken_over

    def changed(self) -> bool:
        """Return whether the socket file is no longer HAProxy's."""
        if self.bind is None:
            return False
        return not self.serving or identify_file(Path(self.bind.path)) != self._signature

    def _decide(self, bind: UnixBind | None, problem: Problem | None) -> None:
        if bind is None or bind != self.bind:
            self.serving, self._signature = False, None
        self.bind, self.problem = bind, problem

    async def _look(self, path: Path) -> SeenSocket | None:
        processes = self.haproxy.processes
        seen = self.look(path, () if processes is None else processes.pids)
        if seen.state is not SocketState.FOREIGN or processes is None:
            return seen
        # The process may be a HAProxy that imdsproxy or systemd has just started.
        async with self.haproxy.records.lock:
            try:
                processes = await self.haproxy.master.read_processes()
            except RuntimeUnavailable:
                return None
        return self.look(path, processes.pids)

    async def _confirm(self, bind: UnixBind) -> None:
        path = Path(bind.path)
        seen = await self._look(path)
        self.serving = seen is not None and seen.state is SocketState.OURS
        if self.serving:
            self._refused = None
            # HAProxy sets both on sockets that it creates, but not on inherited sockets.
            give_socket(path, mode=int(bind.mode, 8), owner=(bind.user, bind.group))
            self._signature = identify_file(path)

    async def _withdraw(self, path: Path) -> None:
        file = identify_file(path)
        seen = await self._look(path)
        if file is None or seen is None:
            return
        if seen.state in {SocketState.OURS, SocketState.STALE}:
            # This never removes a socket that was bound here meanwhile: `file` identifies the earlier one.
            remove_file(path, file)


def _prepare(settings: UnixListenerSettings) -> UnixBind:
    directory = settings.path.parent
    user = None if settings.user is None else user_id(settings.user)
    group = None if settings.group is None else group_id(settings.group)
    if not directory.is_dir():
        # An existing directory is Neutron's and is left alone.
        mode = int(settings.directory_mode, 8)
        ensure_directory(directory, mode=mode, owner=(user or 0, group or 0))
    with refusing(f"look at {directory}"):
        status = directory.stat()
    user = status.st_uid if user is None else user
    group = status.st_gid if group is None else group
    proxy_user = _id(settings.proxy_user, user_id)
    proxy_group = _id(settings.proxy_group, group_id)
    mode = deduce_socket_mode(
        settings.mode, owner=user, group=group, proxy_user=proxy_user, proxy_group=proxy_group
    )
    return UnixBind(str(settings.path), f"{mode:04o}", user, group, settings.maxconn)


def bound_path(config: str) -> str | None:
    found = _BIND.search(config)
    return None if found is None else found[1]


def sweep_unix_socket(config: Path, look: SocketLook) -> None:
    """Remove the socket of a HAProxy that has ended, unless a process listens there."""
    try:
        bound = bound_path(config.read_text())
    except OSError:
        return
    if bound is None:
        return
    path = Path(bound)
    file = identify_file(path)
    if file is not None and look(path, ()).state is SocketState.STALE:
        remove_file(path, file)


def _id(account: str | None, look_up: Callable[[str], int]) -> int | None:
    if account is None:
        return None
    if not account.isdecimal():
        return look_up(account)
    if int(account) > _LARGEST_ID:
        raise HostRefused(f"id {account} is too large", hint=f"the largest id is {_LARGEST_ID}")
    return int(account)
