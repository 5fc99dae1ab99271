"""Plans for replacing Neutron's agents with imdsproxy, and for handing back. Pure.

The order of a takeover loses no request. First imdsproxy listens beside the agent's HAProxies and answers. Then each of
these HAProxies stops gracefully. The agent stops last, because a running agent starts its HAProxies again. Handing back
is the reverse.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from imdsproxy.config.neutron_ini import IniOption
from imdsproxy.errors import Problem
from imdsproxy.model.entities import METADATA_PORT


@dataclass(frozen=True, slots=True)
class Reach:
    """Access to an agent's files: their root directory, and the allowed owners beside root.

    Attributes:
        root: Root directory of the agent's container, as seen from the host; `/` without a container.
        user: User id of the agent.
        group: Group id of the agent.
    """

    root: str = "/"
    user: int = 0
    group: int = 0


@dataclass(frozen=True, slots=True)
class Agent:
    """Running Neutron agent.

    Attributes:
        program: Name of the program, as `neutron-ovn-metadata-agent`.
        unit: Systemd unit; empty without one, as in a container.
        files: Settings files in the order of the command line, as paths on the host.
        account: User name.
        place: Container or control group.
        started: Start time; together with the pid it identifies the process.
    """

    pid: int
    program: str
    unit: str = ""
    files: tuple[str, ...] = ()
    reach: Reach = Reach()
    account: str = ""
    place: str = ""
    started: int = 0


@dataclass(frozen=True, slots=True)
class Stranger:
    """Process with an agent's command line that is not trusted.

    Attributes:
        program: Name of the agent in the command line.
        reason: Reason for the distrust.
    """

    pid: int
    program: str
    reason: str


@dataclass(frozen=True, slots=True)
class Proxy:
    """HAProxy or stand-in that an agent runs in a namespace."""

    pid: int
    namespace: str


@dataclass(frozen=True, slots=True)
class Commands:
    """Shell commands that stop and start the agent and restart imdsproxy; empty if not known."""

    stop: str = ""
    start: str = ""
    restart: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """Observed state of this host.

    Attributes:
        agents: Running agents of the kind.
        proxies: HAProxies in the kind's namespaces.
        strangers: Processes that look like agents of the kind and are not trusted.
        files: Settings files of the agent. After a takeover they are also known for a stopped agent.
        reach: Access to these files.
        options: Options in each of these files.
        state_path: State directory of the agent.
        marked: A settings file contains an option that a takeover of this kind has set.
        commands: Commands that stop and start the agent and restart imdsproxy.
        drop_in: Path of the kind's file in `conf.d/`.
        present: Text of the drop-in; `None` if it does not exist.
        source: The kind's source is enabled in the running daemon.
        nova: A Nova endpoint set is configured.
        imported: Target paths for the agent's Nova settings: YAML file and secret file.
        networks: Ids of imdsproxy's networks.
        import_error: Import error of the source's library; empty if the import succeeds or no library is needed.
        sources: Names of the running daemon's sources.
        haproxy: HAProxy's path for the agent, and a stand-in's path earlier in the agent's PATH; empty if not found.
        stand_in: Text of the file at the stand-in's path; `None` if it does not exist.
        unrouted: Namespaces in which the agent's leases lack the route to 169.254.169.254.
    """

    agents: tuple[Agent, ...] = ()
    strangers: tuple[Stranger, ...] = ()
    proxies: tuple[Proxy, ...] = ()
    files: tuple[str, ...] = ()
    reach: Reach = Reach()
    options: Sequence[Sequence[IniOption]] = ()
    state_path: str = ""
    marked: bool = False
    commands: Commands = field(default_factory=Commands)
    drop_in: str = ""
    present: str | None = None
    source: bool = False
    nova: bool = False
    imported: tuple[str, str] = ("", "")
    networks: frozenset[str] = frozenset()
    import_error: str = ""
    sources: frozenset[str] = frozenset()
    haproxy: tuple[str, str] = ("", "")
    stand_in: str | None = None
    unrouted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """Write the result of `config import --neutron` for the agent's files."""

    files: tuple[str, ...]
    settings: str
    secret: str
    reach: Reach


@dataclass(frozen=True, slots=True)
class WriteSettings:
    path: str
    text: str


@dataclass(frozen=True, slots=True)
class EditSettings:
    """Change a settings file of the agent; keep mode and owner."""

    path: str
    edit: Callable[[str], str]
    reach: Reach


@dataclass(frozen=True, slots=True)
class Restart:
    """Restart the controller to apply settings that need a start; HAProxy keeps answering."""

    command: str


@dataclass(frozen=True, slots=True)
class WaitServed:
    """Wait until imdsproxy listens in every namespace with an agent's HAProxy, and each network answers a request.

    Attributes:
        prefix: Prefix of the kind's namespace names; a network's id follows.
    """

    prefix: str


@dataclass(frozen=True, slots=True)
class EndProxies:
    """Stop the agent's HAProxies gracefully; connections not yet accepted move to imdsproxy's listener."""

    prefix: str


@dataclass(frozen=True, slots=True)
class StopAgent:
    """Stop the agent after its last HAProxy ended; a running agent starts them again.

    Attributes:
        agent: Agent to pause (SIGSTOP) during the check for HAProxies; `None` if it has no systemd unit.
    """

    command: str
    agent: Agent | None
    prefix: str


@dataclass(frozen=True, slots=True)
class StartAgent:
    command: str


