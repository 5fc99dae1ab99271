"""The command line in processes of their own, forked from one that has loaded it, which takes 0.7 s of a processor."""

import contextlib
import ctypes
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.cli.main import main
from support.patience import patience

_WITHIN_S: Final = 180.0
_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        # A child imports the main module of its parent again.
        "pytest.__main__",
        # What `main` imports late; the first comes before all that logs.
        "imdsproxy.host.logs",
        "imdsproxy.api.client",
        "imdsproxy.start",
        "imdsproxy.api.app",
        "ovs.db.idl",
        "support.ovn_steps",
        __name__,
    ]
)
_CLONE_NEWNET: Final = 0x40000000


@dataclass(frozen=True, slots=True)
class Command:
    """How a command of the command line ended."""

    status: int
    out: str
    err: str


def run_command(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    stdin: str = "",
    before: Callable[[], None] | None = None,
) -> Command:
    """Run it to its end.

    Args:
        arguments: Without the program's name.
        environment: All of it.
        before: Done in its process first.
    """
    with tempfile.TemporaryDirectory(prefix="imdst-") as directory:
        files = [Path(directory, name) for name in ("in", "out", "err")]
        files[0].write_text(stdin)
        process = _CONTEXT.Process(target=_run, args=(arguments, environment, files, before))
        process.start()
        process.join(_WITHIN_S * patience())
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"not within {_WITHIN_S} s: imdsproxy {' '.join(arguments)}")
        status = process.exitcode
        process.close()
        return Command(status, files[1].read_text(), files[2].read_text())


class Forked:
    """A process of the command line that goes on, with what tests use of `subprocess.Popen`."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process
        pid = process.pid
        assert pid is not None
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("imdsproxy", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def start_controller(
    config: Path,
    *,
    environment: Mapping[str, str],
    log: Path,
    namespace: Path | None,
    before: Callable[[], None] | None = None,
) -> Forked:
    """Start a controller, whose command line is another's: its working directory is where its settings are.

    Args:
        config: Its settings.
        environment: All of its environment.
        log: Where it writes.
        namespace: Where it runs.
        before: Done in its process first.
    """
    process = _CONTEXT.Process(
        target=_be_controller, args=(config, environment, log, namespace, before), daemon=True
    )
    process.start()
    return Forked(process)


def _be_controller(
    config: Path,
    environment: Mapping[str, str],
    log: Path,
    namespace: Path | None,
    before: Callable[[], None] | None,
) -> None:
    os.setsid()
    os.chdir(config.parent)
    if namespace is not None:
        with namespace.open("rb") as opened:
            entered = ctypes.CDLL(None).setns(opened.fileno(), _CLONE_NEWNET)
        assert entered == 0, namespace
    files = (Path(os.devnull), log, log)
    _run(("--config", str(config), "run"), environment, files, before)


def _run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    files: Sequence[Path],
    before: Callable[[], None] | None = None,
) -> None:
    if before is not None:
        before()
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as an interpreter has it
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.exit(main(arguments))
