"""One proxy: its configuration, written and locked, and HAProxy in this process's place or in the background."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from imdsproxy.app.namespace_proxy.host import (
    Ended,
    Host,
    check_directory,
    claim_file,
    make_directories,
    remove_unclaimed,
)
from imdsproxy.core.haproxy.namespace_proxy import (
    DEFAULT_PORT,
    DEFAULT_STATE_PATH,
    NamespaceProxySpec,
    parse_port,
    parse_resource,
    parse_uuid,
    render_namespace_proxy,
)
from imdsproxy.core.haproxy.runtime import parse_failure
from imdsproxy.core.haproxy.text import UnquotableWord
from imdsproxy.errors import (
    ConfigRejected,
    DataplaneError,
    HostRefused,
    PrivilegeMissing,
    RequestRefused,
)
from imdsproxy.host.account import group_name, user_name
from imdsproxy.host.files import remove_file, write_atomic
from imdsproxy.host.refusal import host_refused

_PID_MODE: Final = 0o644
_MAX_PID_BYTES: Final = 64
_DIRECTORY: Final = "ns-metadata-proxy"
_SOCKET: Final = "metadata_proxy"
_SYSLOG: Final = "/dev/log"
_MAX_SOCKET_PATH: Final = 107
"""`sun_path` of unix(7), without the NUL at its end."""


@dataclass(frozen=True, slots=True)
class Launch:
    """All that is needed to run HAProxy.

    Attributes:
        program: HAProxy's path.
        config: The configuration file, on disk.
        lock: The same file, open and locked; HAProxy inherits it.
        alone: HAProxy is to have none of this process's supplementary groups.
    """

    program: str
    config: Path
    lock: int
    alone: bool

    def arguments(self, *more: str) -> list[str]:
        """The command line. The uuid in it is how agents know their proxies."""
        return [self.program, "-f", str(self.config), *more]


@dataclass
class NetworkMetadataProxyHandler:
    """One network's or router's proxy; exactly one of the ids is given.

    Attributes:
        network_id: The network that all guests are on.
        router_id: The router that their networks are on.
        unix_socket_path: Where requests go; `metadata_proxy` in the state path for `None`.
        port: TCP port, at every address of the namespace that this process is in.
        user: Account that HAProxy takes once it listens, by name or id; this process's own for `None`.
        group: Group, likewise.
        state_path: Where the configuration's directory is; /var/lib/neutron for `None`.
        use_syslog: Log requests to /dev/log; `None` where there is one.
        facility: Syslog's, by HAProxy's name.
        debug: Log everything.
        host: The host.

    Raises:
        RequestRefused: Both ids or none, no UUID, no port, or a path that HAProxy cannot take.
    """

    network_id: str | None
    router_id: str | None
    unix_socket_path: str | os.PathLike[str] | None = None
    port: int | str = DEFAULT_PORT
    user: str | None = None
    group: str | None = None
    state_path: str | os.PathLike[str] | None = None
    _: KW_ONLY
    use_syslog: bool | None = None
    facility: str = "local0"
    debug: bool = False
    host: Host = field(default_factory=Host)

    def __post_init__(self) -> None:
        self.header, self.uuid = parse_resource(self.network_id, self.router_id)
        self.port = parse_port(self.port)
        state_path = Path(self.state_path or DEFAULT_STATE_PATH)
        self.upstream = Path(self.unix_socket_path or state_path / _SOCKET)
        for path in (state_path, self.upstream):
            if not path.is_absolute():
                raise RequestRefused(
                    f"{str(path)!r} is no absolute path", hint="HAProxy is started in another directory"
                )  # fmt: skip
        if len(os.fsencode(self.upstream)) > _MAX_SOCKET_PATH:
            raise RequestRefused(
                f"the socket's path {self.upstream} is too long",
                hint=f"the kernel takes {_MAX_SOCKET_PATH} bytes (unix(7))",
            )

    @staticmethod
    def get_config_path(state_path: str | os.PathLike[str] | None = None) -> Path:
        """The directory of the configuration files below a state path."""
        return Path(state_path or DEFAULT_STATE_PATH) / _DIRECTORY

    @property
    def config_file(self) -> Path:
        """This proxy's configuration file."""
        return self.get_config_path(self.state_path) / f"{self.uuid}.conf"

    def spec(self) -> NamespaceProxySpec:
        """What the configuration is made of.

        Raises:
            HostRefused: There is no such user or group.
            PrivilegeMissing: This process cannot take that user or group.
        """
        log = self.host.has_syslog() if self.use_syslog is None else self.use_syslog
        uid, gid = self.host.ids()
        return NamespaceProxySpec(
            header=self.header,
            uuid=self.uuid,
            upstream=str(self.upstream),
            port=int(self.port),
            dual_stack=self.host.has_ipv6(),
            user=_account("user", self.user, user_name, uid, root=uid == 0),
            group=_account("group", self.group, group_name, gid, root=uid == 0),
            syslog=_SYSLOG if log else None,
            facility=self.facility,
            debug=self.debug,
        )

    def prepare(self) -> Launch:
        """Find HAProxy, write and lock the configuration.

        Raises:
            HaproxyMissing: There is none.
            HostRefused: An account or a directory is missing, the file cannot be written, or is in use.
            PrivilegeMissing: This process may not.
            RequestRefused: A path has a character that HAProxy cannot take.
        """
        program = self.host.find_haproxy()
        spec = self.spec()
        try:
            text = render_namespace_proxy(spec)
        except UnquotableWord as error:
            raise RequestRefused(f"HAProxy cannot take a path: {error}") from error
        check_directory(
            self.upstream.parent,
            "metadata socket",
            hint="start who listens there first, or name another with --metadata-proxy-socket",
        )
        make_directories(self.config_file.parent)
        lock = claim_file(self.config_file, text.encode())
        dropped = spec.user is not None or spec.group is not None
        return Launch(program, self.config_file, lock, alone=dropped)

    def run_proxy(self, launch: Launch | None = None) -> NoReturn:
        """Become HAProxy, which keeps this process's pid and has the uuid in its command line.

        What HAProxy would refuse at its start is found before, while an error can still be one line.

        Args:
            launch: What `prepare` gave; `None` prepares.

        Raises:
            HaproxyMissing: There is none, or it cannot be run.
            ConfigRejected: It refuses the configuration.
            HostRefused: See `prepare`; or the port is in use.
            PrivilegeMissing: See `prepare`; or the port takes root.
        """
        ready = launch or self.prepare()
        try:
            self._check(ready)
            if ready.alone:
                self.host.drop_groups()
            os.set_inheritable(ready.lock, True)
            self.host.become(ready.arguments())
        except BaseException:
            os.close(ready.lock)
            raise
        raise AssertionError("a process that has become another went on")  # pragma: no cover

    def _check(self, launch: Launch) -> None:
        self.host.try_to_bind(int(self.port), dual_stack=self.host.has_ipv6())
        # Before this process is HAProxy: its own messages would not be one line.
        checked = self.host.run(launch.arguments("-c"), launch.lock, alone=False)
        if checked.status != 0:
            raise start_failure(checked, launch, self.port)


