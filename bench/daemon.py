"""The daemon under measurement: a settings file, its processes, and its admin API."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Final

import yaml

from bench.place import BenchError, put_in_memory
from bench.procs import end_all, find_by_argument, wait_until

__all__ = ["AdminConnection", "Daemon", "Processes", "render_settings"]

_START_S: Final = 30.0
_STOP_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Processes:
    """The pids of the daemon's three parts; no `documents` if the settings disable the document server."""

    controller: int
    master: int
    worker: int
    old_workers: tuple[int, ...]
    documents: tuple[int, ...]

    @property
    def everything(self) -> tuple[int, ...]:
        """All pids."""
        return (self.controller, self.master, self.worker, *self.old_workers, *self.documents)

    @property
    def haproxy(self) -> tuple[int, ...]:
        """HAProxy's pids."""
        return (self.master, self.worker, *self.old_workers)


def render_settings(directory: Path, overrides: Mapping[str, Mapping[str, object]]) -> str:
    """Render a settings file: own directories, processes without systemd, no address of the host."""
    settings: dict[str, dict[str, object]] = {
        "paths": {"runtime_dir": str(directory / "run"), "state_dir": str(directory / "state")},
        "haproxy": {"supervisor": "spawn"},
        "documents": {"supervisor": "spawn"},
        "metrics": {"listen": None, "haproxy_listen": None},
        "host": {"name_prefix": "imdsb"},
        # Requests are counted as by default, but the limit is out of reach: wrk sends in a second what a guest may in
        # ten minutes.
        "limits": {"requests_per_s": 250_000, "burst": 10_000_000, "connections": 10_000},
    }
    for section, values in overrides.items():
        settings.setdefault(section, {}).update(values)
    return yaml.safe_dump(settings, sort_keys=False)


