"""Executor of a plan's actions. Actions are idempotent."""

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, assert_never

from imdsproxy.api.client import AdminClient
from imdsproxy.config.load import Loaded
from imdsproxy.errors import AdminUnavailable, HostRefused, ImdsproxyError, refusing
from imdsproxy.host.files import write_atomic
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.process import ProcessHandle, open_process, read_stat
from imdsproxy.host.sockets import SOCK_DIAG, listening_sockets
from imdsproxy.model.entities import METADATA_IPV4
from imdsproxy.sources.neutron_namespaces.records import ROUTER_PREFIX
from imdsproxy.tools.takeover import plan
from imdsproxy.tools.takeover.agents import edit_file, read_options
from imdsproxy.tools.takeover.observe import (
    find_proxies,
    find_stand_ins,
    find_unrouted,
    is_idle_router,
)

_POLL_S: Final = 0.1
_FOREIGN: Final = "foreign-listener"
_MIGRATE: Final = Path("/proc/sys/net/ipv4/tcp_migrate_req")
"""Sysctl that moves connections from a closing listener to another listener of the same address (ip-sysctl(7))."""

_SETTINGS_MODE: Final = 0o640
_SECRET_MODE: Final = 0o600
_PROGRAM_MODE: Final = 0o755
_SERVER_ERROR: Final = 500
_ANSWER_S: Final = 10.0
_DRAIN_S: Final = 60.0
"""Longest wait for open connections; exceeds HAProxy's timeout for idle connections."""

