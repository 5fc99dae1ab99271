"""A proxy as agents keep it: in the background, with a pid file."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from imdsproxy.app.namespace_proxy.handler import (
    Launch,
    NetworkMetadataProxyHandler,
    start_failure,
)
from imdsproxy.app.namespace_proxy.surroundings import Surroundings, check_directory, runs_with
from imdsproxy.core.haproxy.namespace_proxy import DEFAULT_PORT
from imdsproxy.errors import HostRefused
from imdsproxy.host.files import write_atomic
from imdsproxy.host.refusal import host_refused

__all__ = ["ProxyDaemon", "cleanup_pid_file", "live_pid"]

_PID_MODE: Final = 0o644
_MAX_PID_BYTES: Final = 64


class ProxyDaemon:
    """One proxy and its pid file.

    `start` has HAProxy fork into the background by itself (`-D`), since it tells best when it is ready: its first
    process ends, and the second lets go of standard error, once the port is bound and the account taken. It writes
    its pid beside its configuration, as it does: not at once, and after removing what is there.

    Args:
        pidfile: Where the pid goes, or `None`.
        watch_log: Without effect, as `--metadata-proxy-watch-log`.
        proxy_socket: As `NetworkMetadataProxyHandler.unix_socket_path`; and so the others.
        runs_with: Whether a pid is that of a HAProxy with a file of that name in its command line.
        end: Ends a process that must not stay (kill(2)).

    Raises:
        RequestRefused: See `NetworkMetadataProxyHandler`.
    """

    def __init__(  # noqa: PLR0917 - the order that its callers know
        self,
        pidfile: str | os.PathLike[str] | None,
        port: int | str = DEFAULT_PORT,
        network_id: str | None = None,
        router_id: str | None = None,
        user: str | None = None,
        group: str | None = None,
        watch_log: bool = True,  # noqa: FBT001, FBT002 - the place it always had
        proxy_socket: str | os.PathLike[str] | None = None,
        state_path: str | os.PathLike[str] | None = None,
        *,
        use_syslog: bool | None = None,
        facility: str = "local0",
        debug: bool = False,
        surroundings: Surroundings | None = None,
        runs_with: Callable[[int, str], bool] = runs_with,
        end: Callable[[int, int], None] = os.kill,
    ) -> None:
        del watch_log
        self.pidfile = Path(pidfile) if pidfile else None
        self._host = surroundings or Surroundings()
        self._runs_with = runs_with
        self._end = end
        self.handler = NetworkMetadataProxyHandler(
            network_id,
            router_id,
            proxy_socket,
            port,
            user,
            group,
            state_path,
            use_syslog=use_syslog,
            facility=facility,
            debug=debug,
            surroundings=self._host,
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
        try:
            return self._start(launch)
        finally:
            os.close(launch.lock)

    def _start(self, launch: Launch) -> int:
        own_file = launch.config.with_suffix(".pid")
        try:
            ended = self._host.run(
                launch.arguments("-D", "-p", str(own_file)), launch.lock, alone=launch.alone
            )
            # It may have ended between its first process and its first request.
            pid = live_pid(own_file, launch.config.name, runs_with=self._runs_with)
        finally:
            own_file.unlink(missing_ok=True)
        if ended.status != 0 or pid is None:
            raise start_failure(ended, launch, self.handler.port)
        try:
            self._write_pid(pid)
        except BaseException:
            # Nobody would find it again.
            with contextlib.suppress(ProcessLookupError):
                self._end(pid, signal.SIGTERM)
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
            if self.pidfile is not None:
                self.pidfile.unlink(missing_ok=True)
            raise

    def _check_pid_file(self) -> None:
        if self.pidfile is None:
            return
        check_directory(
            self.pidfile.parent, "pid file", hint="create it, or name another with --pid-file"
        )
        pid = live_pid(self.pidfile, self.handler.config_file.name, runs_with=self._runs_with)
        if pid is not None:
            raise HostRefused(
                f"the proxy of {self.handler.resource.uuid} runs already (pid {pid})",
                hint=f"its pid file is {self.pidfile}; end it first, with SIGTERM",
            )

    def _write_pid(self, pid: int) -> None:
        if self.pidfile is not None:
            write_atomic(self.pidfile, f"{pid}\n".encode("ascii"), mode=_PID_MODE)


def live_pid(
    path: Path, name: str, *, runs_with: Callable[[int, str], bool] = runs_with
) -> int | None:
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
    # Empty or of another kind: whoever wrote it was interrupted. Nobody is known to run.
    return int(text) if text.isdigit() and runs_with(int(text), name) else None


def cleanup_pid_file(
    path: Path, name: str, *, runs_with: Callable[[int, str], bool] = runs_with
) -> bool:
    """Remove the pid file of a proxy that has ended; whether there was one.

    Raises:
        HostRefused: The proxy runs, or the file system refused.
        PrivilegeMissing: This process may not remove it.
    """
    pid = live_pid(path, name, runs_with=runs_with)
    if pid is not None:
        raise HostRefused(f"the proxy runs (pid {pid})", hint=f"end it first: kill {pid}")
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise host_refused(f"remove {path}", error) from error
    return True
