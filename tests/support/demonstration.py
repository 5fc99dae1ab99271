"""script/demo run as a subprocess, and what the machine looks like before and after it."""

import json
import signal
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from support.reaper import processes_of

REPOSITORY: Final = Path(__file__).resolve().parents[2]
_NAMES: Final = {"/run/netns": ("imdsd",), "/sys/class/net": ("imdsd", "red", "green", "blue")}
_FOLDERS: Final = (
    *("/run/imdsproxy", "/var/lib/imdsproxy", "/etc/imdsproxy", "/var/tmp/imdsdemo"),  # noqa: S108 - looked at, not used
    *("/etc/cloud", "/var/lib/cloud", "/run/cloud-init"),
)
_RULES: Final = (("ip", "rule"), ("ip", "-6", "rule"), ("nft", "list", "ruleset"))


def host_view(directory: Path) -> Mapping[str, object]:
    """Everything that a demonstration in this directory might leave behind.

    Tests of other parts of the project may run beside this one, so that of namespaces, links and
    processes only those count that are a demonstration's.
    """
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return {
        **{
            folder: sorted(one.name for one in Path(folder).glob("*") if one.name.startswith(names))
            for folder, names in _NAMES.items()
        },
        "rules": [
            subprocess.run(words, capture_output=True, check=True).stdout for words in _RULES
        ],
        "processes": [words for _, words in processes_of([directory])],
        "mounts": [one for one in mounts if "imdsd" in one or str(directory) in one],
        "folders": [folder for folder in _FOLDERS if Path(folder).exists()],
        "hostname": socket.gethostname(),
    }


@dataclass(slots=True)
class Demonstration:
    """A running script/demo, and what it told by `--json`."""

    process: subprocess.Popen[str]
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
    return Demonstration(process, json_file)
