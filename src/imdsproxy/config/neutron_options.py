"""Options of Neutron's metadata path, with their accepted values and translations (neutron_options.yaml)."""

import re
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import Final

import yaml
from pydantic import TypeAdapter

NOVA: Final = "Nova"
TRUE_WORDS: Final = frozenset({"true", "1", "on", "yes"})
_PATTERNS: Final = {
    "anything": r".*",
    "a text on one line": r"[^\n]*",
    "a list with commas": r".*",
    "a number": r"([0-9]+(\.[0-9]+)?)?",
    "true or false": r"(?i:true|1|on|yes|false|0|off|no)",
    "4, 6 or both with a comma": r"\s*[46]\s*(,\s*[46]\s*)*",
}
_INTEGER: Final = re.compile(r"an integer from (\d+)(?: to (\d+)| on)")


class Fate(StrEnum):
    """Outcome of an option's translation."""

    TAKEN = "taken over"
    BY_HAND = "by hand"
    """imdsproxy needs the option, and cannot translate it."""
    NONE = "no equivalent"


@dataclass(frozen=True, slots=True, kw_only=True)
class NeutronOption:
    """One option.

    Attributes:
        takes: A key of `_PATTERNS`, `one of A, B`, `an integer from N on` or `an integer from N to M`.
        unless: Value with which the option needs no work by hand.
        why: Reason for the missing equivalent, or description of the translation.
        deprecated: Its older names, `(section, name)`.
    """

    whose: str
    section: str
    name: str
    default: str = ""
    takes: str = "a text on one line"
    fate: Fate
    becomes: str = ""
    unless: bool | None = None
    why: str
    deprecated: tuple[tuple[str, str], ...] = ()
    secret: bool = False

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """Names in a parsed file as `(section, name)`, the current name first."""
        every = ((self.section, self.name), *self.deprecated)
        return tuple((one if one == "DEFAULT" else one.lower(), name) for one, name in every)

    def accepts(self, value: str) -> bool:
        """Return whether Neutron starts with this value; an empty number counts as absent."""
        if found := _INTEGER.fullmatch(self.takes):
            low, high = int(found[1]), int(found[2] or 10**18)
            digits = re.fullmatch(r"[-+]?[0-9]{1,18}", value, re.ASCII)
            return not value or (digits is not None and low <= int(value) <= high)
        if self.takes.startswith("one of "):
            return value in self.takes.removeprefix("one of ").split(", ")
        return re.fullmatch(_PATTERNS[self.takes], value, re.ASCII | re.DOTALL) is not None


NEUTRON_OPTIONS: Final = TypeAdapter(tuple[NeutronOption, ...]).validate_python(
    yaml.load(
        files("imdsproxy.config").joinpath("neutron_options.yaml").read_text("utf-8"),
        Loader=yaml.CSafeLoader,
    )
)
"""All options, each once."""
