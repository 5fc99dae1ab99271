"""Runs a document server in a process of its own, and talks to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from imdsproxy.core.model import InstanceId
from imdsproxy.serving.pidfile import DocumentProcesses, read_pids
from support.guest import Connection, Lost, Reply
from support.guest_records import GUEST
from support.patience import patience

DEADLINE_S: Final = 20.0

_PROGRAM: Final = """
import json, os, pathlib, sys, time
from imdsproxy.errors import HostRefused, ImdsproxyError
from imdsproxy.host.account import find_account
from imdsproxy.host.notify import ServiceNotifier
from imdsproxy.serving import server
options = json.loads(sys.argv[1])
options["notifier"] = ServiceNotifier(options.pop("notify"))
fault = options.pop("fault")
serve = server.DocumentServer.serve
def watch(event, arguments):
    if event == "import":
        os.write(2, f"late import of {arguments[0]}\\n".encode())
if fault == "no program":
    sys.executable = "/nonexistent/python"
if fault == "no room":
    bind = server.open_unix_socket
    def bind_sparingly(path, **options):
        if path.suffix == ".new":
            raise HostRefused("no space left on device")
        return bind(path, **options)
    server.open_unix_socket = bind_sparingly
def serve_watched(*arguments):
    if fault == "slow":
        time.sleep(1)
    elif fault not in ("", "no program", "no room"):
        raise RuntimeError(fault)
    sys.addaudithook(watch)
    serve(*arguments)
server.DocumentServer.serve = serve_watched
for name in ("records", "passwords", "pid_file", "log"):
    options[name] = pathlib.Path(options[name])
options["sockets"] = tuple(map(pathlib.Path, options["sockets"]))
options["account"] = find_account(options.pop("user"), None)
try:
    server.DocumentServer(**options).run()
except ImdsproxyError as error:
    print("error:", error.message, file=sys.stderr)
    sys.exit(error.exit_status)
"""


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not condition():
        passed = time.monotonic() - start
        assert passed < DEADLINE_S * patience(), f"not after {passed:.1f} s: {what}"
        time.sleep(0.01)


def connect(path: Path) -> Connection:
    """A connection to a socket; `OSError` where none is taken."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE_S)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return Connection(sock)


def ask(
    path: Path,
    target: str,
    method: str = "GET",
    *,
    body: bytes = b"",
    instance: InstanceId | None = GUEST.id,
) -> Reply:
    """One request on a connection of its own."""
    lines = () if instance is None else (f"X-Imdsproxy-Instance: {instance}",)
    with connect(path) as connection:
        return connection.request(target, method=method, headers=lines, body=body)


class Server:
    """A document server below a directory."""

    def __init__(
        self, directory: Path, *, workers: int = 2, user: str | None = None, notify: str = ""
    ) -> None:
        self.directory = directory
        self.sockets = [directory / f"s{number}.sock" for number in range(workers)]
        self.records = directory / "documents"
        self.passwords = directory / "passwords"
        self.pid_file = directory / "documents.pid"
        self.log = directory / "documents.log"
        self._user = user
        self._notify = notify
        self._processes: list[subprocess.Popen[bytes]] = []

    def spawn(self, *, fault: str = "", log: Path | None = None) -> subprocess.Popen[bytes]:
        """Start one more below the directory; it writes to the log that all share unless it has its own."""
        options = {
            "sockets": [str(path) for path in self.sockets],
            "records": str(self.records),
            "passwords": str(self.passwords),
            "pid_file": str(self.pid_file),
            "log": str(self.log),
            "user": self._user,
            "notify": self._notify,
            "fault": fault,
        }
        with (log or self.log).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(options)], stdout=output, stderr=output
            )
        self._processes.append(process)
        return process

    def start(self, *, fault: str = "") -> subprocess.Popen[bytes]:
        process = self.spawn(fault=fault)
        wait_for("the workers answer", lambda: self.is_up(process.pid))
        return process

    def is_up(self, parent: int) -> bool:
        running = self.running
        if running.parent != parent or len(running.workers) != len(self.sockets):
            return False
        try:
            return all(ask(path, "/livez", instance=None).status == 200 for path in self.sockets)
        except (OSError, Lost):
            return False

    @property
    def running(self) -> DocumentProcesses:
        return read_pids(self.pid_file)

    def text(self) -> str:
        return self.log.read_text()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        left = {*self.running.workers, *(process.pid for process in self._processes)}
        for pid in self.running.workers:
            os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        wait_for(f"{left} end", lambda: not self.running.pids)
        # An unprivileged worker may not be able to read what it has not loaded before.
        assert "late import" not in self.text()


def pss_kib(pid: int) -> int:
    """The process's proportional share of memory, in KiB (proc_pid_smaps(5))."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise AssertionError("no Pss in smaps_rollup")
