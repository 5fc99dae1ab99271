"""What is refused before the DHCP agent's HAProxies are replaced, and what stands in for them."""

import os
import signal
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.config.neutron_ini import parse_ini
from imdsproxy.host.process import read_arguments
from imdsproxy.tools.takeover.dhcp import KIND, WaitStandIns
from imdsproxy.tools.takeover.seen import (
    STAND_IN,
    Agent,
    Commands,
    Proxy,
    Seen,
    is_stand_in,
    render_stand_in,
)
from imdsproxy.tools.takeover.steps import EditSettings
from support.lab import until

_SEEN: Final = Seen(
    agents=(Agent(1, "neutron-dhcp-agent", "neutron-dhcp-agent.service"),),
    proxies=(Proxy(2, "qdhcp-1"),),
    files=("dhcp_agent.ini",),
    options=(parse_ini("[DEFAULT]\nenable_isolated_metadata = True\n", "dhcp_agent.ini"),),
    nova=True,
    sources=frozenset({"neutron"}),
    haproxy=("/usr/sbin/haproxy", "/usr/local/sbin/haproxy"),
)
_CONFIGURATION: Final = "global\n    pidfile     {pid_file}\nlisten listener\n    bind {bind}\n"


@pytest.mark.parametrize(
    ("seen", "field"),
    [
        (replace(_SEEN, nova=False), "nova.endpoint_sets"),
        (replace(_SEEN, sources=frozenset()), "sources.neutron"),
        (replace(_SEEN, agents=()), "neutron-dhcp-agent"),
        (replace(_SEEN, options=(), agents=(Agent(1, "neutron-dhcp-agent"),)), "--start-agent"),
        (replace(_SEEN, haproxy=("/sbin/haproxy", "")), "PATH"),
        (replace(_SEEN, stand_in="#!/bin/sh\n"), "PATH"),
    ],
)
def test_what_would_not_work_is_refused(seen: Seen, field: str) -> None:
    assert [one.field for one in KIND.refuse(seen)] == [field]


def test_nothing_is_refused_where_all_is_there_and_nothing_is_done_twice() -> None:
    assert not list(KIND.refuse(_SEEN))
    assert isinstance(tuple(KIND.takeover(_SEEN))[-1], WaitStandIns)
    text = render_stand_in("/usr/sbin/haproxy")
    done = replace(_SEEN, present="", source=True, stand_in=text, proxies=())
    assert not list(KIND.refuse(done))
    assert not list(KIND.takeover(done))


_OFF: Final = replace(_SEEN, options=(parse_ini("[DEFAULT]\n", "dhcp_agent.ini"),), proxies=())


@pytest.mark.parametrize(
    ("seen", "steps"),
    [
        (
            _OFF,
            "WriteSettings Restart WaitServed PlaceStandIn EditSettings StartAgent WaitRoutes WaitStandIns WaitServed",
        ),
        # Killed before the agent was restarted, and before it had done its work.
        (
            replace(
                _SEEN,
                present="",
                source=True,
                proxies=(),
                stand_in=render_stand_in(""),
                marked=True,
                unrouted=("qdhcp-1",),
            ),
            "WaitServed StartAgent WaitRoutes WaitStandIns WaitServed",
        ),
    ],
)
def test_an_agent_that_serves_no_metadata_gets_the_option_once_its_haproxies_are_replaced(
    seen: Seen, steps: str
) -> None:
    assert not list(KIND.refuse(seen))
    assert [type(one).__name__ for one in KIND.takeover(seen)] == steps.split()


def test_where_metadata_is_forced_the_agents_settings_stay() -> None:
    forced = parse_ini("[DEFAULT]\nforce_metadata = True\n", "dhcp_agent.ini")
    actions = [type(one) for one in KIND.takeover(replace(_OFF, options=(forced,)))]
    assert EditSettings not in actions


def test_a_handback_puts_back_the_option_that_a_takeover_has_set_and_waits_for_no_haproxy() -> None:
    seen = replace(
        _SEEN, present="", source=True, proxies=(), stand_in=render_stand_in(""), marked=True
    )
    steps = [type(one).__name__ for one in KIND.handback(seen)]
    assert steps == ["EditSettings", "StartAgent", "RemoveStandIn", "ReleaseNetworks"]
    # The agent may be stopped meanwhile.
    stopped = replace(seen, agents=(), commands=Commands(start="systemctl enable --now X"))
    assert [type(one).__name__ for one in KIND.handback(stopped)] == steps
    unmarked = [type(one).__name__ for one in KIND.handback(replace(seen, marked=False))]
    assert unmarked == ["RemoveStandIn", "WaitProxies", "ReleaseNetworks"]


def test_a_stand_in_is_what_the_agent_looks_for_and_ends_on_request(tmp_path: Path) -> None:
    program = _program(tmp_path)
    conf, pid_file = _configuration(tmp_path, "169.254.169.254:80")
    done = subprocess.run([program, "-f", conf], capture_output=True, text=True, check=True)
    assert not done.stdout
    until(lambda: pid_file.exists() and pid_file.read_text().strip())
    pid = int(pid_file.read_text())
    # A process that has just been forked, and has no arguments yet, is the stand-in a moment later.
    until(lambda: read_arguments(pid)[:1] == (f"{STAND_IN} {conf}",))
    os.kill(pid, signal.SIGTERM)
    until(lambda: not read_arguments(pid))


def test_all_other_calls_get_haproxy(tmp_path: Path) -> None:
    program = _program(tmp_path)
    router, _ = _configuration(tmp_path, ":::9697")
    for words in (["-v"], ["-f", str(router)], ["-f", "/etc/haproxy/haproxy.cfg", "-c"]):
        done = subprocess.run([program, *words], capture_output=True, text=True, check=True)
        assert done.stdout == f"{' '.join(words)}\n"


def _program(directory: Path) -> Path:
    program = directory / "haproxy"
    text = render_stand_in("/bin/echo")
    assert is_stand_in(text)
    program.write_text(text)
    program.chmod(0o755)
    return program


def _configuration(directory: Path, bind: str) -> tuple[Path, Path]:
    place, name = directory / "ns-metadata-proxy", str(uuid.uuid4())
    place.mkdir(exist_ok=True)
    conf, pid_file = place / f"{name}.conf", directory / f"{name}.pid.haproxy"
    conf.write_text(_CONFIGURATION.format(pid_file=pid_file, bind=bind))
    return conf, pid_file
