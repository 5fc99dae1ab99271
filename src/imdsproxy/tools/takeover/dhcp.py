"""DHCP: replaces the HAProxies that neutron-dhcp-agent runs in its networks' namespaces. The agent keeps running."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from imdsproxy.config.strict_yaml import render_value
from imdsproxy.errors import Problem, refusing
from imdsproxy.host.files import write_atomic
from imdsproxy.host.process import open_process
from imdsproxy.model.entities import METADATA_IPV4
from imdsproxy.tools.takeover.actor import Actor
from imdsproxy.tools.takeover.observe import find_proxies, find_stand_ins, find_unrouted
from imdsproxy.tools.takeover.seen import (
    AgentOption,
    Seen,
    is_stand_in,
    option_of,
    refuse_restart,
    render_stand_in,
)
from imdsproxy.tools.takeover.steps import (
    EditSettings,
    EndProxies,
    ReleaseNetworks,
    Restart,
    StartAgent,
    Step,
    Takeover,
    WaitProxies,
    WaitServed,
    WriteSettings,
)

_PROGRAM_MODE: Final = 0o755
_PREFIX: Final = "qdhcp-"
_SOURCE: Final = "neutron_namespaces"
_PROGRAM: Final = "neutron-dhcp-agent"
_FORCED: Final = "force_metadata"

ISOLATED: Final = AgentOption(
    "dhcp", "enable_isolated_metadata", True, False, "leases contain the route to metadata"
)


@dataclass(frozen=True, slots=True)
class PlaceStandIn(Step):
    """Write the stand-in to a directory that precedes HAProxy's in the agent's PATH."""

    path: str
    text: str

    @classmethod
    def of(cls, haproxy: str, path: str) -> Self:
        return cls(
            f"write the stand-in {path}, an idle program that the agent finds before {haproxy}",
            f"cat >{path}; chmod 755 {path}",
            f"rm {path}",
            *(path, render_stand_in(haproxy)),
        )

    def run(self, actor: Actor) -> str:  # noqa: ARG002 - as the other steps
        with refusing(f"write {self.path}"):
            write_atomic(Path(self.path), self.text.encode(), mode=_PROGRAM_MODE, durable=True)
        return "written"


@dataclass(frozen=True, slots=True)
class WaitStandIns(Step):
    """Wait until the agent has started a stand-in in every namespace that imdsproxy serves."""

    prefix: str

    @classmethod
    def of(cls, prefix: str) -> Self:
        words = "wait until the agent has started the stand-ins (it checks every check_child_processes_interval)"
        return cls(words, f"for each namespace {prefix}…: ip netns pids NAMESPACE", "", prefix)

    def run(self, actor: Actor) -> str:
        places = set(actor.networks_in(self.prefix).values())

        def lacks() -> str:
            if back := find_proxies(self.prefix):
                return f"HAProxy {back[0].pid} in {back[0].namespace} is back: the agent does not find the stand-in"
            missing = sorted(places - {one.namespace for one in find_stand_ins(self.prefix)})
            return f"no stand-in in {missing[0]}" if missing else ""

        actor.wait(lacks)
        return f"{len(places)} networks"


@dataclass(frozen=True, slots=True)
class WaitRoutes(Step):
    """Wait until the agent's leases contain the route to 169.254.169.254 in every namespace."""

    prefix: str
    state_path: str

    @classmethod
    def of(cls, seen: Seen, prefix: str) -> Self:
        words = "wait until the leases of every network contain the route to 169.254.169.254"
        by_hand = f"grep -L 169.254.169.254 {seen.state_path}/dhcp/*/opts"
        return cls(words, by_hand, "", prefix, seen.state_path)

    def run(self, actor: Actor) -> str:
        def lacks() -> str:
            missing = find_unrouted(self.prefix, Path(self.state_path))
            return f"leases in {missing[0]} contain no route to {METADATA_IPV4}" if missing else ""

        actor.wait(lacks)
        return "guests get the route with their next lease"


