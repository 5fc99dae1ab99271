"""Access of a takeover's steps to this host and to the running daemon."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.api.client import AdminClient
from imdsproxy.config.load import Loaded
from imdsproxy.errors import AdminUnavailable, HostRefused, ImdsproxyError, refusing
from imdsproxy.host.files import write_atomic
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.process import open_process
from imdsproxy.tools.takeover.observe import find_proxies

_POLL_S: Final = 0.1
_MIGRATE: Final = Path("/proc/sys/net/ipv4/tcp_migrate_req")
"""Sysctl that moves connections from a closing listener to another listener of the same address (ip-sysctl(7))."""

_SHOWN: Final = 500
"""Number of characters of a command's output in an error."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Executor of steps on this host. `timeout_s`: maximum duration of a wait or command, in seconds."""

    daemon: AdminClient
    load: Callable[[], Loaded]
    timeout_s: float

    def write(self, files: dict[Path, tuple[bytes, int]]) -> None:
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

    def end_proxies(self, prefix: str) -> int:
        """Stop the HAProxies in namespaces with this prefix gracefully; return their number."""
        asked: set[int] = set()

        def lacks() -> str:
            left = find_proxies(prefix)
            for one in left:
                if one.pid not in asked and (handle := open_process(one.pid)) is not None:
                    with contextlib.closing(handle):
                        handle.kill(signal.SIGUSR1)
                    asked.add(one.pid)
            return f"HAProxy {left[0].pid} in {left[0].namespace} still answers" if left else ""

        self.wait(lacks)
        return len(asked)

    def networks_in(self, prefix: str) -> Mapping[str, str]:
        """Return the namespaces with this prefix in which imdsproxy serves networks, by network id."""
        return {
            one["record"]["id"]: one["record"]["listener"]["namespace"]
            for one in self.daemon.get("/v1/networks")
            if one["record"]["listener"].get("namespace", "").startswith(prefix)
        }

    def command(self, command: str) -> str:
        """Run a shell command; return it. Raises `HostRefused`: the command failed or timed out."""
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=self.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise HostRefused(f"`{command}` has not ended within {self.timeout_s:.0f} s") from error
        if done.returncode != 0:
            text = done.stdout.strip()[-_SHOWN:]
            raise HostRefused(f"`{command}` ended with {done.returncode}{text and f': {text}'}")
        return command

    def explain_unready(self) -> str:
        """Return why the daemon is not ready; empty if it is."""
        readiness = self.daemon.get("/v1/status")["readiness"]
        return "" if readiness["ready"] else f"imdsproxy is not ready: {readiness['reasons'][0]}"

    def wait(self, lacks: Callable[[], str], *, within_s: float | None = None) -> None:
        """Poll until `lacks` returns an empty string. Raises `HostRefused`: the wait timed out."""
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
                    f"timeout after {within_s:.0f} s: {reason}",
                    hint="run the command again: it continues from here",
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


def _set_migrate(thread: NamespaceThread, name: str, value: bytes) -> None:
    with (
        contextlib.suppress(FileNotFoundError),
        refusing(f"set {_MIGRATE} in {name}"),
        thread.inside(name),
    ):
        _MIGRATE.write_bytes(value)
