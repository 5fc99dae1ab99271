"""Runs a document server in a process of its own, and talks to it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from imdsproxy.documents.pidfile import DocumentProcesses, read_pids
from imdsproxy.model.entities import InstanceId
from support.daemon import alive
from support.guest import Lost, Reply, connect_unix
from support.guest_records import GUEST
from support.lab import until
from support.patience import patience

_PROGRAM: Final = """
import json, os, pathlib, sys, time
from imdsproxy.errors import HostRefused, ImdsproxyError
from imdsproxy.host.account import find_account
from imdsproxy.host.notify import ServiceNotifier
from imdsproxy.documents import server
here, user, fault = sys.argv[1:]
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
place = pathlib.Path(here)
try:
    server.DocumentServer(
        tuple(place / f"s{number}.sock" for number in range(2)),
        place / "documents",
        place / "passwords",
        place / "documents.pid",
        ServiceNotifier(f"{here}/notify"),
        log=place / "documents.log",
        account=find_account(user or None, None),
    ).run()
except ImdsproxyError as error:
    print("error:", error.message, file=sys.stderr)
    sys.exit(error.exit_status)
"""


def ask(
    path: Path, target: str, *, body: bytes = b"", instance: InstanceId | None = GUEST.id
) -> Reply:
    """A read on a connection of its own, or a POST of a body."""
    lines = () if instance is None else (f"X-Imdsproxy-Instance: {instance}",)
    with connect_unix(path) as connection:
        return connection.request(
            target, method="POST" if body else "GET", headers=lines, body=body
        )


class Server:
    """A document server with two workers below a directory."""

    def __init__(self, directory: Path, *, user: str = "") -> None:
        self.directory = directory
        self.sockets = [directory / f"s{number}.sock" for number in range(2)]
        self.records = directory / "documents"
        self.pid_file = directory / "documents.pid"
        self.log = directory / "documents.log"
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(directory / "notify"))
        self.manager.settimeout(20 * patience())
        self._user = user
        self._processes: list[subprocess.Popen[bytes]] = []

    def spawn(self, *, fault: str = "") -> subprocess.Popen[bytes]:
        """Start one more below the directory; all write to one log."""
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(self.directory), self._user, fault],
                stdout=output,
                stderr=output,
            )
        self._processes.append(process)
        return process

    def start(self, *, fault: str = "") -> subprocess.Popen[bytes]:
        process = self.spawn(fault=fault)
        self.wait_ready()
        assert self.running.parent == process.pid
        return process

    def wait_ready(self) -> None:
        """Wait until the service manager is told that all workers answer."""
        while not self.manager.recv(4096).startswith(b"READY=1\n"):
            pass

    def answers(self) -> bool:
        """Whether there are two workers, and each answers."""
        try:
            statuses = {ask(path, "/livez", instance=None).status for path in self.sockets}
        except Lost:
            return False
        return statuses == {200} and len(self.running.workers) == 2

    @property
    def running(self) -> DocumentProcesses:
        return read_pids(self.pid_file)

    def text(self) -> str:
        return self.log.read_text()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self.manager.close()
        left = self.running.workers
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        until(lambda: not any(map(alive, left)), what="the workers' end")
        # An unprivileged worker may not be able to read what it has not loaded before.
        assert "late import" not in self.text()


def pss_kib(pid: int) -> int:
    """The process's proportional share of memory, in KiB (proc_pid_smaps(5))."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise AssertionError("no Pss in smaps_rollup")
