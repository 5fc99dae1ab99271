"""Fairness: limits on one instance's requests and connections, over IPv4, IPv6 and all of its ports together.

A connection counts from its accept, a request when HAProxy lets it pass: refused requests do not extend the refusal.
One table has the counters by instance. Unknown guests share one counter per network, because a guest can invent an
address and cannot invent a network.

HAProxy looks up the instance once per connection, so that further requests on the connection need no search of the
table. If rules do not know the connection's guest (the unix listener, requests from the resolver), HAProxy looks up the
guest for each request.

The functions at the end parse the tables for reports.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from imdsproxy.haproxy.rules.model import Limits
from imdsproxy.haproxy.rules.runtime import parse_table
from imdsproxy.haproxy.rules.text import Value
from imdsproxy.model.policy import Policy

COUNTERS: Final = "fairness"
"""Name of the table, and of the peers section that carries it over a reload."""

POLICY_COUNTERS: Final = f"{COUNTERS}-by-policy"
"""Table of instances whose policy has its own limits: few, and with other counters."""

_RESERVED: Final = 8
"""Divisor of a bind's connections that gives the share reserved for known guests."""

_MISSES: Final = 20
"""Divisor of an instance's requests that gives the share that may lead to no document."""

_FEWEST_MISSES: Final = 20

_LONGEST_WINDOW_S: Final = 3600

MOST_SHOWN: Final = 10
"""Maximum number of instances in a report."""

_NETWORK: Final = "/"
"""Prefix of the key of a network's unknown guests."""

_LATELY_S: Final = 10
_BURST_S: Final = 10
"""Seconds over which a policy's burst is counted."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Requests of one instance, or of a network's unknown guests.

    Attributes:
        instance: `None` for unknown guests of `network`.
        network: `None` for an instance, which may be in several networks.
        connections: Open connections; behind the unix listener, open requests.
        limited: Whether HAProxy refuses some of its requests, or did so in the last seconds.
    """

    instance: str | None
    network: str | None
    requests: int
    connections: int
    limited: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Requests and connections of one instance, with its limits."""

    requests: int
    most_requests: int
    window_s: int
    connections: int
    most_connections: int
    limited: bool


def names_of_limits(limits: Limits) -> dict[str, Value]:
    most = limits.maxconn_per_network
    window_s = _window_s(limits.requests_per_s, limits.burst)
    return {
        "newcomers": max(1, most - most // _RESERVED),
        "window_s": window_s,
        "kept_s": 2 * window_s + 60,
        "requests_in_window": most_in_window(limits.requests_per_s, limits.burst),
        "misses_in_window": misses_in_window(most_in_window(limits.requests_per_s, limits.burst)),
    }


def most_in_window(requests_per_s: int, burst: int) -> int:
    return min(burst, requests_per_s * _window_s(requests_per_s, burst))


def misses_in_window(requests: int) -> int:
    """Return how many requests in the window may lead to no document; cloud-init's whole crawl makes a handful."""
    return max(_FEWEST_MISSES, requests // _MISSES)


def _window_s(requests_per_s: int, burst: int) -> int:
    """Return the counting window in seconds: the time that a burst takes at the usual rate.

    One counter thus enforces both limits: the window admits no more than a burst, and on average no more than the rate.
    """
    return min(_LONGEST_WINDOW_S, math.ceil(burst / requests_per_s))


def busiest(usual: str, own: str, *, requests: int, connections: int, now: float) -> list[Asker]:
    """Return the ten busiest instances: first those that are limited, then those closest to their limit.

    `usual` is the table of all instances, `own` that of instances whose policy has limits, as `show table` prints them.
    """
    limited, found = dict(parse_table(own)), []
    for key, counted in dict(parse_table(usual)).items():
        theirs = limited.get(key)
        asked = (counted if theirs is None else theirs).get("gpc0_rate", 0)
        over = asked >= requests if theirs is None else _is_late(theirs, now)
        over = over or counted.get("gpc1_rate", 0) >= misses_in_window(requests)
        open_now = counted.get("conn_cur", 0)
        if key.startswith(_NETWORK):
            found.append(Asker(None, key.removeprefix(_NETWORK), asked, open_now, limited=False))
        else:
            found.append(Asker(key, None, asked, open_now, over or open_now > connections))
    found.sort(key=lambda one: (-one.limited, -one.requests, -one.connections, one.instance or ""))
    return [one for one in found if one.requests or one.connections][:MOST_SHOWN]


def read_usage(
    usual: str,
    own: str,
    *,
    requests_per_s: int,
    burst: int,
    policy: Policy,
    connections: int,
    now: float,
) -> Usage:
    """Parse one instance's counters and add its limits; the entries are from the tables of `busiest`."""
    counted = next((one for _, one in parse_table(usual)), {})
    window_s = most_s = _window_s(requests_per_s, burst)
    asked, most = counted.get("gpc0_rate", 0), most_in_window(requests_per_s, burst)
    theirs = next((one for _, one in parse_table(own)), {})
    if policy.requests_per_s is not None:
        asked, most = theirs.get("gpc0_rate", 0), policy.requests_per_s * window_s
    elif policy.burst is not None:
        asked, most, most_s = theirs.get("gpc1_rate", 0), policy.burst, _BURST_S
    open_now, most_open = counted.get("conn_cur", 0), policy.connections or connections
    limited = asked >= most or open_now > most_open or _is_late(theirs, now)
    usual_most = most_in_window(requests_per_s, burst)
    limited = limited or counted.get("gpc1_rate", 0) >= misses_in_window(usual_most)
    return Usage(asked, most, most_s, open_now, most_open, limited)


def refused_lately(own: str, now: float) -> list[str]:
    """Return at most ten instances that HAProxy refused in the last seconds because of their policy's limits."""
    return [key for key, counted in parse_table(own) if _is_late(counted, now)][:MOST_SHOWN]


def _is_late(counted: Mapping[str, int], now: float) -> bool:
    return now - counted.get("gpt0", 0) <= _LATELY_S
