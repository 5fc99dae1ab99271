"""Fairness: how much one instance may ask for, over IPv4 and IPv6 and all its ports together.

Connections are counted from the moment that they are taken, requests when they are let pass: being refused lengthens
nothing. The counters are in one table by instance. Whoever is not known yet is counted with all the others of its
network that are not: an address can be invented, a network cannot.

A connection looks its instance up once, so that requests on it cost no search of the table. Where rules do not know
the connection's guest (the unix listener, what the resolver hands in) each request looks it up.
"""

from __future__ import annotations

import math
from typing import Final

from imdsproxy.core.haproxy.model import DataplaneSpec, Section, Words
from imdsproxy.core.haproxy.rules import HAS_POLICY, KNOWN, NOVA, negated, retry_later_slowly
from imdsproxy.core.policy_word import POLICY_WORD
from imdsproxy.core.wire import MAP_NOVA

__all__ = [
    "COUNTERS",
    "COUNTERS_SOCKET",
    "BURST_S",
    "SAID_COUNTERS",
    "bound_body",
    "counting_window_s",
    "has_said_share",
    "said_share",
    "count_connections",
    "count_newcomers",
    "fair_share",
    "limit_sections",
    "local_peer",
    "most_in_window",
]

COUNTERS: Final = "fairness"
"""The table's name, and that of the peers that carry it over a reload."""

SAID_COUNTERS: Final = f"{COUNTERS}-said"
"""The table of those whose policy has limits of their own: few, and counted in another way."""

COUNTERS_SOCKET: Final = "fairness.sock"
"""In the jail: a worker that ends sends its counters to the next one there."""

_PEER: Final = "imdsproxy"
_TABLE: Final = ("table", COUNTERS)
_BODY_S: Final = 10
"""As long as a head may take (`timeout http-request`)."""

_SURPLUS: Final = 32
"""Connections over the limit that are still told so; further ones are closed."""

_RESERVED: Final = 8
"""One in so many of a bind's connections is for guests that are known."""

_LONGEST_WINDOW_S: Final = 3600
BURST_S: Final = 10
"""Seconds in which a burst that a policy speaks of may come."""

_SAID: Final = ("{", "var(txn.policy),field(5,:,2)", "-m", "len", "gt", "1", "}")
"""The policy's word has a rate or a burst: then it is these, and not the settings', in the guarded backends."""

_IS_NEWCOMER: Final = ("{", "var(sess.newcomer)", "-m", "found", "}")


def limit_sections(spec: DataplaneSpec) -> tuple[Section, ...]:
    """The table, and who takes it over a reload."""
    if not spec.limits.fair:
        return ()
    owner = () if spec.user is None else ("user", spec.user)
    socket = f"unix@{spec.paths.hops}/{COUNTERS_SOCKET}"
    window_s = counting_window_s(spec.limits.requests_per_s, spec.limits.burst)
    return (
        # The worker connects to the path that is bound here, from inside its jail: there a link leads back.
        Section(("peers", COUNTERS), (("bind", socket, *owner, "mode", "600"), ("server", _PEER))),
        _table(COUNTERS, window_s, f"conn_cur,gpc0_rate({window_s}s)"),
        _table(SAID_COUNTERS, window_s, f"gpt0,gpc0_rate({window_s}s),gpc1_rate({BURST_S}s)"),
    )


def _table(name: str, window_s: int, counters: str) -> Section:
    # A window reaches back by its own length.
    kept = f"{2 * window_s + 60}s"
    return Section(
        ("backend", name),
        (("stick-table", "type", "string", "len", "72", "size", "100k", "expire", kept,
          "store", counters, "peers", COUNTERS),),
    )  # fmt: skip


def local_peer(spec: DataplaneSpec) -> tuple[Words, ...]:
    """For `global`: otherwise it is the host's name, which may change."""
    return (("localpeer", _PEER),) if spec.limits.fair else ()


