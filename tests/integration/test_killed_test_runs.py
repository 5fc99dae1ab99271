"""A test process that is killed leaves no daemon, no namespace and no directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from support.lab import NETNS, until

pytestmark = pytest.mark.root

_TESTS: Final = Path(__file__).parents[1]
_RUN: Final = """
import subprocess, sys, time
from support.daemon import Daemon
from support.lab import Lab
daemon = Daemon(Lab())
inside = ("nsenter", f"--net=/run/netns/{daemon.lab.host}", "sleep", "1000")
pids = [
    subprocess.Popen(words, start_new_session=True).pid
    for words in ((sys.executable, "-c", "import time; time.sleep(1000)", f"{daemon.directory}/"), inside)
]
print(daemon.directory, daemon.lab.token, *pids, flush=True)
time.sleep(1000)
"""


def test_what_a_killed_run_has_started_and_made_is_gone() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _RUN],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(_TESTS), "PATH": "/usr/sbin:/usr/bin"},
    ) as run:
        assert run.stdout is not None
        directory, token, *pids = run.stdout.readline().split()
        assert [name for name in NETNS.iterdir() if token in name.name]
        run.kill()

    def gone() -> bool:
        namespaces = [name for name in NETNS.iterdir() if token in name.name]
        processes = [pid for pid in pids if Path(f"/proc/{pid}/ns/net").exists()]
        return not (namespaces or processes or Path(directory).exists())

    until(gone, what=f"the end of {pids} and {directory}")
