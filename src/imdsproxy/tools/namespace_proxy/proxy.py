"""Proxy for one network or router: its locked configuration, and HAProxy in this process or in the background.

A configuration file belongs to the HAProxy that runs with it. The program that starts a proxy writes the file, locks it
(flock(2)) and passes the open file to HAProxy, which holds the lock for its whole life. A locked file is in use and is
neither replaced nor removed. So another process with a reused pid cannot be mistaken for the proxy. Functions
that run HAProxy also raise `HaproxyMissing`; those that touch the host raise `PrivilegeMissing`.
"""

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import threading
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Final, NoReturn

from imdsproxy.config.neutron_agents import DEFAULT_PORT, DEFAULT_STATE_PATH, parse_port
from imdsproxy.errors import (
    ConfigRejected,
    HaproxyMissing,
    HostRefused,
    PrivilegeMissing,
    RequestRefused,
    host_refused,
    refusing,
)
from imdsproxy.haproxy.rules import namespace_proxy
from imdsproxy.haproxy.rules.runtime import parse_failure
from imdsproxy.haproxy.rules.text import UnquotableWord
from imdsproxy.host.account import group_name, user_name
from imdsproxy.host.files import (
    is_file_at,
    open_locked,
    remove_file,
    sweep_unfinished,
    write_atomic,
)

_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_IPV6: Final = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
_SYSLOG: Final = "/dev/log"
_START_DEADLINE_S: Final = 30.0
_UMASK: Final = 0o027
_MODE: Final = 0o640
_DIRECTORY_MODE: Final = 0o755
_FOREIGN_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_PID_MODE: Final = 0o644
_MAX_PID_BYTES: Final = 64
_MAX_SOCKET_PATH: Final = 107
"""Length of `sun_path` in unix(7), without the terminating NUL."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Parameters of a HAProxy process.

    Attributes:
        lock: Descriptor of the same file, open and locked; HAProxy inherits it.
        alone: Whether HAProxy must drop this process's supplementary groups.
    """

    program: str
    config: Path
    lock: int
    alone: bool

    def arguments(self, *more: str) -> list[str]:
        """Return the command line. Agents recognise their proxies by the uuid in it."""
        return [self.program, "-f", str(self.config), *more]

    def run(self, *more: str, deadline_s: float = _START_DEADLINE_S) -> tuple[int, str]:
        """Run HAProxy in its own session; wait until it and all its children have ended or closed standard error.

        Returns exit status (negative: the signal), and standard error. Raises `HostRefused`: HAProxy did not end in
        time; `PrivilegeMissing`: this process may not give up its supplementary groups.
        """
        arguments = self.arguments(*more)
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                umask=_UMASK,
                start_new_session=True,
                extra_groups=[] if self.alone else None,
                pass_fds=(self.lock,),
            )
        except OSError as error:
            # Without a file name in the error, the failure came before the execution of the program.
            if error.errno == errno.EPERM and error.filename is None:
                raise host_refused("give up the supplementary groups", error) from error
            raise HaproxyMissing(
                f"cannot run {self.program}: {error.strerror}", hint="install HAProxy 3.0 or newer"
            ) from error
        with process:
            try:
                _, errors = process.communicate(timeout=deadline_s)
            except subprocess.TimeoutExpired as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise HostRefused(
                    f"{self.program} has not started within {deadline_s:g} s",
                    hint=f"run it by hand to see the reason: {' '.join(arguments)}",
                ) from error
        return process.returncode, errors.decode("utf-8", "replace")

    def become(self) -> NoReturn:
        if self.alone:
            with refusing("give up the supplementary groups"):
                os.setgroups([])
        os.set_inheritable(self.lock, True)
        try:
            os.execv(self.program, self.arguments())  # noqa: S606 - no shell is meant
        except OSError as error:
            raise HaproxyMissing(f"cannot run {self.program}: {error.strerror}") from error


