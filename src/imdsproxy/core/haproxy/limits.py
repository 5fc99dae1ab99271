"""Fairness: how much one instance may ask for, over IPv4 and IPv6 and all its ports together.

Connections are counted from the moment that they are taken, requests when they are let pass: being refused lengthens
nothing. The counters are in one table by instance. Whoever is not known yet is counted with all the others of its
network that are not: an address can be invented, a network cannot.

A connection looks its instance up once, so that requests on it cost no search of the table. Where rules do not know
the connection's guest (the unix listener, what the resolver hands in) each request looks it up.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.haproxy.model import DataplaneSpec, Section, Words
from imdsproxy.core.haproxy.rules import HAS_POLICY, KNOWN, NOVA
from imdsproxy.core.policy import POLICY_WORD
from imdsproxy.core.wire import MAP_NOVA, RETRY_AFTER_S

__all__ = [
    "COUNTERS",
    "COUNTERS_SOCKET",
    "count_connections",
    "count_newcomers",
    "fair_share",
    "limit_sections",
    "local_peer",
]

COUNTERS: Final = "fairness"
"""The table's name, and that of the peers that carry it over a reload."""

COUNTERS_SOCKET: Final = "fairness.sock"
"""In the jail: a worker that ends sends its counters to the next one there."""

_PEER: Final = "imdsproxy"
_TABLE: Final = ("table", COUNTERS)
_SURPLUS: Final = 32
"""Connections over the limit that are still told so; further ones are closed."""

_RESERVED: Final = 8
"""One in so many of a bind's connections is for guests that are known."""

_IS_NEWCOMER: Final = ("{", "var(sess.newcomer)", "-m", "found", "}")


def limit_sections(spec: DataplaneSpec) -> tuple[Section, ...]:
    """The table, and who takes it over a reload."""
    if not spec.limits.fair:
        return ()
    owner = () if spec.user is None else ("user", spec.user)
    socket = f"unix@{spec.paths.hops}/{COUNTERS_SOCKET}"
    return (
        # The worker connects to the path that is bound here, from inside its jail: there a link leads back.
        Section(("peers", COUNTERS), (("bind", socket, *owner, "mode", "600"), ("server", _PEER))),
        Section(
            ("backend", COUNTERS),
            (
                ("stick-table", "type", "string", "len", "72", "size", "100k", "expire", "2m",
                 "store", "conn_cur,gpc0_rate(10s),gpc1_rate(60s)", "peers", COUNTERS),
            ),
        ),
    )  # fmt: skip


def local_peer(spec: DataplaneSpec) -> tuple[Words, ...]:
    """For `global`: otherwise it is the host's name, which may change."""
    return (("localpeer", _PEER),) if spec.limits.fair else ()


def count_connections(spec: DataplaneSpec) -> tuple[Words, ...]:
    """For a frontend whose connections are one guest's each; `sess.key` is there."""
    if not spec.limits.fair:
        return ()
    return (
        _session("record", f"var(sess.key),map_str({spec.paths.overlay_map})"),
        _session("record", f"var(sess.key),map_str({spec.paths.base_map})",
                 "!{", "var(sess.record)", "-m", "found", "}"),
        _session("said", "var(sess.record),field(1,|)", "{", "var(sess.record)", "-m", "beg", POLICY_WORD, "}"),
        _session("record", "var(sess.record),field(2,|,0)", "{", "var(sess.said)", "-m", "found", "}"),
        _session("who", "var(sess.record),field(1,|)", "{", "var(sess.record)", "-m", "sub", "|", "}"),
        *((_session("who", "var(sess.record),field(3,|)", "{", "var(sess.record)", "-m", "beg", MAP_NOVA, "}"),)
          if spec.nova else ()),
        _session("newcomer", "bool(true)", "!{", "var(sess.who)", "-m", "found", "}"),
        _session("who", "str(/),concat(,sess.network)", *_IS_NEWCOMER),
        ("tcp-request", "connection", "track-sc2", "var(sess.who)", *_TABLE),
        _session("most", f"int({spec.limits.connections})"),
        _session("most", "var(sess.said),field(7,:),add(0)", "{", "var(sess.said),field(7,:)", "-m", "found", "}"),
        _session("most", f"int({_of_newcomers(spec)})", *_IS_NEWCOMER),
        _session("beyond", "sc2_conn_cur,sub(sess.most)",
                 "{", "sc2_conn_cur,sub(sess.most)", "-m", "int", "gt", "0", "}"),
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
    return (
        *_track(spec, *(_IS_NEWCOMER if by_connection else ())),
        _limit("said_rate", "field(5,:),mul(60)"),
        _limit("said_burst", "field(6,:),add(0)"),
        *(() if by_connection or not counted else (_limit("said_most", "field(7,:),add(0)"),)),
        *((_refuse("{", "var(sess.beyond)", "-m", "found", "}"),) if by_connection else ()),
        *(_too_many("sc2_conn_cur", "said_most", limits.connections + 1, spared=1)
          if counted and not by_connection else ()),
        *_too_many("sc2_gpc0_rate", "said_burst", limits.burst),
        *_too_many("sc2_gpc1_rate", "said_rate", limits.requests_per_s * 60),
        ("http-request", "sc-inc-gpc0(2)"),
        ("http-request", "sc-inc-gpc1(2)"),
    )  # fmt: skip


def _of_newcomers(spec: DataplaneSpec) -> int:
    most = spec.limits.maxconn_per_network
    return max(1, most - most // _RESERVED)


def _track(spec: DataplaneSpec, *conditions: str) -> tuple[Words, ...]:
    # Of a stream the first that tracks counts, before its session's.
    rules = (
        (
            "http-request",
            "track-sc2",
            "var(txn.record),field(1,|)",
            *_TABLE,
            "if",
            *conditions,
            *KNOWN,
        ),
    )
    if not spec.nova:
        return rules
    return (
        (
            "http-request",
            "track-sc2",
            "var(txn.record),field(3,|)",
            *_TABLE,
            "if",
            *conditions,
            *NOVA,
        ),
        *rules,
    )


def _limit(name: str, expression: str) -> Words:
    # What the word leaves empty gives no variable.
    return (
        "http-request",
        f"set-var(txn.{name})",
        f"var(txn.policy),{expression}",
        "if",
        *HAS_POLICY,
    )


def _too_many(counter: str, said: str, default: int, *, spared: int = 0) -> tuple[Words, ...]:
    """By the policy's word, or where it says nothing by the file's; a newcomer's are those of a whole network."""
    has = ("var(txn." + said + ")", "-m", "found", "}")
    return (
        _refuse("{", *has, "{", f"{counter},sub(txn.{said})", "-m", "int", "ge", str(spared), "}"),
        # The number first: it is all that most requests are asked.
        _refuse("{", counter, "ge", str(default), "}", "!{", *has, *KNOWN),
    )


def _refuse(*conditions: str) -> Words:
    # Held for `timeout tarpit`: whoever asks again at once would cost its neighbours more than by its answers.
    return (
        "http-request",
        "tarpit",
        "status",
        "503",
        "hdr",
        "Retry-After",
        str(RETRY_AFTER_S),
        "if",
        *conditions,
    )


def _session(variable: str, expression: str, *conditions: str) -> Words:
    rule = ("tcp-request", "connection", f"set-var(sess.{variable})", expression)
    return (*rule, "if", *conditions) if conditions else rule