_SHOWN: Final = 500
"""Number of characters of a command's output in an error."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Executor of actions on this host.

    Args:
        daemon: Client of the running daemon.
        load: Function that reads the current settings.
        timeout_s: Maximum duration of a wait or command, in seconds.
    """

    daemon: AdminClient
    load: Callable[[], Loaded]
    timeout_s: float

    def do(self, action: plan.Action) -> str:
        """Execute one action; return a description of the result.

        Raises:
            ImdsproxyError: The action failed or timed out.
        """
        match action:
            case plan.ImportSettings():
                result = self._import(action)
            case plan.WriteSettings() | plan.EditSettings():
                result = self._change(action)
            case plan.Restart(command) | plan.StartAgent(command):
                _run(command, self.timeout_s)
                result = command
            case plan.WaitServed() | plan.WaitProxies() | plan.WaitRoutes():
                result = self._wait_for(action)
            case plan.EndProxies(prefix):
                with migrating(prefix):
                    result = f"{self._end_proxies(prefix)} ended"
            case plan.StopAgent():
                result = self._stop_agent(action)
            case plan.LetGo():
                result = self._let_go(action)
            case plan.PlaceStandIn() | plan.WaitStandIns() | plan.RemoveStandIn():
                result = self._do_stand_ins(action)
            case never:
                assert_never(never)
        return result

    def _import(self, action: plan.ImportSettings) -> str:
        from imdsproxy.config.neutron_import import plan_import  # noqa: PLC0415 - only here

        options = [read_options(path, action.reach) for path in action.files]
        imported = plan_import(options, Path(action.secret), behind_proxies=False)
        self._write(
            {
                Path(action.secret): (imported.secret.encode(), _SECRET_MODE),
                Path(action.settings): (imported.text.encode(), _SETTINGS_MODE),
            }
        )
        return f"written, and {action.secret}"

    def _change(self, action: plan.WriteSettings | plan.EditSettings) -> str:
        match action:
            case plan.WriteSettings(path, text):
                self._write({Path(path): (text.encode(), _SETTINGS_MODE)})
            case plan.EditSettings(path, edit, reach):
                edit_file(path, reach, edit)
        return "written"

    def _write(self, files: dict[Path, tuple[bytes, int]]) -> None:
        """Write files and load the settings; restore the files if the settings are invalid."""
        before = {path: path.read_bytes() if path.exists() else None for path in files}
        try:
            for path, (data, mode) in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, data, mode=mode, durable=True)
            self.load()
        except ImdsproxyError:
            for path, old in before.items():
                if old is None:
                    path.unlink(missing_ok=True)
                else:
                    write_atomic(path, old, mode=files[path][1])
            raise

    def _wait_for(self, action: plan.WaitServed | plan.WaitProxies | plan.WaitRoutes) -> str:
        match action:
            case plan.WaitServed(prefix):
                return self._wait_served(prefix)
            case plan.WaitProxies(prefix, port):
                return self._wait_proxies(prefix, port)
            case plan.WaitRoutes(prefix, state_path):
                return self._wait_routes(prefix, Path(state_path))
            case never:
                assert_never(never)

    def _wait_served(self, prefix: str) -> str:
        served: set[str] = set()
        answered: dict[str, str] = {}

        def lacks() -> str:
            readiness = self.daemon.get("/v1/status")["readiness"]
            if not readiness["ready"]:
                return f"imdsproxy is not ready: {readiness['reasons'][0]}"
            known = {one["record"]["id"]: one for one in self.daemon.get("/v1/networks")}
            places = {one["record"]["listener"].get("namespace") for one in known.values()}
            theirs = {one.namespace for one in (*find_proxies(prefix), *find_stand_ins(prefix))}
            if missing := sorted(theirs - places):
                return f"imdsproxy does not know namespace {missing[0]}"
            for network, one in known.items():
                left_out = one["left_out"]
                if left_out is not None and left_out["code"] != _FOREIGN:
                    return f"network {network} is not served: {left_out['reason']}"
            served.update(known)
            return self._ask_in_each(known.keys() - answered.keys(), answered)

        self._wait(lacks)
        return f"{len(served)} networks, a request answered in {len(answered)}"

    def _ask_in_each(self, networks: set[str], answered: dict[str, str]) -> str:
        addresses: dict[str, str] = {}
        for one in self.daemon.get("/v1/instances") if networks else ():
            for port in one["record"].get("ports", ()):
                for address in port.get("addresses", ())[:1]:
                    addresses.setdefault(port["network"], address)
        for network in sorted(networks & addresses.keys()):
            query = {"network": network, "address": addresses[network], "probe": "true"}
            status = self.daemon.get("/v1/explain", query)["probe"]["status"]
            if status >= _SERVER_ERROR:
                return f"{addresses[network]} in network {network} gets {status}"
            answered[network] = str(status)
        return ""

    def _end_proxies(self, prefix: str) -> int:
        asked: set[int] = set()

        def lacks() -> str:
            left = find_proxies(prefix)
            for one in left:
                if one.pid not in asked and (handle := open_process(one.pid)) is not None:
                    with contextlib.closing(handle):
                        handle.kill(signal.SIGUSR1)
                    asked.add(one.pid)
            return f"HAProxy {left[0].pid} in {left[0].namespace} still answers" if left else ""

        self._wait(lacks)
        return len(asked)

    def _stop_agent(self, action: plan.StopAgent) -> str:
        # A paused agent starts no HAProxy. systemd resumes the agent when it stops the unit.
        held = None if action.agent is None else _open_agent(action.agent)
        with migrating(action.prefix), contextlib.ExitStack() as stack:
            if held is not None:
                stack.callback(held.close)
                stack.callback(held.kill, signal.SIGCONT)
                held.kill(signal.SIGSTOP)
                while find_proxies(action.prefix):
                    held.kill(signal.SIGCONT)
                    self._end_proxies(action.prefix)
                    held.kill(signal.SIGSTOP)
            _run(action.command, self.timeout_s)
            self._end_proxies(action.prefix)
        return action.command

    def _wait_proxies(self, prefix: str, port: int) -> str:
        def lacks() -> str:
            # Each poll reads the networks again because the agent may drop one meanwhile.
            places = set(self._networks_in(prefix).values())
            wanted = {one for one in places if not is_idle_router(one)}
            if missing := sorted(wanted - {one.namespace for one in find_proxies(prefix)}):
                return f"no HAProxy of the agent's in {missing[0]}"
            for place in sorted(wanted - answering):
                if reason := _ask_inside(thread, place, port):
                    return f"the agent's HAProxy in {place}: {reason}"
                answering.add(place)
            return ""

        thread, answering = NamespaceThread(NamespaceDirectory()), set[str]()
        with contextlib.closing(thread):
            self._wait(lacks)
        return f"{len(answering)} answer"

    def _let_go(self, action: plan.LetGo) -> str:
        networks = sorted(self._networks_in(action.prefix))
        with migrating(action.prefix):
            # Open connections need their records, so the listeners end first.
            self.daemon.request("POST", "/v1/let-go", body={"networks": networks})
            draining = set(self.daemon.get("/v1/status")["haproxy"]["old_workers"])
            with contextlib.suppress(HostRefused):
                self._wait(lambda: self._still_drains(draining), within_s=_DRAIN_S)
        Path(action.path).unlink(missing_ok=True)
        _run(action.command, self.timeout_s)
        self._wait(lambda: self._lacks_end(action.prefix))
        return action.command

    def _networks_in(self, prefix: str) -> Mapping[str, str]:
        """Return the namespaces with this prefix in which imdsproxy serves networks, by network id."""
        return {
            one["record"]["id"]: one["record"]["listener"]["namespace"]
            for one in self.daemon.get("/v1/networks")
            if one["record"]["listener"].get("namespace", "").startswith(prefix)
        }

    def _do_stand_ins(
        self, action: plan.PlaceStandIn | plan.WaitStandIns | plan.RemoveStandIn
    ) -> str:
        match action:
            case plan.PlaceStandIn(path, text):
                with refusing(f"write {path}"):
                    write_atomic(Path(path), text.encode(), mode=_PROGRAM_MODE, durable=True)
                return "written"
            case plan.WaitStandIns(prefix):
                return self._wait_stand_ins(prefix)
            case plan.RemoveStandIn(path, prefix):
                return f"{self._remove_stand_in(path, prefix)} ended"
            case never:
                assert_never(never)

    def _wait_stand_ins(self, prefix: str) -> str:
        places = set(self._networks_in(prefix).values())

        def lacks() -> str:
            if back := find_proxies(prefix):
                return f"HAProxy {back[0].pid} in {back[0].namespace} has come: the agent does not find the stand-in"
            missing = sorted(places - {one.namespace for one in find_stand_ins(prefix)})
            return f"no stand-in in {missing[0]}" if missing else ""

        self._wait(lacks)
        return f"{len(places)} networks"

    def _wait_routes(self, prefix: str, state_path: Path) -> str:
        def lacks() -> str:
            missing = find_unrouted(prefix, state_path)
            return f"leases in {missing[0]} name no route to {METADATA_IPV4}" if missing else ""

        self._wait(lacks)
        return "guests take it with their next lease"

    def _remove_stand_in(self, path: str, prefix: str) -> int:
        with refusing(f"remove {path}"):
            Path(path).unlink(missing_ok=True)
        found = find_stand_ins(prefix)
        for one in found:
            if (handle := open_process(one.pid)) is not None:
                with contextlib.closing(handle):
                    handle.kill(signal.SIGTERM)
        return len(found)

    def _still_drains(self, workers: set[int]) -> str:
        left = workers & set(self.daemon.get("/v1/status")["haproxy"]["old_workers"])
        return "connections are open" if left else ""

    def _lacks_end(self, prefix: str) -> str:
        readiness = self.daemon.get("/v1/status")["readiness"]
        if not readiness["ready"]:
            return f"imdsproxy is not ready: {readiness['reasons'][0]}"
        return "imdsproxy still serves there" if self._networks_in(prefix) else ""

    def _wait(self, lacks: Callable[[], str], *, within_s: float | None = None) -> None:
        """Poll until `lacks` returns an empty string.

        Raises:
            HostRefused: The wait timed out.
        """
        within_s = self.timeout_s if within_s is None else within_s
        deadline = time.monotonic() + within_s
        while True:
            try:
                reason = lacks()
            except AdminUnavailable as error:
                reason = error.message
            if not reason:
                return
            if time.monotonic() > deadline:
                raise HostRefused(
                    f"not within {within_s:.0f} s: {reason}",
                    hint="run it again: it goes on from here",
                )
            time.sleep(_POLL_S)


