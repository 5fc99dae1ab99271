"""The command line in processes of their own, forked from one that has loaded it, which takes 0.4 s of a processor."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.cli.main import main

__all__ = ["Command", "run_command"]

_WITHIN_S: Final = 60.0
_CONTEXT: Final = multiprocessing.get_context("forkserver")
# A child imports pytest's main module again, as the parent's; what `main` imports late is here too.
_CONTEXT.set_forkserver_preload(
    ["pytest.__main__", "imdsproxy.cli.admin_client", "imdsproxy.config.load", __name__]
)


@dataclass(frozen=True, slots=True)
class Command:
    """How a command of the command line ended."""

    status: int
    out: str
    err: str


def run_command(
    arguments: Sequence[str], *, environment: Mapping[str, str], stdin: str = ""
) -> Command:
    """Run it to its end.

    Args:
        arguments: Without the program's name.
        environment: All of it.
    """
    with tempfile.TemporaryDirectory(prefix="imdst-") as directory:
        files = [Path(directory, name) for name in ("in", "out", "err")]
        files[0].write_text(stdin)
        process = _CONTEXT.Process(target=_run, args=(arguments, environment, files))
        process.start()
        process.join(_WITHIN_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"not within {_WITHIN_S} s: imdsproxy {' '.join(arguments)}")
        status = process.exitcode
        process.close()
        return Command(status, files[1].read_text(), files[2].read_text())


def _run(arguments: Sequence[str], environment: Mapping[str, str], files: Sequence[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as an interpreter has it
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.exit(main(arguments))