class _UnixHttp(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("imdsproxy", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket(AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class AdminConnection:
    """A kept connection to the admin API."""

    def __init__(self, path: Path) -> None:
        self._http = _UnixHttp(path)

    def ask(self, method: str, path: str, body: object = None) -> dict[str, object]:
        """Send a request; return the decoded answer.

        Raises:
            BenchError: The answer is an error.
            OSError: No process answers.
        """
        raw = None if body is None else json.dumps(body).encode()
        headers = {} if raw is None else {"content-type": "application/json"}
        self._http.request(method, path, raw, headers)
        response = self._http.getresponse()
        answer = response.read()
        if response.status >= 400:  # noqa: PLR2004 - HTTP's errors
            raise BenchError(f"{method} {path}: {response.status} {answer[:500]!r}")
        decoded: dict[str, object] = json.loads(answer)
        return decoded

    def close(self) -> None:
        self._http.close()


class Daemon:
    """One imdsproxy in a directory of its own, with a runtime directory in memory like /run.

    Args:
        directory: The directory; created if needed.
        overrides: Settings that differ, by section.
        within: Words before the command, to run in a namespace.
    """

    def __init__(
        self,
        directory: Path,
        overrides: Mapping[str, Mapping[str, object]] | None = None,
        *,
        within: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        put_in_memory(directory / "run")
        self.config = directory / "imdsproxy.yaml"
        self.config.write_text(render_settings(directory, overrides or {}))
        self.cli = [str(Path(sys.executable).parent / "imdsproxy"), "--config", str(self.config)]
        self._within = within
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runtime(self) -> Path:
        """Directory of the daemon's sockets, maps and HAProxy configuration."""
        return self.directory / "run"

    @property
    def log(self) -> Path:
        """File of the daemon's output."""
        return self.directory / "daemon.log"

    def spawn(self) -> None:
        """Start the controller without waiting for it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._within, *self.cli, "run"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self, patience_s: float = _START_S) -> None:
        """Start the controller and wait until its admin API answers and HAProxy runs.

        Raises:
            BenchError: The controller ended, or did not answer in time.
        """
        self.spawn()
        self.wait_ready(patience_s)

    def wait_ready(self, patience_s: float = _START_S) -> None:
        """Wait until the admin API answers and HAProxy runs.

        Raises:
            BenchError: The controller ended, or did not answer in time.
        """
        if not wait_until(self._ready, patience_s, every_s=0.02):
            raise BenchError(f"the daemon does not answer: {self.last_words()}")

    def _ready(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise BenchError(f"the daemon did not start: {self.last_words()}")
        try:
            self.processes()
        except (OSError, BenchError, KeyError, TypeError):
            return False
        return True

    def admin(self) -> AdminConnection:
        """Open a connection to the admin API."""
        return AdminConnection(self.runtime / "admin.sock")

    def ask(self, method: str, path: str, body: object = None) -> dict[str, object]:
        """Send one request on a connection of its own."""
        with contextlib.closing(self.admin()) as connection:
            return connection.ask(method, path, body)

    def put(
        self, networks: Sequence[object] = (), instances: Sequence[object] = ()
    ) -> dict[str, object]:
        """Store many records at once."""
        body = {"networks": list(networks), "instances": list(instances)}
        return self.ask("POST", "/v1/records", body)

    def status(self) -> dict[str, object]:
        """Return the report that `imdsproxy status --json` prints."""
        return self.ask("GET", "/v1/status")

    def processes(self) -> Processes:
        """Return the pids that the daemon reports."""
        status = self.status()
        haproxy, documents = status["haproxy"], status["documents"]
        if not isinstance(haproxy, dict) or not isinstance(documents, dict):
            raise BenchError("status is not understood")
        controller = status["controller"]
        incomplete = documents["needed"] and not documents["pids"]
        if haproxy["worker"] is None or not isinstance(controller, int) or incomplete:
            raise BenchError("not all processes run yet")
        return Processes(
            controller=controller,
            master=haproxy["master"],
            worker=haproxy["worker"],
            old_workers=tuple(haproxy["old_workers"]),
            documents=tuple(documents["pids"]),
        )

    def wait_serving(self, networks: int, patience_s: float = 60) -> None:
        """Wait until this many networks are served.

        Raises:
            BenchError: Not in time; the message has the networks that are not served.
        """
        if not wait_until(lambda: self.status()["serving"] == networks, patience_s, every_s=0.05):
            status = self.status()
            raise BenchError(
                f"{status['serving']} of {networks} served: {status['not_served']!r:.500}"
            )

    def wait_in_sync(self, source: str, patience_s: float = 60) -> None:
        """Wait until a source has reported all records.

        Raises:
            BenchError: Not in time.
        """

        def in_sync() -> bool:
            found = self.status()["sources"]
            return isinstance(found, list) and any(
                one["name"] == source and one["in_sync"] for one in found
            )

        if not wait_until(in_sync, patience_s, every_s=0.05):
            raise BenchError(f"the source {source} is not in sync: {self.last_words()}")

    def wait_settled(self, patience_s: float = 60) -> Processes:
        """Wait until no old worker drains; return the processes."""
        found: list[Processes] = []

        def settled() -> bool:
            found[:] = [self.processes()]
            return not found[0].old_workers

        wait_until(settled, patience_s, every_s=0.1)
        return found[0]

    def kill_controller(self) -> None:
        """Kill the controller with SIGKILL, as the kernel's out-of-memory killer would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop_controller(self) -> None:
        """Stop the controller as `systemctl stop` does; the data plane keeps running."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(_STOP_S)
            self._process = None

    def replace_documents(self) -> None:
        """Make the document server load new code, as its unit's reload does (SIGHUP)."""
        os.kill(self.processes().documents[0], signal.SIGHUP)

    def stop(self) -> None:
        """End everything: first ask, then kill."""
        with contextlib.suppress(OSError, BenchError):
            self.ask("POST", "/v1/stop", {"data_plane": True})
            if self._process is not None:
                self._process.wait(_STOP_S)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process = None
        end_all(find_by_argument(self.directory))

    def empty_runtime(self) -> None:
        """Remove all that a reboot removes; call it after everything has ended."""
        for path in self.runtime.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def timed(self, condition: Callable[[], bool], patience_s: float, what: str) -> float:
        """Return the seconds until the condition came true.

        Raises:
            BenchError: The condition did not come true in time.
        """
        began = time.perf_counter()
        if not wait_until(condition, patience_s, every_s=0.001):
            raise BenchError(f"{what}: not within {patience_s:g} s")
        return time.perf_counter() - began

    def last_words(self) -> str:
        """Return the last lines of the daemon's log."""
        text = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        return " / ".join(text.splitlines()[-3:]) or f"nothing in {self.log}"
