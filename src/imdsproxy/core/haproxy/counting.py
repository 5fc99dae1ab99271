"""Who reads without session tokens, counted by HAProxy: its rules, its tables, and what they say read into values.

Counted are reads of EC2's tree, and of any tree that requires tokens, by guests that HAProxy knows: those that are
refused for it each, of the others the first of each connection and one in `SAMPLE` after. Each of them would cost a
request out of the cache a quarter of its instructions (ADR 33).

What a guest chooses is cut and has its odd letters replaced before it becomes a key. A guest is looked at closely
(path and client) `CLOSE_LOOKS` times an hour and one time in `CLOSE_SAMPLE` after, and brings `NEW_READERS` new keys an
hour, so that none drives the others' out of the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.haproxy.rules import KNOWN, NOVA, negated
from imdsproxy.core.haproxy.section import Section, Words
from imdsproxy.core.wire import HEADER_OPERATOR

__all__ = [
    "GUESTS_TABLE",
    "READERS_TABLE",
    "SAMPLE",
    "STICK_COUNTERS",
    "GuestRow",
    "ReaderRow",
    "counting_rules",
    "counting_tables",
    "hear_operator",
    "parse_guests",
    "parse_readers",
]

GUESTS_TABLE: Final = "without-token"
READERS_TABLE: Final = "without-token-readers"

SAMPLE: Final = 64
CLOSE_LOOKS: Final = 64
CLOSE_SAMPLE: Final = 16
NEW_READERS: Final = 64

STICK_COUNTERS: Final = 5
"""HAProxy has three for each request if nothing is said; other rules have those."""

_GUEST, _READER = 3, 4
_KEPT_S: Final = 7 * 86_400
_LONGEST_ID: Final = 64
_LONGEST_PATH: Final = 48
_LONGEST_CLIENT: Final = 64

_HARMLESS: Final = r'regsub("(?!\w|/|\.|\+|:|;|#|-|\(|\)).",_,g)'
"""Without brackets: HAProxy takes the first `]` for the end of a log format's expression."""

_READER_KEY: Final = "|".join(
    (
        "%[var(sess.network)]",
        "%[var(txn.instance)]",
        "%[var(txn.unmet)]",
        f"%[path,field(2,/,3),bytes(0,{_LONGEST_PATH}),{_HARMLESS}]",
        f"%[req.fhdr(user-agent),bytes(0,{_LONGEST_CLIENT}),{_HARMLESS}]",
    )
)

_BARE: Final = ("{", "var(txn.bare)", "-m", "found", "}")
_NO_TOKEN: Final = ("!{", "var(txn.left)", "-m", "found", "}")
_READS: Final = ("{", "method", "GET", "HEAD", "}")
_EC2: Final = ("!{", "path_beg", "/openstack", "/nocloud", "}")
_FIRST: Final = ("!{", "var(sess.looked),strcmp(sess.key)", "0", "}")
"""Of this guest on this connection: behind Neutron's proxies several may share one."""
_OF_EC2: Final = (*_NO_TOKEN, *KNOWN, *_READS, *_EC2)

_LINE: Final = re.compile(r"^0x[0-9a-f]+: key=((?:\\.|[^ \\])*) .*?\bexp=(\d+) (.*)$")
_COUNTER: Final = re.compile(r"\b(gpc\d)=(\d+)")


@dataclass(frozen=True, slots=True)
class GuestRow:
    """What one worker has counted of one guest since the entry was made.

    Attributes:
        reads: Without a token, and not refused for it.
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
    """

    network: str
    instance: str
    path: str
    client: str
    refused: bool
    looks: int
    age_s: float


def counting_tables() -> tuple[Section, ...]:
    """Where HAProxy counts: full, it forgets who was seen longest ago; and all of it with the worker."""
    guest, reader = 2 * _LONGEST_ID + 1, 2 * _LONGEST_ID + _LONGEST_PATH + _LONGEST_CLIENT + 5
    return (
        _table(GUESTS_TABLE, guest, "50k", "gpc(3),gpc_rate(3,1h)"),
        _table(READERS_TABLE, reader, "10k", "gpc(1)"),
    )


