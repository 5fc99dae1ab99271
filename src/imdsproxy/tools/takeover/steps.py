"""Steps of a takeover: each with its words, its effect and what undoes it. Steps are idempotent.

The order of a takeover loses no request. First imdsproxy listens beside the agent's HAProxies and answers. Then each of
these HAProxies stops gracefully. The agent stops last, because a running agent starts its HAProxies again. Handing back
is the reverse.
"""

import contextlib
import http.client
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from imdsproxy.errors import HostRefused, Problem
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.sockets import SOCK_DIAG, listening_sockets
from imdsproxy.model.entities import METADATA_IPV4, METADATA_PORT
from imdsproxy.sources.neutron_namespaces.records import ROUTER_PREFIX
from imdsproxy.tools.takeover.actor import Actor, migrating
from imdsproxy.tools.takeover.agents import edit_file
from imdsproxy.tools.takeover.observe import find_proxies, find_stand_ins, is_idle_router
from imdsproxy.tools.takeover.seen import AgentOption, Kind, Reach, Seen, restart_command

_FOREIGN: Final = "foreign-listener"
SETTINGS_MODE: Final = 0o640
_SERVER_ERROR: Final = 500
_ANSWER_S: Final = 10.0
_DRAIN_S: Final = 60.0
"""Longest wait for open connections; exceeds HAProxy's timeout for idle connections."""


@dataclass(frozen=True, slots=True)
class Step(ABC):
    """Step of a plan.

    Attributes:
        words: Description in the imperative, on one line.
        undo: Command or text that undoes the step; empty if there is nothing to undo.
    """

    words: str
    by_hand: str
    undo: str

    @abstractmethod
    def run(self, actor: Actor) -> str:
        """Execute the step; return a description of the result.

        Raises `ImdsproxyError`: the step failed or timed out.
        """

    @property
    def shape(self) -> Mapping[str, str]:
        return {"step": self.words, "by_hand": self.by_hand, "undo": self.undo}


@dataclass(frozen=True, slots=True)
class Takeover(Kind):
    """Kind of agent with the steps of both directions.

    `refuse`: function that yields problems that the operator must fix before a takeover.
    """

    takeover: Callable[[Seen], Iterator[Step]]
    handback: Callable[[Seen], Iterator[Step]]
    refuse: Callable[[Seen], Iterator[Problem]]


@dataclass(frozen=True, slots=True)
class WriteSettings(Step):
    path: str
    text: str

    @classmethod
    def if_missing(cls, seen: Seen, what: str, text: str) -> Iterator[Step]:
        """Write the file if it does not exist; `what` describes its effect."""
        if seen.present is None:
            path = seen.drop_in
            yield cls(f"write {path}: {what}", f"cat >{path}", f"rm {path}", path, text)

    def run(self, actor: Actor) -> str:
        actor.write({Path(self.path): (self.text.encode(), SETTINGS_MODE)})
        return "written"


@dataclass(frozen=True, slots=True)
class EditSettings(Step):
    """Change a settings file of the agent; keep mode and owner."""

    path: str
    edit: Callable[[str], str]
    reach: Reach

    @classmethod
    def to_set(cls, seen: Seen, option: AgentOption) -> Self:
        """Set the option in the agent's last settings file, which overrides the others."""
        path = seen.files[-1]
        return cls(
            f"set {option.line} in {path}",
            f"sed -i '/^\\[DEFAULT\\]/a {option.line}' {path}",
            f"remove the line from {path}",
            *(path, option.set_in, seen.reach),
        )

    @classmethod
    def to_restore(cls, seen: Seen, option: AgentOption) -> Self:
        path = seen.files[-1]
        return cls(
            f"restore {option.name} in {path}",
            f"remove {option.line} from {path}",
            f"imdsproxy takeover {option.kind}",
            *(path, option.restore_in, seen.reach),
        )

    def run(self, actor: Actor) -> str:  # noqa: ARG002 - as the other steps
        edit_file(self.path, self.reach, self.edit)
        return "written"


@dataclass(frozen=True, slots=True)
class Restart(Step):
    """Restart the controller to apply settings that need a start; HAProxy keeps answering."""

    @classmethod
    def of(cls, seen: Seen) -> Self:
        words = "restart imdsproxy's controller; its HAProxy keeps answering"
        return cls(words, seen.commands.restart, "")

    def run(self, actor: Actor) -> str:
        return actor.command(self.by_hand)


@dataclass(frozen=True, slots=True)
class StartAgent(Step):
    @classmethod
    def if_stopped(cls, seen: Seen) -> Iterator[Step]:
        if not seen.agents:
            yield cls("start the agent", seen.commands.start, seen.commands.stop)

    @classmethod
    def again(cls, seen: Seen, what: str) -> Self:
        """Restart the agent; `what` says which service continues during the restart."""
        return cls(f"restart the agent; {what}", restart_command(seen), "")

    def run(self, actor: Actor) -> str:
        return actor.command(self.by_hand)


@dataclass(frozen=True, slots=True)
class WaitServed(Step):
    """Wait until imdsproxy listens in every namespace with an agent's HAProxy, and each network answers a request.

    `prefix`: prefix of the kind's namespace names; a network's id follows.
    """

    prefix: str

    def run(self, actor: Actor) -> str:
        served: set[str] = set()
        answered: set[str] = set()

        def lacks() -> str:
            if reason := actor.explain_unready():
                return reason
            known = {one["record"]["id"]: one for one in actor.daemon.get("/v1/networks")}
            places = {one["record"]["listener"].get("namespace") for one in known.values()}
            found = (*find_proxies(self.prefix), *find_stand_ins(self.prefix))
            if missing := sorted({one.namespace for one in found} - places):
                return f"imdsproxy does not know namespace {missing[0]}"
            for network, one in known.items():
                not_served = one["not_served"]
                if not_served is not None and not_served["code"] != _FOREIGN:
                    return f"network {network} is not served: {not_served['reason']}"
            served.update(known)
            return _ask_in_each(actor, known.keys() - answered, answered)

        actor.wait(lacks)
        return f"{len(served)} networks, a request answered in {len(answered)}"