@dataclass
class NetworkMetadataProxyHandler:
    """Proxy of one network or router; exactly one of the ids is given.

    Attributes:
        unix_socket_path: Socket to which requests go; `None` means `metadata_proxy` in the state path.
        port: TCP port, at every address of this process's namespace.
        user: Account that HAProxy takes once it listens, by name or id; `None` keeps this process's own.
        state_path: Parent of the configuration directory; `None` means /var/lib/neutron.
        use_syslog: Whether to log requests to /dev/log; `None` means if it exists.
        facility: Syslog facility, by HAProxy's name.

    Raises `RequestRefused`: both ids or none, no UUID, no port, or a path that HAProxy cannot take.
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

    def __post_init__(self) -> None:
        self.header, self.uuid = namespace_proxy.parse_resource(self.network_id, self.router_id)
        self.port = parse_port(self.port)
        state_path = Path(self.state_path or DEFAULT_STATE_PATH)
        self.upstream = Path(self.unix_socket_path or state_path / "metadata_proxy")
        for path in (state_path, self.upstream):
            if not path.is_absolute():
                raise RequestRefused(
                    f"{str(path)!r} is not an absolute path",
                    hint="use an absolute path: HAProxy starts in another directory",
                )
        if len(os.fsencode(self.upstream)) > _MAX_SOCKET_PATH:
            raise RequestRefused(
                f"the socket's path {self.upstream} is too long",
                hint=f"use at most {_MAX_SOCKET_PATH} bytes, the kernel's limit (unix(7))",
            )

    @staticmethod
    def get_config_path(state_path: str | os.PathLike[str] | None = None) -> Path:
        return Path(state_path or DEFAULT_STATE_PATH) / "ns-metadata-proxy"

    @property
    def config_file(self) -> Path:
        return self.get_config_path(self.state_path) / f"{self.uuid}.conf"

    def spec(self) -> namespace_proxy.NamespaceProxySpec:
        log = os.access(_SYSLOG, os.F_OK) if self.use_syslog is None else self.use_syslog
        return namespace_proxy.NamespaceProxySpec(
            header=self.header,
            uuid=self.uuid,
            upstream=str(self.upstream),
            port=int(self.port),
            dual_stack=has_ipv6(),
            user=_account("user", self.user, user_name, os.geteuid()),
            group=_account("group", self.group, group_name, os.getegid()),
            syslog=_SYSLOG if log else None,
            facility=self.facility,
            debug=self.debug,
        )

    def prepare(self) -> Launch:
        """Find HAProxy, write and lock the configuration.

        Raises `HostRefused`: an account or a directory is missing, or the file is in use or cannot be written;
        `RequestRefused`: a path has a character that HAProxy cannot take.
        """
        program = find_haproxy()
        spec = self.spec()
        try:
            text = namespace_proxy.render_namespace_proxy(spec)
        except UnquotableWord as error:
            raise RequestRefused(f"HAProxy cannot use a path: {error}") from error
        check_directory(
            self.upstream.parent,
            "metadata socket",
            hint="start the program that listens there first, or name another socket with --metadata-proxy-socket",
        )
        make_directories(self.config_file.parent)
        lock = claim_file(self.config_file, text.encode())
        dropped = spec.user is not None or spec.group is not None
        return Launch(program, self.config_file, lock, alone=dropped)

    def run_proxy(self, launch: Launch | None = None) -> NoReturn:
        """Become HAProxy, with this process's pid and the uuid in its command line.

        The method first checks what HAProxy would refuse at its start, while it can still report an error in one line.

        `launch`: result of `prepare`; `None` calls `prepare`. Raises `ConfigRejected`: HAProxy refuses the
        configuration.
        """
        ready = launch or self.prepare()
        try:
            try_to_bind(int(self.port), dual_stack=has_ipv6())
            # Check before the exec: HAProxy's own messages would take several lines.
            status, errors = ready.run("-c")
            if status != 0:
                fail_start(status, errors, ready, self.port)
            ready.become()
        except BaseException:
            os.close(ready.lock)
            raise


def _account(kind: str, wanted: str | None, name_of: Callable[[str], str], own: int) -> str | None:
    """Return the account's name if it differs from this process's; only root can take another account."""
    name = name_of(wanted) if wanted else None
    if name is None or os.geteuid() == 0:
        return name
    if name_of(str(own)) != name:
        raise PrivilegeMissing(
            f"cannot become {kind} {name}: this process does not run as root",
            hint=f"run as root, or without --metadata-proxy-{kind}",
        )
    return None


def fail_start(status: int, errors: str, launch: Launch, port: int | str) -> NoReturn:
    """Report a HAProxy that did not start, with its own message.

    Raises:
        HostRefused: The port is in use.
        PrivilegeMissing: The port, or the account, requires root.
        ConfigRejected: HAProxy refuses the configuration.
    """
    words = parse_failure(errors) or f"it ended with {status} without a message"
    message = f"HAProxy did not start: {words}"
    if "Address already in use" in words:
        raise HostRefused(message, hint=f"see which process listens: ss -ltnp 'sport = :{port}'")
    if "Permission denied" in words:
        raise PrivilegeMissing(message, hint="run as root")
    raise ConfigRejected(
        message, hint=f"check the configuration by hand: {' '.join(launch.arguments('-c'))}"
    )


def cleanup_config_file(uuid: str, state_path: str | os.PathLike[str] | None = None) -> bool:
    """Remove the configuration of a proxy that has ended, and temporary files of killed writers.

    Returns whether there was a configuration. Raises `RequestRefused`: the id is no UUID; `HostRefused`: the proxy
    runs, or the file system refused.
    """
    directory = NetworkMetadataProxyHandler.get_config_path(state_path)
    path, removed = directory / f"{namespace_proxy.parse_uuid(uuid)}.conf", False
    with refusing(f"remove {path}"), contextlib.suppress(FileNotFoundError):
        held = _lock(path, os.O_RDONLY)
        path.unlink(missing_ok=True)
        # HAProxy's own pid file, left by a start that was killed.
        path.with_suffix(".pid").unlink(missing_ok=True)
        os.close(held)
        removed = True
    sweep_unfinished(directory)
    return removed


@dataclass
class ProxyDaemon:
    """Proxy with its pid file.

    `start` lets HAProxy fork into the background itself (`-D`), because HAProxy knows best when it is ready: its first
    process ends, and the second closes standard error, once the port is bound and the account taken. HAProxy writes its
    own pid file beside the configuration, because it first removes an existing file and does not write at once.

    Attributes:
        watch_log: No effect, as `--metadata-proxy-watch-log`.
        proxy_socket: See `NetworkMetadataProxyHandler.unix_socket_path`; the same applies to the other attributes.

    Raises `RequestRefused`: see `NetworkMetadataProxyHandler`.
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
        )

    def start(self) -> int:
        """Start HAProxy in the background.

        Returns HAProxy's pid, once the port is bound, the account taken, and the pid file written. Raises
        `ConfigRejected`: HAProxy refuses the configuration; the error has HAProxy's own message; `HostRefused`: the
        port is in use, the proxy runs already, an account or a directory is missing, or a file cannot be written.
        """
        self._check_pid_file()
        launch = self.handler.prepare()
        own_file = launch.config.with_suffix(".pid")
        try:
            status, errors = launch.run("-D", "-p", str(own_file))
            # Read the pid now: HAProxy may already have ended.
            pid = live_pid(own_file, launch.config.name)
        finally:
            # Remove this file first: once the lock is released, another start may create a file with this name.
            own_file.unlink(missing_ok=True)
            os.close(launch.lock)
        if status != 0 or pid is None:
            fail_start(status, errors, launch, self.handler.port)
        try:
            self._write_pid(pid)
        except BaseException:
            # Without its pid file the proxy could not be found again.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            raise
        return pid

    def run(self) -> NoReturn:
        """Become HAProxy, in the foreground; the pid file has this process's pid."""
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
            self._pid_file.parent,
            "pid file",
            hint="create the directory, or name another file with --pid-file",
        )
        pid = live_pid(self._pid_file, self.handler.config_file.name)
        if pid is not None:
            raise HostRefused(
                f"the proxy of {self.handler.uuid} already runs (pid {pid})",
                hint=f"end the proxy first, with SIGTERM; its pid file is {self._pid_file}",
            )

    def _write_pid(self, pid: int) -> None:
        if self._pid_file is not None:
            write_atomic(self._pid_file, f"{pid}\n".encode("ascii"), mode=_PID_MODE)


