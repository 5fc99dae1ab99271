"""The layout of the policy word, for Python and for HAProxy's rules.

A record in HAProxy's maps begins with this word where its policy is not the default:

    +1troo-sb:2:1795697569:64

`+` and at least eight letters, then fields between colons: the token epoch (empty for the first), the end of the
boot in Unix time, and the hop limit. The three limits follow where one of them is set, each empty where it is not;
other fields follow up to the last one that is set:

    +1tooo---p::0:64::20::9f86d081884c7d65

A part that HAProxy's rules read has a name here. Python reads it with `read`, HAProxy with the expression `sample`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

POLICY_WORD: Final = "+"
"""How a record begins that has a policy word. No instance id and no other kind of record begins so."""

_VARIABLE: Final = "var(txn.policy)"


@dataclass(frozen=True, slots=True)
class Letter:
    """One character of the word, `on` or `off`.

    Attributes:
        index: From 0, which is the `+`.
    """

    index: int
    on: str
    off: str = "-"

    def sample(self) -> str:
        """The letter as a HAProxy expression."""
        return f"{_VARIABLE},bytes({self.index},1)"

    def is_on(self, word: str) -> bool:
        """Whether the word has it on; off where the word is shorter."""
        return word[self.index : self.index + 1] == self.on


@dataclass(frozen=True, slots=True)
class Field:
    """A text between colons.

    Attributes:
        number: From 1, which is `+` with the letters, as HAProxy's converter `field` counts.
    """

    number: int

    def sample(self, word: str = _VARIABLE) -> str:
        """The field as a HAProxy expression, of a word that another expression gives."""
        return f"{word},field({self.number},:)"

    def read(self, word: str) -> str:
        """The field in a word; empty where the word is shorter."""
        fields = word.split(":")
        return fields[self.number - 1] if self.number <= len(fields) else ""

    def replace(self, word: str, text: str) -> str:
        """The word with another text in this field, which it must have."""
        fields = word.split(":")
        fields[self.number - 1] = text
        return ":".join(fields)


Part: TypeAlias = Letter | Field

ENDPOINT: Final = Letter(1, "1", "0")
TOKEN_ROUTE: Final = Letter(2, "t")
"""Tokens are given: some tree or path takes one, or may."""

TOKENS: Final = Letter(3, "r", "o")
OPENSTACK_TOKENS: Final = Letter(4, "r", "o")
NOCLOUD_TOKENS: Final = Letter(5, "r", "o")
FORWARDED: Final = Letter(6, "g")
SEALED: Final = Letter(7, "s")
BOOT_COUNTS: Final = Letter(8, "b")
"""Something depends on the end of the boot."""

HAS_PATHS: Final = Letter(9, "p")
"""There are path rules, and `PATH_SET` names them."""

EPOCH: Final = Field(2)
BOOT_END: Final = Field(3)
HOP_LIMIT: Final = Field(4)
REQUESTS_PER_S: Final = Field(5)
BURST: Final = Field(6)
CONNECTIONS: Final = Field(7)
PATH_SET: Final = Field(8)
"""The id of the set of path rules in their own map (`core.path_rules.render_set`)."""

_LETTERS: Final = BOOT_COUNTS.index
_FIELDS: Final = HOP_LIMIT.number


def render_parts(parts: Mapping[Part, str]) -> str:
    """The word of these parts; those that are missing are off or empty."""
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
"""How a word begins where tokens are off and nothing else differs from the default."""


def word_of(value: str) -> str:
    """The policy word of a map value (`core.wire.render_map_value`); empty where it has none."""
    return value.partition("|")[0] if value.startswith(POLICY_WORD) else ""
