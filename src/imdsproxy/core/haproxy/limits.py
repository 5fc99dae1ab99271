"""Fairness: how much one instance may ask for, over IPv4 and IPv6 and all its ports together.

Connections are counted from the moment that they are taken, requests when they are let pass: being refused lengthens
nothing. The counters are in one table by instance. Guests that are not known yet are counted together, by network:
an address can be invented, a network cannot.

A connection looks its instance up once, so that requests on it cost no search of the table. Where rules do not know
the connection's guest (the unix listener, what the resolver hands in) each request looks it up.

The tables are read into values for reports, at the end.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.haproxy.model import Limits
from imdsproxy.core.haproxy.runtime import parse_table
from imdsproxy.core.haproxy.text import Value

COUNTERS: Final = "fairness"
"""The table's name, and that of the peers that carry it over a reload."""

POLICY_COUNTERS: Final = f"{COUNTERS}-by-policy"
"""The table of those whose policy has limits of their own: few, and counted in another way."""

_RESERVED: Final = 8
"""One in so many of a bind's connections is for guests that are known."""

_LONGEST_WINDOW_S: Final = 3600

LIMIT_RULES: Final = """
count_connections:
    # For a frontend whose connections are one guest's each; `sess.key` is there.
    [fair] tcp-request connection set-var(sess.record) var(sess.key),map_str(<overlay_map>)
    [fair] tcp-request connection set-var(sess.record) var(sess.key),map_str(<base_map>)
        if !{ var(sess.record) -m found }
    # The first that tracks counts; of the record's kinds the rarest come first.
    [fair] [nova] tcp-request connection track-sc2 var(sess.record),field(3,|) table fairness
        if { var(sess.record) -m beg <map_nova> }
    [fair] [nova] tcp-request connection track-sc2 var(sess.record),field(4,|) table fairness
        if <connection_has_policy> { var(sess.record) -m sub |<map_nova> }
    [fair] tcp-request connection track-sc2 var(sess.record),field(2,|) table fairness if <connection_has_policy>
    [fair] tcp-request connection track-sc2 var(sess.record),field(1,|) table fairness if <connection_known>
    [fair] tcp-request connection set-var(sess.newcomer) bool(true) if !<connection_known>
    [fair] tcp-request connection track-sc2 str(/),concat(,sess.network) table fairness if <newcomer>
    [fair] tcp-request connection set-var(sess.connection_limit) <connection_policy_limit>,add(0)
        if <connection_has_policy>
    [fair] tcp-request connection set-var(sess.connection_limit) int(<newcomers>) if <newcomer>
    [fair] tcp-request connection set-var(sess.excess) sc2_conn_cur,sub(<connections>)
        if { sc2_conn_cur gt <connections> } !{ var(sess.connection_limit) -m found }
    [fair] tcp-request connection set-var(sess.excess) sc2_conn_cur,sub(sess.connection_limit)
        if { var(sess.connection_limit) -m found } { sc2_conn_cur,sub(sess.connection_limit) -m int gt 0 }
    # So many over the limit are still answered, with 503.
    [fair] tcp-request connection reject if { var(sess.excess) -m int gt 32 }
count_newcomers:
    # For a frontend whose guests' addresses are not believed: one share for all of a network.
    [fair] tcp-request connection set-var(sess.newcomer_key) str(/),concat(,sess.network)
    [fair] tcp-request connection track-sc2 var(sess.newcomer_key) table fairness
    [fair] tcp-request connection reject if { sc2_conn_cur gt <newcomers> }
track_by_request:
    # Of a stream the first that tracks counts, before its session's.
    # The argument is one more condition.
    [fair] [nova] http-request track-sc2 <instance_of_nova> table fairness if <argument> <of_nova>
    [fair] http-request track-sc2 <instance> table fairness if <argument> <known>
count_request:
    # `tarpit` answers after `timeout tarpit`: guests that ask again at once cost their neighbours more than by the
    # answers. The number first: it is all that most requests are asked. A newcomer's are those of a whole network.
    [fair] http-request tarpit <status_503> if { sc2_gpc0_rate ge <requests_in_window> } <known> !<has_own_limits>
    [fair] http-request sc-inc-gpc0(2)
share_by_connection:
    # Refuse what is over the limits, count the rest: after the look-up, before anything that costs time.
    # This one is for frontends with `count_connections`.
    <track_by_request(newcomer)>
    [fair] http-request tarpit <status_503> if { var(sess.excess) -m found }
    <count_request>
share_by_request:
    # The same where a connection carries requests of several guests.
    <track_by_request(always)>
    # As many requests may be open as other instances may have connections; the request itself is open too.
    [fair] http-request set-var(txn.policy_connections) <policy_connections>,add(0) if <has_policy>
    [fair] http-request tarpit <status_503>
        if { var(txn.policy_connections) -m found } { sc2_conn_cur,sub(txn.policy_connections) -m int gt 0 }
    [fair] http-request tarpit <status_503>
        if { sc2_conn_cur gt <connections> } !{ var(txn.policy_connections) -m found } <known>
    <count_request>
policy_share:
    # The same where the policy has limits of its own: in checked backends, which get all of these.
    [fair] [nova] http-request track-sc0 <instance_of_nova> table fairness-by-policy if <has_own_limits> <of_nova>
    [fair] http-request track-sc0 <instance> table fairness-by-policy if <has_own_limits> <known>
    # A field that is empty sets no variable.
    [fair] http-request set-var(txn.policy_rate) <policy_requests_per_s>,mul(<window_s>) if <has_policy>
    [fair] http-request set-var(txn.policy_burst) <policy_burst>,add(0) if <has_policy>
    # The time of a refusal is kept for reports (`refused_lately`).
    [fair] http-request sc-set-gpt0(0) date
        if { var(txn.policy_rate) -m found } { sc0_gpc0_rate,sub(txn.policy_rate) -m int ge 0 }
    [fair] http-request tarpit <status_503>
        if { var(txn.policy_rate) -m found } { sc0_gpc0_rate,sub(txn.policy_rate) -m int ge 0 }
    [fair] http-request sc-set-gpt0(0) date
        if { var(txn.policy_burst) -m found } { sc0_gpc1_rate,sub(txn.policy_burst) -m int ge 0 }
    [fair] http-request tarpit <status_503>
        if { var(txn.policy_burst) -m found } { sc0_gpc1_rate,sub(txn.policy_burst) -m int ge 0 }
    [fair] http-request sc-inc-gpc0(0)
    [fair] http-request sc-inc-gpc1(0)
[fair] peers fairness
    # The worker connects to the path that is bound here, from inside its jail: there a link leads back.
    bind unix@<jail>/fairness.sock <user> mode 600
    server imdsproxy
[fair] backend fairness
    # A window reaches back by its own length.
    stick-table type string len 72 size 100k expire <kept_s>s store conn_cur,gpc0_rate(<window_s>s) peers fairness
[fair] backend fairness-by-policy
    # A burst that a policy allows may come in ten seconds.
    stick-table type string len 72 size 100k expire <kept_s>s
        store gpt0,gpc0_rate(<window_s>s),gpc1_rate(10s) peers fairness
"""

