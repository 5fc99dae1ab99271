"""A namespace in which per-network proxies are started as Neutron's agents start them, and a recorder behind them."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.daemon import alive
from support.guest import Guest
from support.lab import Lab, processes_in, until
from support.patience import patience
from support.recorder import Recorder

PROGRAM: Final = str(Path(sys.executable).with_name("neutron-ns-metadata-proxy"))
NETWORK: Final = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"


@dataclass(frozen=True, slots=True)
class Started:
    """What came of a start."""

    status: int
    output: str
    errors: str

    @property
    def lines(self) -> list[str]:
        return self.errors.splitlines()


@dataclass(slots=True)
class Place:
    """A network's namespace with a guest, and a host for the proxy in it.

    Attributes:
        lab: Makes namespaces.
        state: Neutron's state path.
        network: The name of the network's namespace.
        guest: Behind it.
        recorder: At the socket in the state path.
    """

    lab: Lab
    state: Path
    network: str
    guest: Guest
    recorder: Recorder
    _foreground: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def pid_file(self) -> Path:
        return self.state / f"{NETWORK}.pid"

    @property
    def config(self) -> Path:
        return self.state / "ns-metadata-proxy" / f"{NETWORK}.conf"

    def words(self, *more: str, port: int = 80) -> list[str]:
        """What a DHCP agent says of a network."""
        return [
            f"--network_id={NETWORK}",
            f"--state_path={self.state}",
            f"--metadata_port={port}",
            f"--pid_file={self.pid_file}",
            *more,
        ]

    def inside(self, *command: str) -> list[str]:
        """A command in the namespace, as an agent has it run."""
        return ["/usr/sbin/ip", "netns", "exec", self.network, *command]

    def run(
        self,
        *words: str,
        program: Sequence[str] = (PROGRAM,),
        environment: Mapping[str, str] | None = None,
    ) -> Started:
        """Run the program to its end."""
        done = subprocess.run(
            self.inside(*program, *words),
            capture_output=True,
            text=True,
            check=False,
            timeout=60 * patience(),
            env={**os.environ, **(environment or {})},
        )
        return Started(done.returncode, done.stdout, done.stderr)

    def start(self, *more: str) -> int:
        """Have a proxy in the background; its pid."""
        assert self.run(*self.words(*more)) == Started(0, "", "")
        return self.pid()

    def open(self, *more: str, program: Sequence[str] = (PROGRAM,)) -> subprocess.Popen[str]:
        """Have a proxy in the foreground that listens."""
        process = subprocess.Popen(
            self.inside(*program, *self.words("--nodaemonize", *more)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._foreground.append(process)
        until(lambda: process.poll() is not None or self.guest.reaches(), what="the proxy listens")
        return process

    def pid(self) -> int:
        return int(self.pid_file.read_text())

    def proxies(self) -> list[int]:
        """The pids of all HAProxies in the namespace."""
        return [pid for pid in processes_in(self.network) if "haproxy" in command_line(pid)[0]]

    def clear(self) -> None:
        """End every proxy and remove what they left."""
        for process in self._foreground:
            # Where its test has failed it may not have become HAProxy yet, and would not be found below.
            process.kill()
        proxies = self.proxies()
        for pid in proxies:
            os.kill(pid, 9)
        # One that ends has no name any more, and takes connections for a moment.
        until(lambda: not any(map(alive, proxies)), what="the proxies end")
        until(lambda: not self.proxies(), what="the proxies end")
        for process in self._foreground:
            process.communicate()
        self._foreground.clear()
        for path in self.state.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.is_socket():
                path.unlink()
        self.recorder.forget()


@contextmanager
def open_place() -> Iterator[Place]:
    """A place, gone afterwards."""
    # Not pytest's: an account that HAProxy takes must reach the socket.
    with closing(Lab()) as lab, tempfile.TemporaryDirectory(prefix="imdst-") as directory:
        state = Path(directory)
        state.chmod(0o755)
        lab.namespace_network("blue")
        guest = lab.guest("blue")
        with Recorder(path=state / "metadata_proxy") as recorder:
            place = Place(lab, state, lab.name("blue"), guest, recorder)
            try:
                yield place
            finally:
                place.clear()


def command_line(pid: int) -> list[str]:
    """A process's words; one empty word for a process that has none, or has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return [""]
    return words[:-1] or [""]


def process_status(pid: int) -> dict[str, list[str]]:
    """The lines of `/proc/PID/status`, each name's values."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name: value.split() for name, _, value in pairs}
