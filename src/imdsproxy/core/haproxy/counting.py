"""Who reads without session tokens, counted by HAProxy: its rules, its tables, and what they say read into values.

Counted are reads of EC2's tree, and of any tree that requires tokens, by guests that HAProxy knows: those that are
refused for it each, of the others one in so many by chance. That one goes by a backend of its own, so that the rest
pay for no more than the throw (ADR 33). It counts for as many as it stands for.

What a guest chooses, path and client, is cut and encoded before it becomes a key, and a guest is looked at so closely
`CLOSE_LOOKS` times an hour: it costs half of counting, and none drives the others out of the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from imdsproxy.core.haproxy.rules import KNOWN, NOVA, READS, negated
from imdsproxy.core.haproxy.section import Section, Words
from imdsproxy.core.wire import HEADER_OPERATOR

__all__ = [
    "COUNTED",
    "GUESTS_TABLE",
    "ONE_IN",
    "READERS_TABLE",
    "SAMPLED",
    "STICK_COUNTERS",
    "GuestRow",
    "ReaderRow",
    "count_in_passing",
    "count_sampled",
    "counting_tables",
    "hear_operator",
    "parse_guests",
    "parse_readers",
    "sample_reads",
    "thrown",
]

GUESTS_TABLE: Final = "without-token"
READERS_TABLE: Final = "without-token-readers"

ONE_IN: Final = 20
"""Of so many reads one is counted where a sample is enough: of a boot, which is 100 reads, with 99.4 %."""

CLOSE_LOOKS: Final = 64

COUNTED: Final = ".counted"
"""How the name of a backend ends that counts a read (`count_sampled`) before it does what the other one does."""

SAMPLED: Final = ("{", "var(txn.asked)", "-m", "str", "sampled", "}")
"""It is to be counted, and there is nothing else to look at."""

STICK_COUNTERS: Final = 5
"""HAProxy has three for each request if nothing is said; other rules have those."""

_GUEST, _READER = 3, 4

# The counters of an entry. A read that was chosen by chance stands for `ONE_IN`, so that sums stay right when settings
# change; HAProxy 3.0 could add that at once, but takes no `sc-add-gpc` for a number above 2 of what it tracks.
_ONE_BY_ONE, _BY_CHANCE, _REFUSED, _LOOKS = range(4)
_KEPT_S: Final = 7 * 86_400
_LONGEST_ID: Final = 64
_LONGEST_PATH: Final = 48
_LONGEST_CLIENT: Final = 64

_READER_KEY: Final = "|".join(
    (
        "%[var(sess.network)]",
        "%[var(txn.instance)]",
        f"%[path,field(2,/,3),bytes(0,{_LONGEST_PATH}),url_enc]",
        f"%[req.fhdr(user-agent),bytes(0,{_LONGEST_CLIENT}),url_enc]",
    )
)

_BARE: Final = ("{", "var(txn.bare)", "-m", "found", "}")
_UNMET: Final = ("{", "var(txn.unmet)", "-m", "found", "}")
_NO_TOKEN: Final = ("!{", "var(txn.left)", "-m", "found", "}")
_EC2: Final = ("!{", "path_beg", "/openstack", "/nocloud", "}")
_OF_AN_OPERATOR: Final = ("{", "var(txn.by_operator)", "-m", "found", "}")

_ODD: Final = re.compile(rb"[^\w/.+:;#()-]")
_LINE: Final = re.compile(r"^0x[0-9a-f]+: key=((?:\\.|[^ \\])*) .*?\bexp=(\d+) (.*)$")
_COUNTER: Final = re.compile(r"\bgpc(\d)=(\d+)")


@dataclass(frozen=True, slots=True)
class GuestRow:
    """What one worker has counted of one guest since the entry was made.

    Attributes:
        reads: Without a token, and not refused for it; where one in so many is counted, an estimate.
        refused: Because a token is required.
        age_s: Seconds since the last of them.
    """

    network: str
    instance: str
    reads: int
    refused: int
    age_s: float


@dataclass(frozen=True, slots=True)
class ReaderRow:
    """One client of a guest at one branch of a tree, as often as it was looked at closely.

    Attributes:
        path: The first three segments, without the first slash.
        client: Its User-Agent, cut.
        looks: All of them.
        refused: So many of these were refused.
    """

    network: str
    instance: str
    path: str
    client: str
    looks: int
    refused: int
    age_s: float


def counting_tables() -> tuple[Section, ...]:
    """Where HAProxy counts: full, it forgets who was seen longest ago; and all of it with the worker."""
    guest = 2 * _LONGEST_ID + 1
    # A letter that is encoded takes three.
    reader = guest + 3 * (_LONGEST_PATH + _LONGEST_CLIENT) + 2
    return (
        _table(GUESTS_TABLE, guest, "50k", f"gpc({_LOOKS + 1}),gpc_rate({_LOOKS + 1},1h)"),
        _table(READERS_TABLE, reader, "10k", f"gpc({_REFUSED + 1})"),
    )


def _table(name: str, length: int, size: str, stored: str) -> Section:
    table = ("stick-table", "type", "string", "len", str(length), "size", size)
    return Section(("backend", name), ((*table, "expire", f"{_KEPT_S}s", "store", stored),))


def hear_operator() -> Words:
    """Where requests come from the controller: an operator's among them is no read of the guest's."""
    told = ("{", f"req.fhdr({HEADER_OPERATOR})", "-m", "found", "}")
    return ("http-request", "set-var(txn.by_operator)", "bool(true)", "if", *told)


def sample_reads(
    one_in: int, asked: Words, *, chosen: Words = (), found: bool = False
) -> tuple[Words, ...]:
    """In a frontend, once it is known what there is to look at of a request: which of the rest are counted.

    Args:
        one_in: Of so many reads; 0 for none.
        asked: The condition that a guarded backend takes the request.
        chosen: The condition that chance has chosen it before.
        found: It is the resolver's frontend, where operators are among the guests.
    """
    if not one_in:
        return ()
    of_guests = negated(_OF_AN_OPERATOR) if found else ()
    counts = (*negated(asked), *_NO_TOKEN, *KNOWN, *READS, *_EC2, *of_guests)
    # The throw comes first: it is all that most requests pay for.
    return tuple(
        ("http-request", "set-var(txn.asked)", "str(sampled)", "if", *chance, *counts)
        for chance in (thrown(one_in), *((chosen,) if chosen and one_in > 1 else ()))
    )


def count_sampled(one_in: int, *, nova: bool) -> tuple[Words, ...]:
    """First in the backend of what `sample_reads` has chosen, which is all counted; its record is of Nova, or not."""
    reads = _ONE_BY_ONE if one_in == 1 else _BY_CHANCE
    return (
        ("http-request", "set-var(txn.instance)", f"var(txn.record),field({3 if nova else 1},|)"),
        *_track(),
        *_count(reads),
    )


def count_in_passing(one_in: int, *required: Words) -> tuple[Words, ...]:
    """In a guarded backend, after tokens are checked and `txn.unmet` is set where one is required.

    Args:
        one_in: Of so many reads that are not refused one is counted; 0 for none.
        required: Conditions, each of which makes a read count, whatever tree it is of.
    """
    bare: Words = ("http-request", "set-var(txn.bare)", "bool(true)", "if")
    passing = (*thrown(one_in), *_NO_TOKEN, *READS)
    sampled = ((*KNOWN, *_EC2), *required) if one_in else ()
    met = negated(_UNMET)
    return (
        *((*bare, *passing, *one) for one in sampled),
        (*bare, *_UNMET, *READS),
        ("http-request", "unset-var(txn.bare)", "if", *_OF_AN_OPERATOR),
        ("http-request", "set-var(txn.instance)", "var(txn.record),field(1,|)", "if", *_BARE),
        ("http-request", "set-var(txn.instance)", "var(txn.record),field(3,|)", "if", *_BARE, *NOVA),
        *_track(_BARE),
        *(_count(_ONE_BY_ONE if one_in == 1 else _BY_CHANCE, met) if one_in else ()),
        *_count(_REFUSED, _UNMET),
    )  # fmt: skip


def thrown(one_in: int) -> Words:
    """That chance has chosen a request, one of so many."""
    return () if one_in == 1 else ("{", f"rand({one_in})", "0", "}")


def _track(condition: Words = ()) -> tuple[Words, ...]:
    """Find or make the entries of a request; the one of its reader if the guest is looked at closely."""
    only = ("if", *condition) if condition else ()
    return (
        ("http-request", f"track-sc{_GUEST}", "var(sess.network),concat(|,txn.instance)",
         "table", GUESTS_TABLE, *only),
        # What is not tracked is not counted, nor is its rate below anything.
        ("http-request", "set-var-fmt(txn.reader)", _READER_KEY,
         "if", "{", f"sc_gpc_rate({_LOOKS},{_GUEST})", "lt", str(CLOSE_LOOKS), "}"),
        ("http-request", f"track-sc{_READER}", "var(txn.reader)", "table", READERS_TABLE),
        ("http-request", f"sc-inc-gpc({_LOOKS},{_GUEST})", "if", "{", "var(txn.reader)", "-m", "found", "}"),
    )  # fmt: skip


def _count(kind: int, condition: Words = ()) -> tuple[Words, ...]:
    only = ("if", *condition) if condition else ()
    return tuple(
        ("http-request", f"sc-inc-gpc({kind},{tracked})", *only) for tracked in (_GUEST, _READER)
    )


def parse_guests(text: str) -> list[GuestRow]:
    """The answer of `show table` of `GUESTS_TABLE`; lines that are none are left out."""
    return [
        GuestRow(network, instance, one_by_one + ONE_IN * by_chance, refused, age_s)
        for (network, instance), (one_by_one, by_chance, refused), age_s in _entries(text, 2)
    ]


def parse_readers(text: str) -> list[ReaderRow]:
    """The answer of `show table` of `READERS_TABLE`; lines that are none are left out."""
    return [
        ReaderRow(network, instance, _harmless(path), _harmless(client), sum(counts), counts[_REFUSED], age_s)
        for (network, instance, path, client), counts, age_s in _entries(text, 4)
    ]  # fmt: skip


def _harmless(encoded: str) -> str:
    """No terminal and no JSON sees anything else than these letters."""
    return _ODD.sub(b"_", unquote_to_bytes(encoded)).decode("ascii")


def _entries(text: str, parts: int) -> Iterator[tuple[list[str], tuple[int, int, int], float]]:
    """The parts of each key; reads counted one by one, by chance, and refused; the age in seconds."""
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        key = re.sub(r"\\(.)", r"\1", found[1]).split("|")
        if len(key) != parts:
            continue
        counted = {int(kind): int(number) for kind, number in _COUNTER.findall(found[3])}
        counts = (counted.get(_ONE_BY_ONE, 0), counted.get(_BY_CHANCE, 0), counted.get(_REFUSED, 0))
        yield key, counts, max(0.0, _KEPT_S - int(found[2]) / 1000)
