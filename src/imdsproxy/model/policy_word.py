"""Layout of the policy word, for Python and for HAProxy's rules.

A record in HAProxy's maps begins with this word if its policy is not the default:

    +1troo-sb:2:1795697569:64

`+` and at least eight letters, then fields between colons: the token epoch (empty for the first), the end of the boot
in Unix time, and the hop limit. If any of the three limits is set, all three follow, those that are not set empty.
Other fields follow up to the last that is set:

    +1tooo---p::0:64::20::9f86d081884c7d65

Each part that HAProxy's rules read has a name here. Python reads it with `read`, HAProxy with the expression `sample`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

POLICY_WORD: Final = "+"
"""Prefix of a record with a policy word. No instance id and no other kind of record begins so."""

_VARIABLE: Final = "var(txn.policy)"


@dataclass(frozen=True, slots=True)
class Letter:
    """One character of the word, `on` or `off`; position 0 is the `+`."""

    index: int
    on: str
    off: str = "-"

    def sample(self) -> str:
        return f"{_VARIABLE},bytes({self.index},1)"

    def is_on(self, word: str) -> bool:
        """Return whether the letter is on in the word; off if the word is too short."""
        return word[self.index : self.index + 1] == self.on

    def turn_off(self, word: str) -> str:
        return word[: self.index] + self.off + word[self.index + 1 :]


@dataclass(frozen=True, slots=True)
class Field:
    """Text between colons, numbered from 1 (the `+` with the letters) as in HAProxy's converter `field`."""

    number: int

    def sample(self, word: str = _VARIABLE) -> str:
        """Return the HAProxy expression for the field, in a word that another expression gives."""
        return f"{word},field({self.number},:)"

    def read(self, word: str) -> str:
        """Return the field in a word; empty if the word is too short."""
        fields = word.split(":")
        return fields[self.number - 1] if self.number <= len(fields) else ""

    def replace(self, word: str, text: str) -> str:
        fields = word.split(":")
        fields[self.number - 1] = text
        return ":".join(fields)


Part: TypeAlias = Letter | Field

ENDPOINT: Final = Letter(1, "1", "0")
TOKEN_ROUTE: Final = Letter(2, "t")
"""HAProxy gives tokens, because a tree or path requires or allows them."""

TOKENS: Final = Letter(3, "r", "o")
OPENSTACK_TOKENS: Final = Letter(4, "r", "o")
NOCLOUD_TOKENS: Final = Letter(5, "r", "o")
FORWARDED: Final = Letter(6, "g")
SEALED: Final = Letter(7, "s")
BOOT_COUNTS: Final = Letter(8, "b")
"""A rule depends on the end of the boot."""

HAS_PATHS: Final = Letter(9, "p")
"""Path rules exist; `PATH_SET` has their set's id."""

DOCUMENT: Final = Letter(10, "d")
"""The guest may read signed documents about itself."""

EPOCH: Final = Field(2)
BOOT_END: Final = Field(3)
HOP_LIMIT: Final = Field(4)
REQUESTS_PER_S: Final = Field(5)
BURST: Final = Field(6)
CONNECTIONS: Final = Field(7)
PATH_SET: Final = Field(8)
"""Id of the set of path rules in their own map (`model.path_rules.render_set`)."""

SUBJECT: Final = Field(9)
"""Id of the instance's subject of identity tokens (`model.subject.Subject.id`); empty if it gets no tokens."""

_LETTERS: Final = BOOT_COUNTS.index
_FIELDS: Final = HOP_LIMIT.number


def render_parts(parts: Mapping[Part, str]) -> str:
    """Return the word of these parts; missing parts are off or empty."""
    letters = {part.index: text for part, text in parts.items() if isinstance(part, Letter)}
    fields = {part.number: text for part, text in parts.items() if isinstance(part, Field) and text}
    last_letter = max([_LETTERS, *(index for index, text in letters.items() if text != "-")])
    last = max(
        [_FIELDS, *(max(number, CONNECTIONS.number) for number in fields if number > _FIELDS)]
    )
    head = "".join(letters.get(index, "-") for index in range(1, last_letter + 1))
    return ":".join(
        [POLICY_WORD + head, *(fields.get(number, "") for number in range(2, last + 1))]
    )


ONLY_TOKENS_OFF: Final = f"{POLICY_WORD}1-ooo---:"
"""Prefix of a word with tokens off and defaults otherwise."""


def word_of(value: str) -> str:
    """Return the policy word of a map value (`model.wire.render_map_value`); empty if the value has none."""
    return value.partition("|")[0] if value.startswith(POLICY_WORD) else ""
