"""An option of an agent's that a takeover sets in its settings file, and a handback puts back: pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from imdsproxy.cli.takeover.plan import (
    EditSettings,
    Seen,
    StartAgent,
    Step,
    mark_of,
    option_of,
)
from imdsproxy.errors import Problem

_DEFAULT: Final = re.compile(r"^\[DEFAULT\][^\n]*\n", re.MULTILINE)
_FALSE: Final = frozenset({"false", "0", "no", "off"})
_TRUE: Final = frozenset({"true", "1", "yes", "on"})


@dataclass(frozen=True, slots=True)
class AgentOption:
    """An option of the section `DEFAULT`, true or false.

    Attributes:
        kind: The kind of takeover that sets it.
        value: What it is set to.
        default: What it is where no file of the agent's has it.
        reason: Why it is set: one line, beside it in the file.
    """

    kind: str
    name: str
    value: bool
    default: bool
    reason: str

    @property
    def line(self) -> str:
        """As it is written."""
        return f"{self.name} = {self.value}"

    @property
    def mark(self) -> str:
        """What a comment of ours in the file begins with."""
        return mark_of(self.kind)

    @property
    def _ours(self) -> str:
        return f"{self.mark}{self.reason}\n{self.line}\n"

    def is_set(self, seen: Seen) -> bool:
        """Whether the agent's files have that value."""
        word = option_of(seen, "DEFAULT", self.name).lower()
        found = self.default if word not in _TRUE | _FALSE else word in _TRUE
        return found == self.value

    def set_in(self, text: str) -> str:
        """The file with the option set; a line that it has of the option becomes a comment."""
        line = re.compile(rf"^(?={self.name}\s*=)", re.MULTILINE)
        kept = line.sub(self.mark, self.restore_in(text))
        at = _DEFAULT.search(kept)
        if at is None:
            return f"{kept.rstrip()}\n[DEFAULT]\n{self._ours}".lstrip()
        return kept[: at.end()] + self._ours + kept[at.end() :]

    def restore_in(self, text: str) -> str:
        """The file as it was before `set_in`."""
        return text.replace(self._ours, "").replace(f"{self.mark}{self.name}", self.name)


def set_steps(seen: Seen, option: AgentOption) -> Iterator[Step]:
    """Set it in the agent's last settings file, whose values count."""
    path = seen.files[-1]
    yield Step(
        f"set {option.line} in {path}",
        f"sed -i '/^\\[DEFAULT\\]/a {option.line}' {path}",
        f"take the line out of {path}",
        EditSettings(path, option.set_in, seen.reach),
    )


def restore_steps(seen: Seen, option: AgentOption) -> Iterator[Step]:
    """Have it in that file as it was."""
    path = seen.files[-1]
    yield Step(
        f"have {option.name} in {path} as it was",
        f"take {option.line} out of {path}",
        f"imdsproxy takeover {option.kind}",
        EditSettings(path, option.restore_in, seen.reach),
    )


def restart_agent_steps(seen: Seen, what: str) -> Iterator[Step]:
    """Have the agent read its settings; `what` says what goes on meanwhile."""
    command = _restart_command(seen)
    yield Step(f"restart the agent; {what}", command, "", StartAgent(command))


def refuse_restart(seen: Seen, program: str) -> Iterator[Problem]:
    """Why the agent's settings cannot be changed."""
    if not (seen.agents and seen.files):
        yield Problem(program, "it does not run, or has no settings file", "start it")
    elif not _restart_command(seen):
        yield Problem(
            "--start-agent",
            f"{program} (pid {seen.agents[0].pid}) has no unit of systemd",
            "--start-agent 'docker restart NAME'",
        )


def _restart_command(seen: Seen) -> str:
    unit = next((one.unit for one in seen.agents if one.unit), "")
    return f"systemctl restart {unit}" if unit else seen.commands.start