def _account(
    kind: str, wanted: str | None, name_of: Callable[[str], str], own: int, *, root: bool
) -> str | None:
    """The account's name, if it is another than this process has; only root can take one."""
    name = name_of(wanted) if wanted else None
    if name is None or root:
        return name
    if name_of(str(own)) != name:
        raise PrivilegeMissing(
            f"cannot become {kind} {name}: this process is not root's",
            hint=f"run as root, or without --metadata-proxy-{kind}",
        )
    return None


def start_failure(ended: Ended, launch: Launch, port: int | str) -> DataplaneError:
    """The exception for a HAProxy that did not start, with its own words."""
    words = parse_failure(ended.errors) or f"it ended with {ended.status} and wrote nothing"
    message = f"HAProxy did not start: {words}"
    if "Address already in use" in words:
        return HostRefused(message, hint=f"see who listens: ss -ltnp 'sport = :{port}'")
    if "Permission denied" in words:
        return PrivilegeMissing(message, hint="run as root")
    return ConfigRejected(message, hint=f"see for yourself: {' '.join(launch.arguments('-c'))}")


def cleanup_config_file(uuid: str, state_path: str | os.PathLike[str] | None = None) -> bool:
    """Remove the configuration of a proxy that has ended; whether there was one.

    Raises:
        RequestRefused: It is no UUID.
        HostRefused: The proxy runs, or the file system refused.
        PrivilegeMissing: This process may not remove it.
    """
    directory = NetworkMetadataProxyHandler.get_config_path(state_path)
    return remove_unclaimed(directory / f"{parse_uuid(uuid)}.conf")


