"""The daemon under demonstration, run as an operator would: a settings file and its commands."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import yaml

from demo.processes import CommandError, inside, run
from demo.roster import DAEMON_PREFIX, HOST_NAMESPACE, networks, records

__all__ = ["Daemon", "Pids", "render_config"]

_START_S: Final = 20.0
_STOP_S: Final = 15.0
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Pids:
    """The processes of the daemon's three lives."""

    master: int
    worker: int
    documents: tuple[int, ...]
    controller: int


def render_config(directory: Path) -> str:
    """The daemon's whole configuration: its own directories, and processes without systemd."""
    return yaml.safe_dump(
        {
            "paths": {
                "runtime_dir": str(directory / "run"),
                "state_dir": str(directory / "state"),
            },
            "haproxy": {"supervisor": "spawn"},
            "documents": {"supervisor": "spawn"},
            "host": {"name_prefix": DAEMON_PREFIX},
        },
        sort_keys=False,
    )


class Daemon:
    """Starts, fills, asks and stops one imdsproxy whose host is the lab's host namespace.

    Attributes:
        cli: The argv before any command of it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._config = directory / "imdsproxy.yaml"
        program = Path(sys.executable).parent / "imdsproxy"
        self.cli = [str(program), "--config", str(self._config)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What the daemon and its processes say."""
        return self._directory / "daemon.log"

    def start(self) -> None:
        """Starts it and waits until its command line is answered.

        Raises:
            CommandError: It ended, or did not answer in time.
        """
        self._config.write_text(render_config(self._directory))
        with self.log.open("wb") as log:
            self._process = _spawn(inside(HOST_NAMESPACE, [*self.cli, "run"]), log)
        deadline = time.monotonic() + _START_S
        while run([*self.cli, "status", "--json"], must_succeed=False).status != 0:
            if self._process.poll() is not None:
                raise CommandError(f"the daemon did not start: {self._last_words()}")
            if time.monotonic() > deadline:
                raise CommandError(f"the daemon does not answer: {self._last_words()}")
            time.sleep(_POLL_S)

    def fill(self, word: str) -> None:
        """Puts the lab's records into the embedded store, by the command line.

        Raises:
            CommandError: A record was refused.
        """
        everything = records(word)
        for kind in ("network", "instance"):
            part = {f"{kind}s": everything[f"{kind}s"]}
            file = self._directory / f"{kind}s.yaml"
            file.write_text(yaml.safe_dump(part, sort_keys=False))
            run([*self.cli, kind, "add", "--file", str(file)])

    def wait_serving(self) -> None:
        """Waits until every network of the lab is listened on.

        Raises:
            CommandError: Not in time; the message says which are left out and why.
        """
        wanted = len(networks())
        deadline = time.monotonic() + _START_S
        while (status := self._status())["serving"] != wanted or not status["haproxy"]["worker"]:
            if time.monotonic() > deadline:
                reasons = [
                    f"{entry['network']}: {entry['reason']}" for entry in status["not_served"]
                ]
                raise CommandError(f"not all networks are served: {'; '.join(reasons)}")
            time.sleep(_POLL_S)

    def pids(self) -> Pids:
        """Asks the daemon for its processes.

        Raises:
            CommandError: It does not answer, or not all of them run.
        """
        status = self._status()
        try:
            return Pids(
                master=int(status["haproxy"]["master"]),
                worker=int(status["haproxy"]["worker"]),
                documents=tuple(int(pid) for pid in status["documents"]["pids"]),
                controller=int(status["controller"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CommandError(f"status is not understood: {error!r} in {status}") from error

    def _status(self) -> dict[str, Any]:
        output = run([*self.cli, "status", "--json"])
        found: dict[str, Any] = json.loads(output.out)
        return found

    def stop(self) -> None:
        """Stops all of it. The caller ends by force, with the lab, what does not stop."""
        if self._process is None:
            return
        with contextlib.suppress(CommandError):
            run([*self.cli, "stop", "--data-plane"], timeout_s=_STOP_S)
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        told = [line.strip() for line in lines if line.strip(" |+-^~")]
        reasons = [line for line in told if "Error" in line or "error" in line]
        return f"{(reasons or told or ['it said nothing'])[-1]} (all of it in {self.log})"


def _spawn(argv: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
