"""What is to be done so that imdsproxy serves in the place of Neutron's agents, and back: pure.

The order of a takeover loses no request: imdsproxy listens beside the agent's HAProxies and answers, then these end
softly one by one, and only then the agent is stopped, which would start them again. Handing back is the reverse.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from imdsproxy.core.model import METADATA_PORT
from imdsproxy.core.neutron_ini import IniOption
from imdsproxy.errors import Problem


@dataclass(frozen=True, slots=True)
class Reach:
    """How an agent's files are reached, and who may own them beside root.

    Attributes:
        root: The root directory of the agent's container, as it is reached from here; `/` without one.
        user: The agent's user.
        group: The agent's group.
    """

    root: str = "/"
    user: int = 0
    group: int = 0


@dataclass(frozen=True, slots=True)
class Agent:
    """A running agent of Neutron's.

    Attributes:
        program: Its name, as `neutron-ovn-metadata-agent`.
        unit: Its unit of systemd; empty where it has none, as in a container.
        files: Its settings files in the order in which it was given them, as they are reached from here.
        account: The name of its user.
        place: What it belongs to: its unit, or its container.
        started: When it was started: with the pid, the identity of a process.
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
    """A process with an agent's command line that is not believed.

    Attributes:
        program: The agent that it says it is.
        reason: Why it is not believed.
    """

    pid: int
    program: str
    reason: str


@dataclass(frozen=True, slots=True)
class Proxy:
    """A HAProxy that an agent keeps in a namespace."""

    pid: int
    namespace: str


@dataclass(frozen=True, slots=True)
class Commands:
    """How agent and imdsproxy are stopped and started, each a command line for a shell; empty where it is not known."""

    stop: str = ""
    start: str = ""
    restart: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is on this host.

    Attributes:
        agents: Those of the kind that run.
        proxies: HAProxies in the kind's namespaces.
        strangers: Processes that look like agents of the kind, and are not believed.
        files: The agent's settings files; also of one that does not run, once there was a takeover.
        reach: How these files are reached.
        options: What each of these files holds.
        state_path: The agent's directory.
        marked: One of them has what a takeover of this kind has set.
        commands: By which agent and imdsproxy are stopped and started.
        drop_in: The kind's file in `conf.d/`.
        present: Its text; `None` where there is none.
        source: The kind's source is enabled in the running daemon.
        nova: An endpoint set of Nova is configured.
        imported: Where the agent's settings for Nova are written to: the YAML file and the secret's.
        networks: Ids of the networks that imdsproxy has.
        import_error: Why the source's library cannot be imported; empty where it can, or none is needed.
        sources: Names of the sources that the running daemon has.
        haproxy: Where the agent finds HAProxy, and where it would find a stand-in first; empty where not.
        stand_in: What is there; `None` where nothing is.
        unrouted: Namespaces in which the agent gives leases that name no route to 169.254.169.254.
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
    """Write what `config import --neutron` makes of the agent's files."""

    files: tuple[str, ...]
    settings: str
    secret: str
    reach: Reach


@dataclass(frozen=True, slots=True)
class WriteSettings:
    """Write a settings file."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class EditSettings:
    """Change a settings file of the agent's; what it is for other programs (mode, owner) stays."""

    path: str
    edit: Callable[[str], str]
    reach: Reach


@dataclass(frozen=True, slots=True)
class Restart:
    """Have the controller read settings that need a start; HAProxy answers all the while."""

    command: str


@dataclass(frozen=True, slots=True)
class WaitServed:
    """Wait until imdsproxy listens in the network of each of the agent's HAProxies, and a request is answered there.

    Attributes:
        prefix: What the names of the kind's namespaces begin with; a network's id follows.
    """

    prefix: str


@dataclass(frozen=True, slots=True)
class EndProxies:
    """End the agent's HAProxies softly: connections that wait to be accepted come to imdsproxy's listener."""

    prefix: str


@dataclass(frozen=True, slots=True)
class StopAgent:
    """Stop the agent, once none of its HAProxies is there; it would start them again.

    Attributes:
        agent: Held still while that is looked at, where a unit is stopped; `None` for a command of the operator's.
    """

    command: str
    agent: Agent | None
    prefix: str


