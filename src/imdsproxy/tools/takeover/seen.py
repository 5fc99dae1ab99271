"""Observed state that a takeover's steps are computed from. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from imdsproxy.config.neutron_ini import IniOption


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
class Suspect:
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
        suspects: Processes that look like agents of the kind and are not trusted.
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
    suspects: tuple[Suspect, ...] = ()
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
class Kind:
    """Kind of agent that imdsproxy replaces.

    Attributes:
        programs: Names of the agents' programs.
        prefix: Prefix of the agents' namespace names.
        source: Source of imdsproxy that this kind needs; empty for none.
        runs_on: The agent has other work and keeps running.
    """

    name: str
    programs: tuple[str, ...]
    prefix: str
    source: str
    runs_on: bool = field(default=False, kw_only=True)

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


def list_pids(seen: Seen) -> str:
    """Return the pids of the agent's HAProxies, for a command line."""
    return " ".join(str(one.pid) for one in sorted(seen.proxies, key=lambda one: one.pid))


def shape_of_agent(agent: Agent) -> Mapping[str, str | int]:
    """Return the JSON form of an agent."""
    return {
        "program": agent.program,
        "pid": agent.pid,
        "user": agent.account,
        "place": agent.place,
    }