@dataclass
class ProxyDaemon:
    """One proxy and its pid file.

    `start` has HAProxy fork into the background by itself (`-D`), since it tells best when it is ready: its first
    process ends, and the second lets go of standard error, once the port is bound and the account taken. It writes
    its pid beside its configuration, as it does: not at once, and after removing what is there.

    Attributes:
        pidfile: Where the pid goes, or `None`.
        watch_log: Without effect, as `--metadata-proxy-watch-log`.
        proxy_socket: As `NetworkMetadataProxyHandler.unix_socket_path`; and so the others.

    Raises:
        RequestRefused: See `NetworkMetadataProxyHandler`.
    """

    pidfile: str | os.PathLike[str] | None
    port: int | str = DEFAULT_PORT
    network_id: str | None = None
    router_id: str | None = None
    user: str | None = None
    group: str | None = None
    watch_log: bool = True
    proxy_socket: str | os.PathLike[str] | None = None
    state_path: str | os.PathLike[str] | None = None
    _: KW_ONLY
    use_syslog: bool | None = None
    facility: str = "local0"
    debug: bool = False
    host: Host = field(default_factory=Host)

    def __post_init__(self) -> None:
        self._pid_file = Path(self.pidfile) if self.pidfile else None
        self.handler = NetworkMetadataProxyHandler(
            self.network_id,
            self.router_id,
            self.proxy_socket,
            self.port,
            self.user,
            self.group,
            self.state_path,
            use_syslog=self.use_syslog,
            facility=self.facility,
            debug=self.debug,
            host=self.host,
        )

    def start(self) -> int:
        """Have HAProxy run in the background; its pid.

        Returns:
            When the port is bound, the account taken, and the pid file written.

        Raises:
            ConfigRejected: HAProxy refuses the configuration; has its own words.
            HaproxyMissing: There is none.
            HostRefused: The port is in use, the proxy runs already, an account or a directory is missing, or a
                file cannot be written.
            PrivilegeMissing: This process may not.
        """
        self._check_pid_file()
        launch = self.handler.prepare()
        own_file = launch.config.with_suffix(".pid")
        try:
            ended = self.host.run(
                launch.arguments("-D", "-p", str(own_file)), launch.lock, alone=launch.alone
            )
            # It may have ended between its first process and its first request.
            pid = live_pid(own_file, launch.config.name, self.host)
        finally:
            # First: without the lock another start may have a file of this name.
            own_file.unlink(missing_ok=True)
            os.close(launch.lock)
        if ended.status != 0 or pid is None:
            raise start_failure(ended, launch, self.handler.port)
        try:
            self._write_pid(pid)
        except BaseException:
            # Without its pid file it could not be found again.
            self.host.end(pid)
            raise
        return pid

    def run(self) -> NoReturn:
        """Become HAProxy, in the foreground; the pid file has this process's pid.

        Raises:
            ImdsproxyError: See `NetworkMetadataProxyHandler.run_proxy`.
        """
        self._check_pid_file()
        launch = self.handler.prepare()
        self._write_pid(os.getpid())
        try:
            self.handler.run_proxy(launch)
        except BaseException:
            if self._pid_file is not None:
                self._pid_file.unlink(missing_ok=True)
            raise

    def _check_pid_file(self) -> None:
        if self._pid_file is None:
            return
        check_directory(
            self._pid_file.parent, "pid file", hint="create it, or name another with --pid-file"
        )
        pid = live_pid(self._pid_file, self.handler.config_file.name, self.host)
        if pid is not None:
            raise HostRefused(
                f"the proxy of {self.handler.uuid} runs already (pid {pid})",
                hint=f"its pid file is {self._pid_file}; end it first, with SIGTERM",
            )

    def _write_pid(self, pid: int) -> None:
        if self._pid_file is not None:
            write_atomic(self._pid_file, f"{pid}\n".encode("ascii"), mode=_PID_MODE)


def live_pid(path: Path, name: str, host: Host) -> int | None:
    """The pid in the file, if it is that of a HAProxy that runs with the configuration of this name.

    Raises:
        HostRefused: The file cannot be read.
        PrivilegeMissing: This process may not read it.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_PID_BYTES).strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise host_refused(f"read {path}", error) from error
    # Empty or of another kind: its writer was interrupted. No proxy is known to run.
    return int(text) if text.isdigit() and host.runs_with(int(text), name) else None


def cleanup_pid_file(path: Path, name: str, host: Host) -> bool:
    """Remove the pid file of a proxy that has ended; whether there was one.

    Raises:
        HostRefused: The proxy runs, or the file system refused.
        PrivilegeMissing: This process may not remove it.
    """
    pid = live_pid(path, name, host)
    if pid is not None:
        raise HostRefused(f"the proxy runs (pid {pid})", hint=f"end it first: kill {pid}")
    return remove_file(path, f"remove {path}")
