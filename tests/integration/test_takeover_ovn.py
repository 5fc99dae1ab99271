"""A hypervisor moves from Neutron's own OVN agents to imdsproxy and back while its guests ask, and loses no request."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from support.document_blocks import blocks_of, find_fault, script_of
from support.guest import IPV4, IPV6, Load
from support.how_to import PAGES
from support.lab import until
from support.ovn_agent import AGENT, NEW_AGENT, TARGET, AgentWorld, open_agent_world
from support.systemd_machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

_OURS = Path("etc/imdsproxy/conf.d/ovn.yaml")
_PAUSE_S = 0.02
_EVIL = "/tmp/evil.conf"  # noqa: S108 - of the machine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentWorld]:
    with open_agent_world(tmp_path_factory.mktemp("takeover")) as made:
        yield made


@contextlib.contextmanager
def _no_request_is_lost(world: AgentWorld) -> Iterator[None]:
    """Guests open a connection for each request over IPv4 and IPv6, and some keep theirs."""
    # No more at once: the agent's socket takes five connections, and its HAProxies answer 503 beyond that.
    asking = (
        (("a1", "b1"), IPV4, False),
        (("a2",), IPV6, False),
        (("b2",), IPV4, True),
    )
    with contextlib.ExitStack() as stack:
        loads = [
            stack.enter_context(
                Load(
                    [world.guests[name] for name in names],
                    TARGET,
                    world.wrong,
                    keep_alive=kept,
                    again=kept,
                    pause_s=_PAUSE_S,
                    to=to,
                )
            )
            for names, to, kept in asking
        ]
        for load in loads:
            load.wait_answers(20)
        yield
        for load in loads:
            load.wait_answers(20)
    for load in loads:
        assert load.report.lost == []


@contextlib.contextmanager
def _forged_agent(machine: Machine) -> Iterator[int]:
    """A process of another user's with the agent's command line and a settings file of that user's, for the block."""
    machine.write(_EVIL, "[DEFAULT]\nnova_metadata_host = 192.0.2.66\n")
    machine.run("chown", "nobody", _EVIL)
    unit = "forged"
    forged = ("bash", "-c", f"exec -a '{AGENT} --config-file {_EVIL}' sleep infinity")
    machine.run("systemd-run", f"--unit={unit}", "--uid=65534", *forged)
    try:
        yield machine.main_pid(f"{unit}.service")
    finally:
        machine.run("systemctl", "stop", unit)


def _shows_beside(world: AgentWorld, proxies: list[int]) -> bool:
    """Whether `status` has imdsproxy's listeners, and each of the agent's HAProxies beside them."""
    seen = world.daemon.status()["not_served"]
    shown = {f"haproxy (pid {pid})" for pid in proxies}
    named = {one for one in shown if any(one in each["reason"] for each in seen)}
    return named == shown and {one["code"] for one in seen} == {"foreign-listener"}


def test_a_takeover_that_fails_leaves_both_serving_and_goes_on_when_it_is_run_again(
    world: AgentWorld,
) -> None:
    world.fresh(AGENT)
    machine, ours = world.daemon.machine, world.daemon.machine.root / _OURS
    before = world.proxies()
    with _no_request_is_lost(world):
        with _forged_agent(machine) as forged:
            planned = world.daemon.command("takeover", "ovn", "--dry-run")
            pid = machine.main_pid(f"{AGENT}.service")
            assert f"agent: {AGENT} (pid {pid}, user root, {AGENT}.service)" in planned
            assert planned.count(f"stop {AGENT} (pid ") == 1
            assert f"ignored: process {forged} looks like {AGENT}, but it belongs to" in planned
            assert _EVIL not in planned
            status, said = machine.attempt("imdsproxy", "takeover", "ovn")
            assert status == 64
            assert "--yes" in said
        assert not ours.exists()
        assert world.proxies() == before

        status, said = machine.attempt(
            "imdsproxy", "takeover", "ovn", "--yes", "--restart", "false"
        )
        assert status == 71
        assert "`false` ended with 1; 2 steps before this step done" in said
        assert world.proxies() == before

        machine.run("systemctl", "restart", "imdsproxy")
        until(partial(_shows_beside, world, before), what="both in status", within_s=30)

        status, said = machine.attempt(
            "imdsproxy", "takeover", "ovn", "--yes", "--stop-agent", "false"
        )
        assert status == 71
        assert "step 3 of 3" in said
        assert world.proxies() == []

        assert "takeover ovn is done" in world.daemon.command("takeover", "ovn", "--yes")
        assert machine.unit(AGENT, "ActiveState") == "inactive"
        assert "nothing is left to do" in world.daemon.command("takeover", "ovn")
        for network in {port.network for port in world.ovn.ports.values()}:
            migrates = ("cat", "/proc/sys/net/ipv4/tcp_migrate_req")
            assert world.daemon.inside(network.namespace, *migrates) == "0"
        world.daemon.command("status", "--check")


@pytest.mark.always
def test_the_page_moves_a_host_over_and_back_to_the_letter(world: AgentWorld) -> None:
    world.fresh(NEW_AGENT)
    with _no_request_is_lost(world):
        _follow(world, "## Move a host")
        assert world.proxies() == []
        assert world.daemon.machine.unit(NEW_AGENT, "ActiveState") == "inactive"
        # A namespace that the agent has not made.
        world.ovn.add_network("c")
        world.ovn.add_port("c1", "c")
        world.guests["c1"] = world.ovn.guest("c1")
        world.wait_served()
        _follow(world, "## Go back")
        assert len(world.proxies()) == 3
        assert world.daemon.machine.unit(NEW_AGENT, "ActiveState") == "active"
        world.wait_served()
    assert "nothing is left to do" in world.daemon.command("handback", "ovn")
    assert not (world.daemon.machine.root / _OURS).exists()
    assert world.daemon.status()["networks"] == 0
    del world.guests["c1"]
    world.ovn.remove_port("c1")


def _follow(world: AgentWorld, heading: str) -> None:
    """Run what the page says below a heading."""
    blocks = blocks_of(PAGES / "ovn.md", heading)
    done = world.daemon.machine.attempt("bash", "-euo", "pipefail", "-c", script_of(blocks))
    assert not (fault := find_fault(blocks, *done)), fault
