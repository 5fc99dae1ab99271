"""Who reads without session tokens, counted by HAProxy: its rules, its tables, and what they say read into values.

Counted are reads of EC2's tree, and of any tree that requires tokens, by guests that HAProxy knows: those that are
refused for it each, of the others one in so many by chance. That one goes by a backend of its own, so that the rest
pay for no more than the throw (ADR 33). It counts for as many as it stands for.

What a guest chooses, path and client, is cut and encoded before it becomes a key, and a guest is looked at so closely
64 times an hour: it costs half of counting, and none drives the others out of the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from imdsproxy.core.haproxy.runtime import parse_table

GUESTS_TABLE: Final = "without-token"
READERS_TABLE: Final = "without-token-readers"

ONE_IN: Final = 20
"""Of so many reads one is counted where a sample is enough: of a boot, which is 100 reads, with 99.4 %."""

# The counters of an entry. A read that was chosen by chance stands for `ONE_IN`, so that sums stay right when settings
# change; HAProxy 3.0 could add that at once, but takes no `sc-add-gpc` for a number above 2 of what it tracks.
_ONE_BY_ONE, _BY_CHANCE, _REFUSED = range(3)
READS_KEPT_S: Final = 7 * 86_400

_ODD: Final = re.compile(rb"[^\w/.+:;#()-]")


@dataclass(frozen=True, slots=True)
class CountedRow:
    """What one worker has counted of one guest, or of one client of a guest, since the entry was made.

    Attributes:
        key: Network and instance; of a client also the first three segments of the path, without the first slash, and
            its User-Agent, cut.
        reads: Of a guest those without a token that were not refused for it; where one in so many is counted, an
            estimate. Of a client how often it was looked at closely.
        refused: Because a token is required; of a client, so many of its reads.
        age_s: Seconds since the last of them.
    """

    key: tuple[str, ...]
    reads: int
    refused: int
    age_s: float

    def plus(self, other: CountedRow) -> CountedRow:
        """Both, for one key."""
        age_s = min(self.age_s, other.age_s)
        reads, refused = self.reads + other.reads, self.refused + other.refused
        return CountedRow(self.key, reads, refused, age_s)


def read_counter(one_in: int) -> int:
    """The counter of an entry that a read goes to, where one in so many is counted."""
    return _ONE_BY_ONE if one_in == 1 else _BY_CHANCE


def parse_guests(text: str) -> list[CountedRow]:
    """The answer of `show table` of `GUESTS_TABLE`; lines that are none are left out."""
    return [
        CountedRow(names, one_by_one + ONE_IN * by_chance, refused, age_s)
        for names, (one_by_one, by_chance, refused), age_s in _entries(text, 2)
    ]


def parse_readers(text: str) -> list[CountedRow]:
    """The answer of `show table` of `READERS_TABLE`; lines that are none are left out."""
    return [
        CountedRow((*names[:2], *map(_harmless, names[2:])), sum(counts), counts[_REFUSED], age_s)
        for names, counts, age_s in _entries(text, 4)
    ]


def _harmless(encoded: str) -> str:
    """No terminal and no JSON sees anything else than these letters."""
    return _ODD.sub(b"_", unquote_to_bytes(encoded)).decode("ascii")


def _entries(
    text: str, parts: int
) -> Iterator[tuple[tuple[str, ...], tuple[int, int, int], float]]:
    """The parts of each key; reads counted one by one, by chance, and refused; the age in seconds."""
    for key, numbers in parse_table(text):
        names = tuple(key.split("|"))
        if len(names) == parts and "exp" in numbers:
            counts = (numbers.get("gpc0", 0), numbers.get("gpc1", 0), numbers.get("gpc2", 0))
            yield names, counts, max(0.0, READS_KEPT_S - numbers["exp"] / 1000)