def _table(name: str, length: int, size: str, stored: str) -> Section:
    table = ("stick-table", "type", "string", "len", str(length), "size", size)
    return Section(("backend", name), ((*table, "expire", f"{_KEPT_S}s", "store", stored),))


def hear_operator() -> Words:
    """Where requests come from the controller: an operator's among them is no read of the guest's."""
    told = ("{", f"req.fhdr({HEADER_OPERATOR})", "-m", "found", "}")
    return ("http-request", "set-var(txn.by_operator)", "bool(true)", "if", *told)


def counting_rules(*required: Words, unless: Words = ()) -> tuple[Words, ...]:
    """Before anybody answers, and after tokens are checked and `txn.unmet` is set where one is required.

    Args:
        required: Conditions, each of which makes a read count, whatever tree it is of.
        unless: A condition under which other rules look at a request, and these do not.
    """
    asked = negated(unless) if unless else ()
    of_ec2 = (*asked, *_OF_EC2)
    again = ("{", f"rand({SAMPLE})", "0", "}")
    return (
        ("http-request", "set-var(txn.bare)", "bool(true)", "if", *_FIRST, *of_ec2),
        ("http-request", "set-var(txn.bare)", "bool(true)", "if", *again, *of_ec2),
        *(("http-request", "set-var(txn.bare)", "bool(true)", "if", *one, *_NO_TOKEN, *_READS) for one in required),
        # Seldom there, and so it costs less here than above.
        ("http-request", "unset-var(txn.bare)", "if", "{", "var(txn.by_operator)", "-m", "found", "}"),
        ("http-request", "set-var(sess.looked)", "var(sess.key)", "if", *_BARE),
        ("http-request", "set-var(txn.instance)", "var(txn.record),field(1,|)", "if", *_BARE),
        ("http-request", "set-var(txn.instance)", "var(txn.record),field(3,|)", "if", *_BARE, *NOVA),
        ("http-request", f"track-sc{_GUEST}", "var(sess.network),concat(|,txn.instance)",
         "table", GUESTS_TABLE, "if", *_BARE),
        # What is not tracked is not counted: without conditions that costs less.
        ("http-request", f"sc-inc-gpc(0,{_GUEST})"),
        ("http-request", f"sc-inc-gpc(1,{_GUEST})", "if", "{", "var(txn.unmet)", "-m", "found", "}"),
        ("http-request", "set-var-fmt(txn.reader)", _READER_KEY,
         "if", "{", f"sc_gpc_rate(0,{_GUEST})", "le", str(CLOSE_LOOKS), "}",
         "or", *_BARE, "{", f"rand({CLOSE_SAMPLE})", "0", "}"),
        ("http-request", f"track-sc{_READER}", "var(txn.reader)", "table", READERS_TABLE,
         "if", "{", f"var(txn.reader),in_table({READERS_TABLE})", "}",
         "or", "{", f"sc_gpc_rate(2,{_GUEST})", "lt", str(NEW_READERS), "}"),
        ("http-request", f"sc-inc-gpc(2,{_GUEST})", "if", "{", f"sc_get_gpc(0,{_READER})", "0", "}"),
        ("http-request", f"sc-inc-gpc(0,{_READER})"),
    )  # fmt: skip


def parse_guests(text: str) -> list[GuestRow]:
    """The answer of `show table` of `GUESTS_TABLE`; lines that are none are left out."""
    rows = []
    for (network, instance), counted, age_s in _entries(text, 2):
        all_of_them, refused = counted.get("gpc0", 0), counted.get("gpc1", 0)
        rows.append(GuestRow(network, instance, all_of_them - refused, refused, age_s))
    return rows


def parse_readers(text: str) -> list[ReaderRow]:
    """The answer of `show table` of `READERS_TABLE`; lines that are none are left out."""
    return [
        ReaderRow(network, instance, path, client, unmet != "", counted.get("gpc0", 0), age)
        for (network, instance, unmet, path, client), counted, age in _entries(text, 5)
    ]


def _entries(text: str, parts: int) -> Iterator[tuple[list[str], dict[str, int], float]]:
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        key = re.sub(r"\\(.)", r"\1", found[1]).split("|")
        if len(key) != parts:
            continue
        counted = {name: int(number) for name, number in _COUNTER.findall(found[3])}
        yield key, counted, max(0.0, _KEPT_S - int(found[2]) / 1000)