def count_connections(spec: DataplaneSpec) -> tuple[Words, ...]:
    """For a frontend whose connections are one guest's each; `sess.key` is there."""
    if not spec.limits.fair:
        return ()
    record = "var(sess.record)"
    said = ("{", record, "-m", "beg", POLICY_WORD, "}")
    known = ("{", record, "-m", "sub", "|", "}")
    default = str(spec.limits.connections)
    has_most = ("{", "var(sess.most)", "-m", "found", "}")
    return (
        _session("record", f"var(sess.key),map_str({spec.paths.overlay_map})"),
        _session("record", f"var(sess.key),map_str({spec.paths.base_map})", "!{", record, "-m", "found", "}"),
        # The first that tracks counts; of the record's kinds the rarest come first.
        *((_connection(f"{record},field(3,|)", "{", record, "-m", "beg", MAP_NOVA, "}"),
           _connection(f"{record},field(4,|)", *said, "{", record, "-m", "sub", f"|{MAP_NOVA}", "}"))
          if spec.nova else ()),
        _connection(f"{record},field(2,|)", *said),
        _connection(f"{record},field(1,|)", *known),
        _session("newcomer", "bool(true)", *negated(known)),
        _connection("str(/),concat(,sess.network)", *_IS_NEWCOMER),
        _session("most", f"{record},field(1,|),field(7,:),add(0)", *said),
        _session("most", f"int({_of_newcomers(spec)})", *_IS_NEWCOMER),
        _session("beyond", f"sc2_conn_cur,sub({default})", "{", "sc2_conn_cur", "gt", default, "}", *negated(has_most)),
        _session("beyond", "sc2_conn_cur,sub(sess.most)",
                 *has_most, "{", "sc2_conn_cur,sub(sess.most)", "-m", "int", "gt", "0", "}"),
        ("tcp-request", "connection", "reject", "if", "{", "var(sess.beyond)", "-m", "int", "gt", str(_SURPLUS), "}"),
    )  # fmt: skip


def count_newcomers(spec: DataplaneSpec) -> tuple[Words, ...]:
    """For a frontend of which nobody is believed to be who it says: one share for all of a network."""
    if not spec.limits.fair:
        return ()
    return (
        _session("who", "str(/),concat(,sess.network)"),
        ("tcp-request", "connection", "track-sc2", "var(sess.who)", *_TABLE),
        (
            "tcp-request",
            "connection",
            "reject",
            "if",
            "{",
            "sc2_conn_cur",
            "gt",
            str(_of_newcomers(spec)),
            "}",
        ),
    )


def fair_share(
    spec: DataplaneSpec, *, by_connection: bool, counted: bool = True
) -> tuple[Words, ...]:
    """Refuse what is over the limits, count the rest: after the look-up, before anything that costs time.

    Args:
        spec: Has the limits of whom the policy's word says nothing.
        by_connection: `count_connections` has been there.
        counted: Without connections of a guest's own: as many requests may be open as it could have connections.
    """
    limits = spec.limits
    if not limits.fair:
        return ()
    most = most_in_window(limits.requests_per_s, limits.burst)
    return (
        *_track(spec, *(_IS_NEWCOMER if by_connection else ())),
        *((_refuse("{", "var(sess.beyond)", "-m", "found", "}"),) if by_connection else ()),
        *(_too_many_open(limits.connections) if counted and not by_connection else ()),
        # The number first: it is all that most requests are asked. A newcomer's are those of a whole network.
        _refuse("{", "sc2_gpc0_rate", "ge", str(most), "}", *KNOWN, *negated(_SAID)),
        ("http-request", "sc-inc-gpc0(2)"),
    )


def said_share(spec: DataplaneSpec) -> tuple[Words, ...]:
    """The same where the policy's word has limits: for guarded backends, where all of these are sent."""
    limits = spec.limits
    if not limits.fair:
        return ()
    window_s = counting_window_s(limits.requests_per_s, limits.burst)
    return (
        # The resolver's counter, which is not used here.
        *_track(spec, *_SAID, counter=0, table=SAID_COUNTERS),
        _limit("said_rate", f"field(5,:),mul({window_s})"),
        _limit("said_burst", "field(6,:),add(0)"),
        *_too_many("sc0_gpc0_rate", "said_rate"),
        *_too_many("sc0_gpc1_rate", "said_burst"),
        ("http-request", "sc-inc-gpc0(0)"),
        ("http-request", "sc-inc-gpc1(0)"),
    )


