"""Agent option that a takeover sets in the agent's settings file and a handback restores. Pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from imdsproxy.errors import Problem
from imdsproxy.tools.takeover.seen import Seen, mark_of, option_of

_DEFAULT: Final = re.compile(r"^\[DEFAULT\][^\n]*\n", re.MULTILINE)
_FALSE: Final = frozenset({"false", "0", "no", "off"})
_TRUE: Final = frozenset({"true", "1", "yes", "on"})


@dataclass(frozen=True, slots=True)
class AgentOption:
    """Boolean option of the section `DEFAULT`.

    Attributes:
        kind: Kind of takeover that sets the option.
        value: Value during a takeover.
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
        """Line of the option in a settings file."""
        return f"{self.name} = {self.value}"

    @property
    def mark(self) -> str:
        """Prefix of this kind's comments in a settings file."""
        return mark_of(self.kind)

    @property
    def _ours(self) -> str:
        return f"{self.mark}{self.reason}\n{self.line}\n"

    def is_set(self, seen: Seen) -> bool:
        """Return whether the option already has the takeover's value."""
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
        """Return the file's text from before `set_in`."""
        return text.replace(self._ours, "").replace(f"{self.mark}{self.name}", self.name)


def refuse_restart(seen: Seen, program: str) -> Iterator[Problem]:
    """Yield the reasons why the agent cannot be reconfigured."""
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