@dataclass(frozen=True, slots=True)
class WaitProxies:
    """Wait until the agent's HAProxy listens in every namespace that imdsproxy serves.

    Attributes:
        port: Port of the agent's HAProxies.
    """

    prefix: str
    port: int


@dataclass(frozen=True, slots=True)
class LetGo:
    """Release the networks gracefully, as `EndProxies` does; then remove a settings file and restart imdsproxy."""

    path: str
    command: str
    prefix: str


@dataclass(frozen=True, slots=True)
class PlaceStandIn:
    """Write the stand-in to a directory that precedes HAProxy's in the agent's PATH."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class WaitStandIns:
    """Wait until the agent has started a stand-in in every namespace that imdsproxy serves."""

    prefix: str


@dataclass(frozen=True, slots=True)
class WaitRoutes:
    """Wait until the agent's leases contain the route to 169.254.169.254 in every namespace.

    Attributes:
        state_path: State directory of the agent.
    """

    prefix: str
    state_path: str


@dataclass(frozen=True, slots=True)
class RemoveStandIn:
    """Remove the program and end running stand-ins; the agent then starts HAProxies instead."""

    path: str
    prefix: str


Action: TypeAlias = (
    ImportSettings
    | WriteSettings
    | EditSettings
    | Restart
    | WaitServed
    | EndProxies
    | StopAgent
    | StartAgent
    | WaitProxies
    | LetGo
    | PlaceStandIn
    | WaitStandIns
    | WaitRoutes
    | RemoveStandIn
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan.

    Attributes:
        words: Description in the imperative, on one line.
        by_hand: Equivalent commands for an operator.
        undo: Command or text that undoes the step; empty if there is nothing to undo.
    """

    words: str
    by_hand: str
    undo: str
    action: Action


@dataclass(frozen=True, slots=True)
class Kind:
    """Kind of agent that imdsproxy replaces.

    Attributes:
        programs: Names of the agents' programs.
        prefix: Prefix of the agents' namespace names.
        source: Source of imdsproxy that this kind needs; empty for none.
        takeover: Function that yields the remaining steps of a takeover.
        handback: Function that yields the remaining steps of a handback.
        refuse: Function that yields problems that the operator must fix before a takeover.
        runs_on: The agent has other work and keeps running.
    """

    name: str
    programs: tuple[str, ...]
    prefix: str
    source: str
    takeover: Callable[[Seen], Iterator[Step]]
    handback: Callable[[Seen], Iterator[Step]]
    refuse: Callable[[Seen], Iterator[Problem]]
    runs_on: bool = False

    @property
    def mark(self) -> str:
        """Prefix of this kind's comments in an agent's settings file."""
        return mark_of(self.name)


def mark_of(kind: str) -> str:
    """Return the prefix of comments that a takeover writes into the agent's settings file."""
    return f"# imdsproxy takeover {kind}: "


def option_of(seen: Seen, section: str, name: str) -> str:
    """Return the unparsed value of an agent's option; empty if no file contains the option."""
    return find_option(seen.options, section, name)


def find_option(options: Sequence[Sequence[IniOption]], section: str, name: str) -> str:
    """Return the unparsed value of an option, the last one if repeated; empty if no file contains the option."""
    found = [
        one.value for file in options for one in file if (one.section, one.name) == (section, name)
    ]
    return found[-1] if found else ""


def restart_steps(seen: Seen) -> Iterator[Step]:
    """Restart the controller."""
    yield Step(
        "restart imdsproxy's controller; its HAProxy answers all the while",
        seen.commands.restart,
        "",
        Restart(seen.commands.restart),
    )


def settings_steps(seen: Seen, what: str, text: str) -> Iterator[Step]:
    """Write the kind's settings file if it does not exist; `what` describes its effect."""
    if seen.present is None:
        yield Step(
            f"write {seen.drop_in}: {what}",
            f"cat >{seen.drop_in}",
            f"rm {seen.drop_in}",
            WriteSettings(seen.drop_in, text),
        )


def start_steps(seen: Seen) -> Iterator[Step]:
    """Start the agent, unless it runs."""
    if not seen.agents:
        yield Step(
            "start the agent",
            seen.commands.start,
            seen.commands.stop,
            StartAgent(seen.commands.start),
        )


def wait_step(
    prefix: str, where: str = "in each network's namespace", *, port: int = METADATA_PORT
) -> Step:
    """Wait for the agent's HAProxies during a handback."""
    return Step(
        f"wait until a HAProxy of the agent's listens {where}",
        f"for each namespace {prefix}…: ip netns exec NAMESPACE ss -lntp",
        "",
        WaitProxies(prefix, port),
    )


def let_go_step(seen: Seen, words: str, kind: str, prefix: str) -> Step:
    """Release the networks to the agent: the last step of a handback."""
    return Step(
        words,
        f"rm {seen.drop_in}; {seen.commands.restart}",
        f"imdsproxy takeover {kind}",
        LetGo(seen.drop_in, seen.commands.restart, prefix),
    )


def list_pids(seen: Seen) -> str:
    """Return the pids of the agent's HAProxies, for a command line."""
    return " ".join(str(one.pid) for one in sorted(seen.proxies, key=lambda one: one.pid))


def shape_of(step: Step) -> Mapping[str, str]:
    """Return the JSON form of a step."""
    return {"step": step.words, "by_hand": step.by_hand, "undo": step.undo}


def shape_of_agent(agent: Agent) -> Mapping[str, str | int]:
    """Return the JSON form of an agent."""
    return {
        "program": agent.program,
        "pid": agent.pid,
        "user": agent.account,
        "place": agent.place,
    }
