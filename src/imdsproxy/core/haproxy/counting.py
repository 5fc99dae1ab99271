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

COUNTING_RULES: Final = """
read_operator:
    # Where requests come from the controller: an operator's among them is no read of the guest's.
    http-request set-var(txn.by_operator) bool(true) if { req.fhdr(<header_operator>) -m found }
sample_reads:
    # In a frontend, once it is known what there is to check of a request: which of the rest are counted.
    # Where one in so many is counted, the throw comes first: it is all that most requests pay for.
    [counts_reads] http-request set-var(txn.needs_check) str(sampled) if <by_chance> <plain_read>
    # `answer_plain` has thrown before, and left these.
    [samples_left] http-request set-var(txn.needs_check) str(sampled) if <has_short_document> <plain_read>
sample_found:
    # The same in the resolver's frontend, where operators are among the guests.
    [counts_reads] http-request set-var(txn.needs_check) str(sampled)
        if <by_chance> <plain_read> !{ var(txn.by_operator) -m found }
plain_read:
    !<needs_check> !<good_token> <known> <reads> !<in_other_trees>
count_sampled:
    # First in the backend of what was chosen by `sample_reads`, which is all counted. The argument is the instance.
    http-request set-var(txn.instance) <argument>
    <track(always)>
    http-request sc-inc-gpc(<read_counter>,3)
    http-request sc-inc-gpc(<read_counter>,4)
count_in_passing:
    # In a checked backend, after tokens are checked and `txn.token_missing` is set where one is required.
    [counts_reads] http-request set-var(txn.count_read) bool(true)
        if <by_chance> !<good_token> <reads> <known> !<in_other_trees>
    [counts_reads] http-request set-var(txn.count_read) bool(true)
        if <by_chance> !<good_token> <reads> <has_policy> <policy_openstack_tokens_on> <openstack>
    [counts_reads] http-request set-var(txn.count_read) bool(true)
        if <by_chance> !<good_token> <reads> <has_policy> <policy_nocloud_tokens_on> <nocloud>
    http-request set-var(txn.count_read) bool(true) if <token_missing> <reads>
    http-request unset-var(txn.count_read) if { var(txn.by_operator) -m found }
    http-request set-var(txn.instance) <instance> if <count_read>
    http-request set-var(txn.instance) <instance_of_nova> if <count_read> <of_nova>
    <track(count_read)>
    [counts_reads] http-request sc-inc-gpc(<read_counter>,3) if !<token_missing>
    [counts_reads] http-request sc-inc-gpc(<read_counter>,4) if !<token_missing>
    http-request sc-inc-gpc(2,3) if <token_missing>
    http-request sc-inc-gpc(2,4) if <token_missing>
track:
    # Find or make the entries of a request; that of its reader if the guest is looked at closely.
    http-request track-sc3 var(sess.network),concat(|,txn.instance) table without-token if <argument>
    # What is not tracked is not counted, nor is its rate below anything.
    http-request set-var-fmt(txn.reader)
        %[var(sess.network)]|%[var(txn.instance)]|%[path,field(2,/,3),bytes(0,48),url_enc]|%[req.fhdr(user-agent),bytes(0,64),url_enc]
        if { sc_gpc_rate(3,3) lt 64 }
    http-request track-sc4 var(txn.reader) table without-token-readers
    http-request sc-inc-gpc(3,3) if { var(txn.reader) -m found }
"""

COUNTING_TABLES: Final = """
# Full, a table forgets who was seen longest ago; and all of it with the worker. A key has a network's id, an
# instance's, each of at most 64 letters, and what is between them; that of a reader also a path and a client's name, of
# which each encoded letter takes three.
backend without-token
    stick-table type string len 129 size 50k expire <reads_kept_s>s store gpc(4),gpc_rate(4,1h)
backend without-token-readers
    stick-table type string len 467 size 10k expire <reads_kept_s>s store gpc(3)
"""

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