MOST_SHOWN: Final = 10
"""Instances in a report."""

_NETWORK: Final = "/"
"""How the key of a network's unknown guests begins."""

_LATELY_S: Final = 10


@dataclass(frozen=True, slots=True)
class Asker:
    """The requests of one instance, or of a network's unknown guests.

    Attributes:
        instance: `None` for unknown guests of `network`.
        network: `None` for an instance, which may be in several.
        requests: That were let pass, in the time over which is counted.
        connections: Open now; of one behind the unix listener, requests.
        limited: Some of what it asks for is refused, or was in the last seconds.
    """

    instance: str | None
    network: str | None
    requests: int
    connections: int
    limited: bool


def names_of_limits(limits: Limits) -> dict[str, Value]:
    """What the templates of this module name, beside the fields of `Limits`."""
    most = limits.maxconn_per_network
    window_s = _window_s(limits.requests_per_s, limits.burst)
    return {
        "newcomers": max(1, most - most // _RESERVED),
        "window_s": window_s,
        "kept_s": 2 * window_s + 60,
        "requests_in_window": most_in_window(limits.requests_per_s, limits.burst),
    }


def most_in_window(requests_per_s: int, burst: int) -> int:
    """Requests in the time over which is counted."""
    return min(burst, requests_per_s * _window_s(requests_per_s, burst))


def _window_s(requests_per_s: int, burst: int) -> int:
    """Seconds over which requests are counted: as long as a burst takes at the usual rate.

    So one counter keeps both: in such a time come no more than a burst, and on average no more than the rate.
    """
    return min(_LONGEST_WINDOW_S, math.ceil(burst / requests_per_s))


def busiest(usual: str, own: str, *, requests: int, connections: int, now: float) -> list[Asker]:
    """Those that are limited, and then those closest to their limit; ten of them.

    Args:
        usual: The table of all instances, as `show table` prints it.
        own: The same of the table of instances whose policy has limits.
        requests: The settings' limit in the time over which is counted.
        connections: The same of connections.
        now: Unix time.
    """
    limited, found = dict(parse_table(own)), []
    for key, counted in dict(parse_table(usual)).items():
        theirs = limited.get(key)
        asked = (counted if theirs is None else theirs).get("gpc0_rate", 0)
        over = asked >= requests if theirs is None else _is_late(theirs, now)
        open_now = counted.get("conn_cur", 0)
        if key.startswith(_NETWORK):
            found.append(Asker(None, key.removeprefix(_NETWORK), asked, open_now, limited=False))
        else:
            found.append(Asker(key, None, asked, open_now, over or open_now > connections))
    found.sort(key=lambda one: (-one.limited, -one.requests, -one.connections, one.instance or ""))
    return [one for one in found if one.requests or one.connections][:MOST_SHOWN]


def refused_lately(own: str, now: float) -> list[str]:
    """Instances whose policy has limits, and that were refused in the last seconds; ten at most.

    Args:
        own: As of `busiest`.
        now: Unix time.
    """
    return [key for key, counted in parse_table(own) if _is_late(counted, now)][:MOST_SHOWN]


def _is_late(counted: Mapping[str, int], now: float) -> bool:
    return now - counted.get("gpt0", 0) <= _LATELY_S