def _ask_in_each(actor: Actor, networks: set[str], answered: set[str]) -> str:
    """Return why a request in one of the networks failed; add networks that answer to `answered`."""
    addresses: dict[str, str] = {}
    for one in actor.daemon.get("/v1/instances") if networks else ():
        for port in one["record"].get("ports", ()):
            for address in port.get("addresses", ())[:1]:
                addresses.setdefault(port["network"], address)
    for network in sorted(networks & addresses.keys()):
        query = {"network": network, "address": addresses[network], "probe": "true"}
        status = actor.daemon.get("/v1/explain", query)["probe"]["status"]
        if status >= _SERVER_ERROR:
            return f"{addresses[network]} in network {network} gets {status}"
        answered.add(network)
    return ""


@dataclass(frozen=True, slots=True)
class EndProxies(Step):
    """Stop the agent's HAProxies gracefully; connections not yet accepted move to imdsproxy's listener."""

    prefix: str

    @classmethod
    def if_any(cls, seen: Seen, prefix: str, effect: str, undo: str) -> Iterator[Step]:
        if seen.proxies:
            words = f"stop the agent's {len(seen.proxies)} HAProxies gracefully; {effect}"
            pids = " ".join(map(str, sorted(one.pid for one in seen.proxies)))
            yield cls(words, f"kill -USR1 {pids}", undo, prefix)

    def run(self, actor: Actor) -> str:
        with migrating(self.prefix):
            return f"{actor.end_proxies(self.prefix)} ended"


@dataclass(frozen=True, slots=True)
class WaitProxies(Step):
    """Wait until the agent's HAProxy listens in every namespace that imdsproxy serves."""

    prefix: str
    port: int

    @classmethod
    def of(
        cls, prefix: str, where: str = "in each network's namespace", *, port: int = METADATA_PORT
    ) -> Self:
        words = f"wait until one of the agent's HAProxies listens {where}"
        by_hand = f"for each namespace {prefix}…: ip netns exec NAMESPACE ss -lntp"
        return cls(words, by_hand, "", prefix, port)

    def run(self, actor: Actor) -> str:
        def lacks() -> str:
            # Each poll reads the networks again because the agent may drop one meanwhile.
            places = set(actor.networks_in(self.prefix).values())
            wanted = {one for one in places if not is_idle_router(one)}
            if missing := sorted(wanted - {one.namespace for one in find_proxies(self.prefix)}):
                return f"the agent has no HAProxy in {missing[0]}"
            for place in sorted(wanted - answering):
                if reason := _ask_inside(thread, place, self.port):
                    return f"the agent's HAProxy in {place}: {reason}"
                answering.add(place)
            return ""

        thread, answering = NamespaceThread(NamespaceDirectory()), set[str]()
        with contextlib.closing(thread):
            actor.wait(lacks)
        return f"{len(answering)} answer"


def _ask_inside(thread: NamespaceThread, namespace: str, port: int) -> str:
    """Return why the agent's HAProxy does not answer; empty if it forwards requests to the agent.

    The request uses loopback inside the namespace, which reaches no listener of imdsproxy: those are bound to the
    guests' device. In a router's namespace the agent's rules admit only guests' requests, so only the listening socket
    is checked.
    """
    if namespace.startswith(ROUTER_PREFIX):
        with thread.inside(namespace), NetlinkSocket(SOCK_DIAG) as channel:
            return "" if listening_sockets(channel, (port,)) else "the HAProxy does not listen yet"
    connection = http.client.HTTPConnection(str(METADATA_IPV4), port, timeout=_ANSWER_S)
    try:
        with thread.inside(namespace):
            connection.connect()
        connection.request("GET", "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    # The agent knows no guest at the loopback address, so any status below 500 proves that it answers.
    return f"status {status}" if status >= _SERVER_ERROR else ""


@dataclass(frozen=True, slots=True)
class ReleaseNetworks(Step):
    """Release the networks gracefully, as `EndProxies` does; then remove a settings file and restart imdsproxy."""

    path: str
    command: str
    prefix: str

    @classmethod
    def of(cls, seen: Seen, words: str, kind: str, prefix: str) -> Self:
        """Release the networks to the agent: the last step of a handback."""
        path, command = seen.drop_in, seen.commands.restart
        by_hand = f"rm {path}; {command}"
        return cls(words, by_hand, f"imdsproxy takeover {kind}", path, command, prefix)

    def run(self, actor: Actor) -> str:
        def old_workers() -> set[int]:
            return set(actor.daemon.get("/v1/status")["haproxy"]["old_workers"])

        def lacks_end() -> str:
            left = actor.networks_in(self.prefix)
            return actor.explain_unready() or (
                "imdsproxy still serves the agent's namespaces" if left else ""
            )

        networks = sorted(actor.networks_in(self.prefix))
        with migrating(self.prefix):
            # Open connections need their records, so the listeners end first.
            actor.daemon.request("POST", "/v1/release", body={"networks": networks})
            draining = old_workers()
            with contextlib.suppress(HostRefused):
                actor.wait(
                    lambda: "connections are still open" if draining & old_workers() else "",
                    within_s=_DRAIN_S,
                )
        Path(self.path).unlink(missing_ok=True)
        actor.command(self.command)
        actor.wait(lacks_end)
        return self.command
