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
import subprocess, time
from support.daemon import Daemon
from support.lab import Lab
daemon = Daemon(Lab())
inside = ("nsenter", f"--net=/run/netns/{daemon.lab.host}", "sleep", "1000")
named = ("sh", "-c", "sleep 1000; true", f"{daemon.directory}/")
pids = [subprocess.Popen(words, start_new_session=True).pid for words in (inside, named)]
print(daemon.directory, daemon.lab.token, *pids, flush=True)
time.sleep(1000)
"""


def test_what_a_killed_run_has_started_and_made_is_gone() -> None:
    environment = {"PYTHONPATH": str(_TESTS), "PATH": "/usr/sbin:/usr/bin"}
    words = [sys.executable, "-c", _RUN]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        directory, token, *pids = run.stdout.readline().split()
        assert list(NETNS.glob(f"*{token}*"))
        run.kill()

    def gone() -> bool:
        processes = [pid for pid in pids if Path(f"/proc/{pid}/ns/net").exists()]
        return not (processes or any(NETNS.glob(f"*{token}*")) or Path(directory).exists())

    until(gone, what=f"the end of {pids} and {directory}")