@dataclass(frozen=True, slots=True)
class StartAgent:
    """Start the agent."""

    command: str


@dataclass(frozen=True, slots=True)
class WaitProxies:
    """Wait until a HAProxy of the agent's listens in each namespace in which imdsproxy does.

    Attributes:
        port: Where it listens in routers' namespaces.
    """

    prefix: str
    port: int


@dataclass(frozen=True, slots=True)
class LetGo:
    """Have imdsproxy listen there no more, softly, as `EndProxies`; then remove a settings file and restart it."""

    path: str
    command: str
    prefix: str


@dataclass(frozen=True, slots=True)
class PlaceStandIn:
    """Write the program that an agent finds before HAProxy."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class WaitStandIns:
    """Wait until the agent has started a stand-in in each namespace in which imdsproxy listens."""

    prefix: str


@dataclass(frozen=True, slots=True)
class WaitRoutes:
    """Wait until the agent names the route to 169.254.169.254 in leases of each namespace.

    Attributes:
        state_path: The agent's directory.
    """

    prefix: str
    state_path: str


@dataclass(frozen=True, slots=True)
class RemoveStandIn:
    """Remove the program, and end the stand-ins that run: the agent starts HAProxies in their places."""

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
        words: What is done, in the imperative, on one line.
        by_hand: How an operator would do it.
        undo: How it is undone; empty where there is nothing to undo.
    """

    words: str
    by_hand: str
    undo: str
    action: Action


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of agent whose place imdsproxy takes.

    Attributes:
        programs: Names of the agents' programs.
        prefix: What the names of their namespaces begin with.
        source: The source of imdsproxy's that this kind needs; empty for none.
        takeover: The steps, none where all is done.
        handback: The same for the way back.
        refuse: What has to be mended by the operator before a takeover.
        runs_on: The agent has other work and is not stopped.
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
        """How a settings file of the agent's shows that a takeover has changed it."""
        return mark_of(self.name)


def mark_of(kind: str) -> str:
    """What comments begin with that a takeover of a kind makes in a settings file of the agent's."""
    return f"# imdsproxy takeover {kind}: "


def option_of(seen: Seen, section: str, name: str) -> str:
    """The value of an agent's option as it is written; empty where no file has it."""
    return find_option(seen.options, section, name)


def find_option(options: Sequence[Sequence[IniOption]], section: str, name: str) -> str:
    """The same of what the files hold."""
    found = [
        one.value for file in options for one in file if (one.section, one.name) == (section, name)
    ]
    return found[-1] if found else ""


def restart_steps(seen: Seen) -> Iterator[Step]:
    """Have the controller start again, where its settings are to be read anew."""
    yield Step(
        "restart imdsproxy's controller; its HAProxy answers all the while",
        seen.commands.restart,
        "",
        Restart(seen.commands.restart),
    )


def settings_steps(seen: Seen, what: str, text: str) -> Iterator[Step]:
    """Write the kind's settings file, unless there is one; `what` says what it does."""
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
    """Wait for the agent's HAProxies, on the way back."""
    return Step(
        f"wait until a HAProxy of the agent's listens {where}",
        f"for each namespace {prefix}…: ip netns exec NAMESPACE ss -lntp",
        "",
        WaitProxies(prefix, port),
    )


def let_go_step(seen: Seen, words: str, kind: str, prefix: str) -> Step:
    """Leave the networks to the agent: the last step of the way back."""
    return Step(
        words,
        f"rm {seen.drop_in}; {seen.commands.restart}",
        f"imdsproxy takeover {kind}",
        LetGo(seen.drop_in, seen.commands.restart, prefix),
    )


def list_pids(seen: Seen) -> str:
    """The agent's HAProxies, for a command line."""
    return " ".join(str(one.pid) for one in sorted(seen.proxies, key=lambda one: one.pid))


def shape_of(step: Step) -> Mapping[str, str]:
    """A step as JSON has it."""
    return {"step": step.words, "by_hand": step.by_hand, "undo": step.undo}


def shape_of_agent(agent: Agent) -> Mapping[str, str | int]:
    """An agent as JSON has it."""
    return {
        "program": agent.program,
        "pid": agent.pid,
        "user": agent.account,
        "place": agent.place,
    }
