"""Observed state that a takeover's steps are computed from; the agent's option, and its idle HAProxy. Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from imdsproxy.config.neutron_ini import IniOption
from imdsproxy.errors import Problem


@dataclass(frozen=True, slots=True)
class Reach:
    """Access to an agent's files: their root directory, and the allowed owners beside root.

    `root`: root directory of the agent's container, as seen from the host; `/` without a container.
    """

    root: str = "/"
    user: int = 0
    group: int = 0


@dataclass(frozen=True, slots=True)
class Agent:
    """Running Neutron agent.

    Attributes:
        unit: Systemd unit; empty without one, as in a container.
        files: Settings files in the order of the command line, as paths on the host.
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
    """Process with an agent's command line that is not trusted."""

    pid: int
    program: str
    reason: str


@dataclass(frozen=True, slots=True)
class Proxy:
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
        files: Settings files of the agent. After a takeover they are also known for a stopped agent.
        marked: A settings file contains an option that a takeover of this kind has set.
        drop_in: Path of the kind's file in `conf.d/`.
        present: Text of the drop-in; `None` if it does not exist.
        source: The kind's source is enabled in the running daemon.
        imported: Target paths for the agent's Nova settings: YAML file and secret file.
        import_error: Import error of the source's library; empty if the import succeeds or no library is needed.
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


def shape_of_agent(agent: Agent) -> Mapping[str, str | int]:
    return {
        "program": agent.program,
        "pid": agent.pid,
        "user": agent.account,
        "place": agent.place,
    }


_DEFAULT: Final = re.compile(r"^\[DEFAULT\][^\n]*\n", re.MULTILINE)
_FALSE: Final = frozenset({"false", "0", "no", "off"})
_TRUE: Final = frozenset({"true", "1", "yes", "on"})


@dataclass(frozen=True, slots=True)
class AgentOption:
    """Boolean option of the section `DEFAULT`.

    Attributes:
        default: Neutron's default, if no file contains the option.
        reason: Reason for the value, written as a comment of one line above the option.
    """

    kind: str
    name: str
    value: bool
    default: bool
    reason: str

    @property
    def line(self) -> str:
        return f"{self.name} = {self.value}"

    @property
    def mark(self) -> str:
        return mark_of(self.kind)

    @property
    def _ours(self) -> str:
        return f"{self.mark}{self.reason}\n{self.line}\n"

    def is_set(self, seen: Seen) -> bool:
        word = option_of(seen, "DEFAULT", self.name).lower()
        found = self.default if word not in _TRUE | _FALSE else word in _TRUE
        return found == self.value

    def set_in(self, text: str) -> str:
        """Return the file's text with the option set; lines that set the option before become comments."""
        line = re.compile(rf"^(?={self.name}\s*=)", re.MULTILINE)
        kept = line.sub(self.mark, self.restore_in(text))
        at = _DEFAULT.search(kept)
        if at is None:
            return f"{kept.rstrip()}\n[DEFAULT]\n{self._ours}".lstrip()
        return kept[: at.end()] + self._ours + kept[at.end() :]

    def restore_in(self, text: str) -> str:
        return text.replace(self._ours, "").replace(f"{self.mark}{self.name}", self.name)


def refuse_restart(seen: Seen, program: str) -> Iterator[Problem]:
    if not (seen.agents and seen.files):
        yield Problem(program, "the agent does not run, or has no settings file", "start the agent")
    elif not restart_command(seen):
        yield Problem(
            "--start-agent",
            f"{program} (pid {seen.agents[0].pid}) has no systemd unit",
            "name the command, as --start-agent 'docker restart NAME'",
        )


def restart_command(seen: Seen) -> str:
    """Return the command that restarts the agent; empty if not known."""
    unit = next((one.unit for one in seen.agents if one.unit), "")
    return f"systemctl restart {unit}" if unit else seen.commands.start


STAND_IN: Final = "imdsproxy-for-haproxy"
"""First word of a stand-in's command line."""

_MARK: Final = "# Made by `imdsproxy takeover dhcp`; `imdsproxy handback dhcp` removes it."


def is_stand_in(text: str) -> bool:
    return _MARK in text


def render_stand_in(haproxy: str) -> str:
    """Render the program that the DHCP agent finds before HAProxy in its PATH.

    Neutron's `ProcessManager` (neutron/agent/linux/external_process.py) runs the command and waits until it ends: a
    proxy must daemonize. It then reads the pid file, and restarts the proxy unless that process's command line contains
    the network's id, which is part of the configuration's path. It ends the proxy by a signal to that pid.
    """
    return f"""\
#!/bin/bash
{_MARK}
# For Neutron's DHCP agent, whose networks imdsproxy serves: a process that does nothing. All else is HAProxy.
if [[ $1 == -f && $2 == */ns-metadata-proxy/*.conf ]] && grep -q '^ *bind 169\\.254\\.169\\.254:80$' "$2"; then
    pid_file=$(sed -n 's/^ *pidfile  *//p' "$2")
    [[ -n $pid_file ]] || exit 1
    setsid bash -c 'echo $$ >"$1" && exec -a "$3 $2" sleep infinity' bash "$pid_file" "$2" {STAND_IN} \\
        </dev/null >/dev/null 2>&1 &
    exit 0
fi
exec {haproxy} "$@"
"""