def live_pid(path: Path, name: str) -> int | None:
    """Return the pid in the file if a HAProxy with a configuration of this name runs under it."""
    text = b""
    with refusing(f"read {path}"), contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        text = file.read(_MAX_PID_BYTES).strip()
    # An empty or malformed file means that its writer was interrupted: no proxy is known to run.
    return int(text) if text.isdigit() and runs_with(int(text), name) else None


def cleanup_pid_file(path: Path, name: str) -> bool:
    """Remove the pid file of a proxy that has ended; return whether there was one.

    Raises `HostRefused`: the proxy runs, or the file system refused.
    """
    pid = live_pid(path, name)
    if pid is not None:
        raise HostRefused(
            f"the proxy still runs (pid {pid})", hint=f"end the proxy first: kill {pid}"
        )
    return remove_file(path, f"remove {path}")


def find_haproxy() -> str:
    # An agent's rootwrap may strip most of PATH.
    places = [one for one in os.environ.get("PATH", "").split(":") if one]
    found = shutil.which("haproxy", path=":".join([*places, _SYSTEM_PATH]))
    if found is None:
        raise HaproxyMissing(
            "there is no haproxy on PATH", hint="install HAProxy 3.0 or newer (apt install haproxy)"
        )
    return found


def has_ipv6() -> bool:
    """Return whether this namespace's devices get IPv6, tested as by Neutron's agents (oslo's `is_ipv6_enabled`)."""
    return _IPV6.exists() and _IPV6.read_text().strip() == "0"


