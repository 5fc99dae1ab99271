"""Runs `imdsproxy takeover` and `handback` where no systemd restarts a controller, or an agent of Neutron's."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final
from unittest import mock

from imdsproxy.tools.takeover.actor import Actor
from imdsproxy.tools.takeover.steps import Step
from support.commands import Command
from support.daemon import Daemon
from support.lab import until
from support.openstack.servers import Server
from support.patience import patience

_STEP_S: Final = 90.0
_WITHIN_S: Final = 180.0


def run_takeover(
    daemon: Daemon, agent: Server, *words: str, killed_after: type[Step] | None = None
) -> Command:
    """Run a command that has the controller, and an agent, restarted by files; it has to succeed.

    Args:
        killed_after: It is killed when it has taken the first step of this kind.
    """

    def restart_controller() -> None:
        daemon.kill_controller(signal.SIGTERM)
        daemon.start(ready=False)

    def restart_agent() -> None:
        agent.stop()
        agent.launch()

    restarts = {"restart": restart_controller, "start-agent": restart_agent}
    asked, done = daemon.directory / "asked", daemon.directory / "done"
    options = [
        word
        for name in restarts
        for word in (
            f"--{name}",
            f"echo {name} >{asked}; while [ ! -e {done} ]; do sleep 0.05; done; rm {done}",
        )
    ]

    # The agent belongs to no unit here.
    options += ["--timeout", str(_STEP_S * patience()), "--agent", str(agent.pid), "--yes"]

    def ended() -> bool:
        if asked.exists() and (name := asked.read_text().strip()):
            asked.unlink()
            restarts[name]()
            done.touch()
        return running.done()

    with ThreadPoolExecutor(1) as pool:
        before = None if killed_after is None else partial(_die_after, killed_after)
        running = pool.submit(daemon.command, *words, *options, before=before)
        until(ended, within_s=_WITHIN_S, what="the end of the command")
    result = running.result()
    expected = 0 if killed_after is None else -signal.SIGKILL
    assert result.status == expected, f"{result.status}: {result.out}{result.err}"
    return result


def _die_after(kind: type[Step]) -> None:
    run = kind.run

    def run_and_die(step: Step, actor: Actor) -> str:
        run(step, actor)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    mock.patch.object(kind, "run", run_and_die).start()