@dataclass(frozen=True, slots=True)
class RemoveStandIn(Step):
    """Remove the program and end running stand-ins; the agent then starts HAProxies instead."""

    path: str
    prefix: str

    @classmethod
    def of(cls, path: str, prefix: str, then: str) -> Self:
        """Remove the stand-in at this path; `then` says what follows."""
        return cls(
            f"remove {path}, and stop the stand-ins{then}",
            f"rm {path}; pkill -f imdsproxy-for-haproxy",
            "imdsproxy takeover dhcp",
            *(path, prefix),
        )

    def run(self, actor: Actor) -> str:  # noqa: ARG002 - as the other steps
        with refusing(f"remove {self.path}"):
            Path(self.path).unlink(missing_ok=True)
        found = find_stand_ins(self.prefix)
        for one in found:
            if (handle := open_process(one.pid)) is not None:
                with contextlib.closing(handle):
                    handle.kill(signal.SIGTERM)
        return f"{len(found)} ended"


def _takeover(seen: Seen) -> Iterator[Step]:
    ready = seen.present is not None and seen.source
    placed, on = seen.stand_in is not None, _is_on(seen)
    unread = not on or _is_unread(seen)
    if ready and placed and not (seen.proxies or unread):
        return
    yield from WriteSettings.if_missing(
        seen, "serve the agent's namespaces as networks", render_settings(seen)
    )
    if not ready:
        yield Restart.of(seen)
    yield _wait_served("in which the agent has a HAProxy")
    if not placed:
        yield PlaceStandIn.of(*seen.haproxy)
    if not on:
        yield EditSettings.to_set(seen, ISOLATED)
    if unread:
        yield StartAgent.again(seen, "leases stay in force")
        yield WaitRoutes.of(seen, _PREFIX)
    yield from EndProxies.if_any(
        seen,
        _PREFIX,
        "connections not yet accepted move to imdsproxy",
        "the agent starts stand-ins instead",
    )
    yield WaitStandIns.of(_PREFIX)
    if unread:
        yield _wait_served("in which the agent has a stand-in")


def _wait_served(where: str) -> WaitServed:
    words = f"wait until imdsproxy listens in every network {where}"
    return WaitServed(words, "imdsproxy status", "", _PREFIX)


def _handback(seen: Seen) -> Iterator[Step]:
    if seen.marked:
        # Without the option the agent serves no metadata: it ends the stand-ins and starts no HAProxy.
        yield EditSettings.to_restore(seen, ISOLATED)
        yield StartAgent.again(seen, "leases stay in force")
    else:
        yield from StartAgent.if_stopped(seen)
    if seen.present is None:
        return
    if seen.stand_in is not None:
        then = "" if seen.marked else "; the agent starts HAProxies instead"
        yield RemoveStandIn.of(seen.haproxy[1], _PREFIX, then)
    if not seen.marked:
        yield WaitProxies.of(_PREFIX)
    words = (
        f"stop imdsproxy's listeners gracefully, remove {seen.drop_in}, and restart its controller"
    )
    yield ReleaseNetworks.of(seen, words, "dhcp", _PREFIX)


def _is_on(seen: Seen) -> bool:
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
            "the source that knows these networks' instances is disabled",
            "enable the source, and set `cloud`",
        )
    if not seen.agents:
        yield Problem(_PROGRAM, "the agent does not run", "start the agent")
        return
    if not _is_on(seen) or _is_unread(seen):
        yield from refuse_restart(seen, _PROGRAM)
    haproxy, path = seen.haproxy
    if not path:
        yield Problem(
            "PATH",
            f"the agent's PATH has no directory before that of {haproxy or 'HAProxy'}",
            "put /usr/local/sbin first (sudo's secure_path)",
        )
    elif seen.stand_in is not None and not is_stand_in(seen.stand_in):
        yield Problem("PATH", f"{path} exists, and is another program", "remove it")


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


KIND: Final = Takeover(
    "dhcp",
    (_PROGRAM,),
    _PREFIX,
    _SOURCE,
    _takeover,
    _handback,
    _refuse,
    runs_on=True,
)
