"""DHCP: in the place of the HAProxies that neutron-dhcp-agent keeps in its networks' namespaces. The agent runs on."""

from collections.abc import Iterator
from typing import Final

from imdsproxy.cli.takeover.plan import (
    EndProxies,
    Kind,
    PlaceStandIn,
    RemoveStandIn,
    Seen,
    Step,
    WaitServed,
    WaitStandIns,
    let_go_step,
    list_pids,
    option_of,
    restart_steps,
    settings_steps,
    start_steps,
    wait_step,
)
from imdsproxy.cli.takeover.stand_in import is_stand_in, render_stand_in
from imdsproxy.config.strict_yaml import render_value
from imdsproxy.errors import Problem

_PREFIX: Final = "qdhcp-"
_SOURCE: Final = "neutron_namespaces"
_METADATA: Final = ("enable_isolated_metadata", "force_metadata")


def _takeover(seen: Seen) -> Iterator[Step]:
    ready = seen.present is not None and seen.source
    placed = seen.stand_in is not None
    if ready and placed and not seen.proxies:
        return
    yield from settings_steps(seen, "the agent's namespaces are networks", render_settings(seen))
    if not ready:
        yield from restart_steps(seen)
    yield Step(
        "wait until imdsproxy listens in every network in which the agent has a HAProxy",
        "imdsproxy status",
        "",
        WaitServed(_PREFIX),
    )
    haproxy, path = seen.haproxy
    if not placed:
        yield Step(
            f"write {path}, which the agent finds before {haproxy}: a stand-in that does nothing",
            f"cat >{path}; chmod 755 {path}",
            f"rm {path}",
            PlaceStandIn(path, render_stand_in(haproxy)),
        )
    if seen.proxies:
        yield Step(
            f"end the agent's {len(seen.proxies)} HAProxies softly; what waits to be accepted comes to imdsproxy",
            f"kill -USR1 {list_pids(seen)}",
            "the agent starts stand-ins for them",
            EndProxies(_PREFIX),
        )
    yield Step(
        "wait until the agent has started the stand-ins (it looks every check_child_processes_interval)",
        f"for each namespace {_PREFIX}…: ip netns pids NAMESPACE",
        "",
        WaitStandIns(_PREFIX),
    )


def _handback(seen: Seen) -> Iterator[Step]:
    yield from start_steps(seen)
    if seen.present is None:
        return
    path = seen.haproxy[1]
    if seen.stand_in is not None:
        yield Step(
            f"remove {path}, and end the stand-ins: the agent starts HAProxies in their places",
            f"rm {path}; pkill -f imdsproxy-for-haproxy",
            "imdsproxy takeover dhcp",
            RemoveStandIn(path, _PREFIX),
        )
    yield wait_step(_PREFIX)
    words = (
        f"remove {seen.drop_in}, and restart imdsproxy's controller: its listeners there end softly"
    )
    yield let_go_step(seen, words, "dhcp", _PREFIX)


def _refuse(seen: Seen) -> Iterator[Problem]:
    if not seen.nova:
        yield Problem(
            "nova.endpoint_sets",
            "no Nova is configured",
            "imdsproxy config import --neutron /etc/neutron/neutron.conf /etc/neutron/metadata_agent.ini",
        )
    if "neutron" not in seen.sources:
        yield Problem(
            "sources.neutron",
            "instances of these networks are Neutron's",
            "enable it, and set `cloud`",
        )
    if not seen.agents:
        yield Problem("neutron-dhcp-agent", "it does not run", "start it")
        return
    if not any(option_of(seen, "DEFAULT", name).lower() == "true" for name in _METADATA):
        yield Problem(
            "enable_isolated_metadata",
            "the agent serves no metadata in its namespaces: it neither puts the addresses there nor names the route",
            "set it to True in dhcp_agent.ini, and restart the agent",
        )
    haproxy, path = seen.haproxy
    if not path:
        yield Problem(
            "PATH",
            f"the agent looks in no directory before that of {haproxy or 'HAProxy'}",
            "have it look in /usr/local/sbin first (sudo's secure_path)",
        )
    elif seen.stand_in is not None and not is_stand_in(seen.stand_in):
        yield Problem("PATH", f"{path} is there, and is another program", "remove it")


def render_settings(seen: Seen) -> str:
    """The settings file: the agent's namespaces are networks where it has proxies."""
    state_path = option_of(seen, "DEFAULT", "state_path")
    return "\n".join(
        [
            "# Made by `imdsproxy takeover dhcp`; `imdsproxy handback dhcp` removes it.",
            "sources:",
            f"  {_SOURCE}:",
            "    dhcp: true",
            *([f"    state_path: {render_value(state_path)}"] if state_path else []),
            "",
        ]
    )


KIND: Final = Kind(
    "dhcp",
    ("neutron-dhcp-agent",),
    _PREFIX,
    _SOURCE,
    _takeover,
    _handback,
    _refuse,
    runs_on=True,
)
