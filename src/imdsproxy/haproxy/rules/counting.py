"""Counts of reads without session tokens, made by HAProxy: names of its tables, and parsers of their entries.

HAProxy counts reads of EC2's tree, and of any tree that requires tokens, by guests that it knows. It counts every
refused read, and a random sample of the others: one in so many. A sampled read passes through a backend of its own, so
that the other reads cost only the random choice (ADR 33). A sampled read counts as many times as the reads it
represents.

HAProxy cuts and encodes path and client, which a guest chooses, before they become a key. It examines a guest that
closely only 64 times an hour: this is half of the cost of counting, and no guest may displace the others' entries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from imdsproxy.haproxy.rules.runtime import parse_table
from imdsproxy.model.wire import ONE_IN

GUESTS_TABLE: Final = "without-token"
READERS_TABLE: Final = "without-token-readers"

# The counters of an entry. A sampled read always counts as `ONE_IN` reads, so that sums stay right if settings change.
# HAProxy 3.0 cannot add `ONE_IN` at once: its `sc-add-gpc` refuses tracking numbers above 2.
_ONE_BY_ONE, _BY_CHANCE, _REFUSED = range(3)
READS_KEPT_S: Final = 7 * 86_400

_ODD: Final = re.compile(rb"[^\w/.+:;#()-]")


@dataclass(frozen=True, slots=True)
class CountedRow:
    """Counts of one worker for one guest, or for one client program of a guest, since the entry was made.

    Attributes:
        key: Network and instance; for a client also the first three segments of the path, without the first slash, and
            its User-Agent, cut.
        reads: For a guest, reads without a token that were not refused; an estimate if only a sample is counted. For a
            client, closely examined requests.
        refused: Reads refused because a token is required; for a client, part of `reads`.
        age_s: Seconds since the last of these reads.
    """

    key: tuple[str, ...]
    reads: int
    refused: int
    age_s: float

    def plus(self, other: CountedRow) -> CountedRow:
        age_s = min(self.age_s, other.age_s)
        reads, refused = self.reads + other.reads, self.refused + other.refused
        return CountedRow(self.key, reads, refused, age_s)


def read_counter(one_in: int) -> int:
    return _ONE_BY_ONE if one_in == 1 else _BY_CHANCE


def parse_guests(text: str) -> list[CountedRow]:
    """Parse the answer of `show table` for `GUESTS_TABLE`; skip invalid lines."""
    return [
        CountedRow(names, one_by_one + ONE_IN * by_chance, refused, age_s)
        for names, (one_by_one, by_chance, refused), age_s in _entries(text, 2)
    ]


def parse_readers(text: str) -> list[CountedRow]:
    """Parse the answer of `show table` for `READERS_TABLE`; skip invalid lines."""
    return [
        CountedRow((*names[:2], *map(_harmless, names[2:])), sum(counts), counts[_REFUSED], age_s)
        for names, counts, age_s in _entries(text, 4)
    ]


def _harmless(encoded: str) -> str:
    """Decode text and replace all characters that are unsafe in a terminal or in JSON."""
    return _ODD.sub(b"_", unquote_to_bytes(encoded)).decode("ascii")


def _entries(
    text: str, parts: int
) -> Iterator[tuple[tuple[str, ...], tuple[int, int, int], float]]:
    """Yield the parts of each key; the reads counted singly, by sample, and refused; the age in seconds."""
    for key, numbers in parse_table(text):
        names = tuple(key.split("|"))
        if len(names) == parts and "exp" in numbers:
            counts = (numbers.get("gpc0", 0), numbers.get("gpc1", 0), numbers.get("gpc2", 0))
            yield names, counts, max(0.0, READS_KEPT_S - numbers["exp"] / 1000)
