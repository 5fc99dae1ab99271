"""A server of the lab: one process, started and ended by its pid, always on the same port."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.patience import patience

_UP_S: Final = 90.0
_END_S: Final = 20.0
_PAUSE_S: Final = 0.2


class NotUp(Exception):
    """A server of the lab did not come up, or ended."""


def free_port() -> socket.socket:
    """A port of loopback that nobody else gets while the socket is open; servers take it with SO_REUSEPORT.

    The socket does not listen: while no server does, connections are refused.
    """
    holder = socket.socket(socket.AF_INET)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def ends_with_us() -> list[str]:
    """A prefix of a command line: the kernel kills the program when the thread that started it has ended."""
    return ["setpriv", "--pdeathsig", "KILL", "--"]


@dataclass(slots=True, kw_only=True)
class Server:
    """One process.

    Attributes:
        name: In messages.
        argv: The whole command line.
        cwd: Its directory, by which it finds its databases.
        environment: Beside this process's own.
        log: Where it writes; grows over restarts.
        is_up: Whether it answers.
    """

    name: str
    argv: list[str]
    cwd: Path
    environment: Mapping[str, str]
    log: Path
    is_up: Callable[[], bool]
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def pid(self) -> int:
        if self.process is None:
            raise NotUp(f"{self.name} does not run")
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def launch(self) -> None:
        """Starts it and does not wait; nothing if it runs."""
        if not self.running:
            self.process = self._open()

    def wait_up(self) -> None:
        """Waits until it answers.

        Raises:
            NotUp: It ended, or does not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + _UP_S * patience()
        while not self.is_up():
            if not self.running or time.monotonic() > deadline:
                lines = self.log.read_text(errors="replace").splitlines()[-30:]
                raise NotUp(f"{self.name} did not come up:\n" + "\n".join(lines))
            time.sleep(_PAUSE_S)

    def start(self) -> None:
        self.launch()
        self.wait_up()

    def stop(self) -> None:
        """Ends it as an operator would: SIGTERM, and SIGKILL when that does not help."""
        if self.process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def kill(self) -> None:
        """SIGKILL; connections to it break."""
        if self.process is None:
            return
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def _open(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.argv,
                cwd=self.cwd,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
