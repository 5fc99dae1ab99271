"""script/demo run as a subprocess, and what the machine looks like before and after it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
_OURS: Final = "imdsd"
_FOLDERS: Final = (
    *("/run/imdsproxy", "/var/lib/imdsproxy", "/etc/imdsproxy", "/var/tmp/imdsdemo"),  # noqa: S108 - looked at, not used
    *("/etc/cloud", "/var/lib/cloud", "/run/cloud-init"),
)


@dataclass(frozen=True, slots=True)
class HostView:
    """Everything that a demonstration might leave behind.

    Tests of other parts of the project may run beside this one, so that of namespaces, links and
    processes only those count that are a demonstration's.
    """

    namespaces: tuple[str, ...]
    links: tuple[str, ...]
    rules: str
    processes: tuple[str, ...]
    mounts: tuple[str, ...]
    folders: tuple[str, ...]
    hostname: str

    @classmethod
    def now(cls, directory: Path) -> HostView:
        """Looks; `directory` is the demonstration's own."""
        return cls(
            namespaces=tuple(sorted(_names("/run/netns", _OURS))),
            links=tuple(sorted(_names("/sys/class/net", ("imdsd", "red", "green", "blue")))),
            rules=_output(["ip", "rule"]) + _output(["ip", "-6", "rule"]) + _nft(),
            processes=tuple(_processes(str(directory))),
            mounts=tuple(
                line
                for line in Path("/proc/self/mountinfo").read_text().splitlines()
                if "imdsd" in line or str(directory) in line
            ),
            folders=tuple(folder for folder in _FOLDERS if Path(folder).exists()),
            hostname=_output(["hostname"]),
        )


def _names(folder: str, prefix: str | tuple[str, ...]) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError):
        for entry in Path(folder).iterdir():
            if entry.name.startswith(prefix):
                yield entry.name


def _output(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def _nft() -> str:
    """Without `nft` on the machine nothing of the demonstration could have made a rule with it."""
    return _output(["nft", "list", "ruleset"]) if shutil.which("nft") else ""


def _processes(word: str) -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if word in command:
                    yield f"{entry.name} {command}"


@dataclass(slots=True)
class Demonstration:
    """A running script/demo, and what it told by `--json`."""

    process: subprocess.Popen[str]
    directory: Path
    json_file: Path

    @property
    def told(self) -> dict[str, Any]:
        """The JSON file's content."""
        found: dict[str, Any] = json.loads(self.json_file.read_text())
        return found

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """Asks it to end; returns the exit status and all that it printed."""
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


@contextlib.contextmanager
def demo_directory() -> Iterator[Path]:
    """A directory that HAProxy's account can reach, gone afterwards (pytest's own are closed)."""
    directory = Path(f"/var/tmp/imdst-demo-{os.getpid()}")  # noqa: S108 - checked by the demo
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def start(directory: Path, *arguments: str) -> Demonstration:
    """Starts script/demo with its files in `directory`."""
    json_file = directory.with_suffix(".json")
    json_file.unlink(missing_ok=True)
    process = subprocess.Popen(
        [
            str(REPOSITORY / "script" / "demo"),
            *("--directory", str(directory), "--json", str(json_file)),
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Demonstration(process, directory, json_file)


def wait_until(what: str, condition: Callable[[], object], deadline_s: float) -> None:
    """Polls; fails the test when `condition()` stays false for `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {deadline_s:g} s")
        time.sleep(0.05)