def runs_with(pid: int, name: str, *, proc: Path = Path("/proc")) -> bool:
    """Return whether this process is a running HAProxy with a file of this name in its command line."""
    words = [b""]
    with (
        refusing(f"look at process {pid}"),
        contextlib.suppress(FileNotFoundError, ProcessLookupError),
    ):
        words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    program, *rest = (Path(os.fsdecode(word)).name for word in words)
    return "haproxy" in program and name in rest


def try_to_bind(port: int, *, dual_stack: bool) -> None:
    """Test the port before HAProxy does, so that the error needs no search in HAProxy's log.

    Raises `HostRefused`: another program listens there.
    """
    import socket  # HAProxy that goes into the background says it itself

    family = socket.AF_INET6 if dual_stack else socket.AF_INET
    hint = f"see which process does: ss -ltnp 'sport = :{port}'"
    with (
        socket.socket(family, socket.SOCK_STREAM) as probe,
        refusing(f"listen on port {port}", hint=hint),
    ):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual_stack:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.bind(("::" if dual_stack else "0.0.0.0", port))  # noqa: S104 - as the proxy itself


def check_directory(path: Path, purpose: str, *, hint: str) -> None:
    """Check that a directory exists. Raises `HostRefused`: the directory is missing; the message has its purpose."""
    with refusing(f"look at {path}"):
        there = path.is_dir()
    if not there:
        raise HostRefused(f"there is no directory {path} for the {purpose}", hint=hint)


def claim_file(path: Path, data: bytes) -> int:
    """Write a file with exactly `data`, mode 0640 whatever the umask is, and lock it.

    A reader sees the old bytes or the new ones. If several processes claim the same file, one gets it. Returns
    descriptor of the open file. The lock ends when its last copy is closed. Raises `HostRefused`: the file is in use,
    or the file system refused; then the file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with refusing(f"write {path}"):
        # Hold the old file's lock during the replacement, so that no other process can intervene.
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
                # This call has just created the file.
                path.unlink()
            raise
        finally:
            temporary.unlink(missing_ok=True)
            os.close(before)
    return new


def _lock(path: Path, flags: int) -> int:
    while True:
        descriptor = open_locked(path, flags | os.O_NOFOLLOW)
        if descriptor is None:
            raise HostRefused(
                f"{path} is in use: its proxy runs, or starts",
                hint=f"end the HAProxy with this file in its command line: pgrep -af {path.stem}",
            )
        # Another process may have replaced the file between opening and locking.
        if is_file_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Ensure a directory in which only its owner may write; missing parents are created with mode 0755 or tighter.

    If others could write to the directory, they could choose the configuration of a HAProxy that root starts. Raises
    `HostRefused`: the file system refused, or the name is taken by another kind of file.
    """
    with refusing(f"create the directory {path}", hint="name another directory with --state-path"):
        for directory in (*reversed(path.parents), path):
            if not directory.exists():
                directory.mkdir(mode=_DIRECTORY_MODE, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & _FOREIGN_WRITE:
            path.chmod(mode & ~_FOREIGN_WRITE)
        if not path.is_dir():
            raise NotADirectoryError(20, "Not a directory")