@contextlib.contextmanager
def migrating(prefix: str) -> Iterator[None]:
    """Let closing listeners pass unaccepted connections to another listener in the namespace, within the block."""
    directory = NamespaceDirectory()
    thread = NamespaceThread(directory)
    names = [name for name in directory.namespaces() if name.startswith(prefix)]
    try:
        for name in names:
            _set_migrate(thread, name, b"1")
        yield
    finally:
        # Set 0 unconditionally: a killed command may have left 1 behind.
        for name in names:
            _set_migrate(thread, name, b"0")
        thread.close()


def _ask_inside(thread: NamespaceThread, namespace: str, port: int) -> str:
    """Return why the agent's HAProxy does not answer; empty if it forwards requests to the agent.

    The request uses loopback inside the namespace, which reaches no listener of imdsproxy: those are bound to the
    guests' device. In a router's namespace the agent's rules admit only guests' requests, so only the listening socket
    is checked.
    """
    if namespace.startswith(ROUTER_PREFIX):
        with thread.inside(namespace), NetlinkSocket(SOCK_DIAG) as channel:
            return "" if listening_sockets(channel, (port,)) else "it does not listen yet"
    connection = http.client.HTTPConnection(str(METADATA_IPV4), port, timeout=_ANSWER_S)
    try:
        with thread.inside(namespace):
            connection.connect()
        connection.request("GET", "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    # The agent knows no guest at the loopback address, so any status below 500 proves that it answers.
    return f"status {status}" if status >= _SERVER_ERROR else ""


def _open_agent(agent: plan.Agent) -> ProcessHandle | None:
    """Open an agent's process; return `None` if the agent ended, even if another process has its pid."""
    handle, stat = open_process(agent.pid), read_stat(agent.pid)
    if handle is not None and (stat is None or stat.started != agent.started):
        handle.close()
        return None
    return handle


def _set_migrate(thread: NamespaceThread, name: str, value: bytes) -> None:
    """Set the sysctl in a namespace; ignore a namespace that is gone."""
    with (
        contextlib.suppress(FileNotFoundError),
        refusing(f"set {_MIGRATE} in {name}"),
        thread.inside(name),
    ):
        _MIGRATE.write_bytes(value)


def _run(command: str, timeout_s: float) -> None:
    """Run a shell command.

    Raises:
        HostRefused: The command failed or timed out.
    """
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=dict(os.environ),
        )
    except subprocess.TimeoutExpired as error:
        raise HostRefused(f"`{command}` has not ended within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        printed = done.stdout.strip()[-_SHOWN:]
        raise HostRefused(f"`{command}` ended with {done.returncode}{printed and f': {printed}'}")