def has_said_share(spec: DataplaneSpec) -> Words:
    """The condition that `said_share` has something to say; empty where there are no limits."""
    return _SAID if spec.limits.fair else ()


def counting_window_s(requests_per_s: int, burst: int) -> int:
    """Seconds over which requests are counted: as long as a burst takes at the usual rate.

    So one counter keeps both: in such a time come no more than a burst, and on average no more than the rate.
    """
    return min(_LONGEST_WINDOW_S, math.ceil(burst / requests_per_s))


def bound_body(spec: DataplaneSpec | None = None) -> tuple[Words, ...]:
    """408 for a body that is not there in time, or whose first part is not, where that is longer than a buffer.

    Args:
        spec: Has the length beyond which it is 413; `None` where whoever gets it knows for himself.
    """
    wait = (
        "http-request",
        "wait-for-body",
        "time",
        f"{_BODY_S}s",
        "if",
        "{",
        "method",
        "POST",
        "PUT",
        "PATCH",
        "}",
    )
    if spec is None:
        return (wait,)
    length, most = "req.fhdr(content-length)", str(spec.limits.body_bytes)
    return (
        ("http-request", "return", "status", "413", "if", "{", length, "-m", "int", "gt", most, "}"),
        wait,
    )  # fmt: skip


def most_in_window(requests_per_s: int, burst: int) -> int:
    """Requests in the time over which is counted."""
    return min(burst, requests_per_s * counting_window_s(requests_per_s, burst))


def _of_newcomers(spec: DataplaneSpec) -> int:
    most = spec.limits.maxconn_per_network
    return max(1, most - most // _RESERVED)


def _track(
    spec: DataplaneSpec, *conditions: str, counter: int = 2, table: str = COUNTERS
) -> tuple[Words, ...]:
    # Of a stream the first that tracks counts, before its session's.
    track = f"track-sc{counter}"
    known: Words = (
        "http-request", track, "var(txn.record),field(1,|)", "table", table, "if", *conditions, *KNOWN
    )  # fmt: skip
    nova: Words = (
        "http-request", track, "var(txn.record),field(3,|)", "table", table, "if", *conditions, *NOVA
    )  # fmt: skip
    return (nova, known) if spec.nova else (known,)


def _limit(name: str, expression: str) -> Words:
    # What the word leaves empty gives no variable.
    return (
        "http-request",
        f"set-var(txn.{name})",
        f"var(txn.policy),{expression}",
        "if",
        *HAS_POLICY,
    )


def _too_many(counter: str, said: str) -> tuple[Words, ...]:
    """By the policy's word; noted is when one was refused, for whoever looks (`core.limited`)."""
    over = ("{", f"var(txn.{said})", "-m", "found", "}",
            "{", f"{counter},sub(txn.{said})", "-m", "int", "ge", "0", "}")  # fmt: skip
    return (("http-request", "sc-set-gpt0(0)", "date", "if", *over), _refuse(*over))


def _too_many_open(default: int) -> tuple[Words, ...]:
    """By the policy's word, or where it says nothing by the file's; the request itself is open too."""
    has = ("{", "var(txn.said_most)", "-m", "found", "}")
    return (
        _limit("said_most", "field(7,:),add(0)"),
        _refuse(*has, "{", "sc2_conn_cur,sub(txn.said_most)", "-m", "int", "gt", "0", "}"),
        _refuse("{", "sc2_conn_cur", "gt", str(default), "}", *negated(has), *KNOWN),
    )


def _refuse(*conditions: str) -> Words:
    return (*retry_later_slowly(), "if", *conditions)


def _connection(key: str, *conditions: str) -> Words:
    return ("tcp-request", "connection", "track-sc2", key, *_TABLE, "if", *conditions)


def _session(variable: str, expression: str, *conditions: str) -> Words:
    rule = ("tcp-request", "connection", f"set-var(sess.{variable})", expression)
    return (*rule, "if", *conditions) if conditions else rule
