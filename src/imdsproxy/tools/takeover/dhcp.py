"""DHCP: replaces the HAProxies that neutron-dhcp-agent runs in its networks' namespaces. The agent keeps running."""

from collections.abc import Iterator
from typing import Final

from imdsproxy.config.strict_yaml import render_value
from imdsproxy.errors import Problem
from imdsproxy.tools.takeover.agent_settings import (
    AgentOption,
    refuse_restart,
    restart_agent_steps,
    restore_steps,
    set_steps,
)
from imdsproxy.tools.takeover.plan import (
    EndProxies,
    Kind,
    PlaceStandIn,
    RemoveStandIn,
    Seen,
    Step,
    WaitRoutes,
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
from imdsproxy.tools.takeover.stand_in import is_stand_in, render_stand_in

_PREFIX: Final = "qdhcp-"
_SOURCE: Final = "neutron_namespaces"
_PROGRAM: Final = "neutron-dhcp-agent"
_FORCED: Final = "force_metadata"

ISOLATED: Final = AgentOption(
    "dhcp", "enable_isolated_metadata", True, False, "leases name the route to metadata"
)


def _takeover(seen: Seen) -> Iterator[Step]:
    ready = seen.present is not None and seen.source
    placed, on = seen.stand_in is not None, _is_on(seen)
    unread = not on or _is_unread(seen)
    if ready and placed and not (seen.proxies or unread):
        return
    yield from settings_steps(seen, "the agent's namespaces are networks", render_settings(seen))
    if not ready:
        yield from restart_steps(seen)
    yield _wait_served("in which the agent has a HAProxy")
    haproxy, path = seen.haproxy
    if not placed:
        yield Step(
            f"write {path}, which the agent finds before {haproxy}: a stand-in that does nothing",
            f"cat >{path}; chmod 755 {path}",
            f"rm {path}",
            PlaceStandIn(path, render_stand_in(haproxy)),
        )
    if not on:
        yield from set_steps(seen, ISOLATED)
    if unread:
        yield from restart_agent_steps(seen, "leases stay in force")
        yield _wait_routes(seen)
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
    if unread:
        yield _wait_served("in which the agent has a stand-in")


def _wait_served(where: str) -> Step:
    return Step(
        f"wait until imdsproxy listens in every network {where}",
        "imdsproxy status",
        "",
        WaitServed(_PREFIX),
    )


def _wait_routes(seen: Seen) -> Step:
    return Step(
        "wait until the leases of every network name the route to 169.254.169.254",
        f"grep -L 169.254.169.254 {seen.state_path}/dhcp/*/opts",
        "",
        WaitRoutes(_PREFIX, seen.state_path),
    )


def _handback(seen: Seen) -> Iterator[Step]:
    if seen.marked:
        # Without the option the agent serves no metadata: it ends the stand-ins and starts no HAProxy.
        yield from restore_steps(seen, ISOLATED)
        yield from restart_agent_steps(seen, "leases stay in force")
    else:
        yield from start_steps(seen)
    if seen.present is None:
        return
    path = seen.haproxy[1]
    if seen.stand_in is not None:
        then = "" if seen.marked else ": the agent starts HAProxies in their places"
        yield Step(
            f"remove {path}, and end the stand-ins{then}",
            f"rm {path}; pkill -f imdsproxy-for-haproxy",
            "imdsproxy takeover dhcp",
            RemoveStandIn(path, _PREFIX),
        )
    if not seen.marked:
        yield wait_step(_PREFIX)
    words = (
        f"remove {seen.drop_in}, and restart imdsproxy's controller: its listeners there end softly"
    )
    yield let_go_step(seen, words, "dhcp", _PREFIX)


def _is_on(seen: Seen) -> bool:
    """Return whether the agent serves metadata in isolated networks."""
    return ISOLATED.is_set(seen) or option_of(seen, "DEFAULT", _FORCED).lower() == "true"


def _is_unread(seen: Seen) -> bool:
    """Return whether the agent runs without the option that an interrupted takeover has set in its file."""
    return seen.marked and bool(seen.unrouted)


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
        yield Problem(_PROGRAM, "it does not run", "start it")
        return
    if not _is_on(seen) or _is_unread(seen):
        yield from refuse_restart(seen, _PROGRAM)
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
    """Return the text of the settings file that enables the agent's namespaces as networks."""
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
    (_PROGRAM,),
    _PREFIX,
    _SOURCE,
    _takeover,
    _handback,
    _refuse,
    runs_on=True,
)
