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
from imdsproxy.core.policy import Policy

COUNTERS: Final = "fairness"
"""The table's name, and that of the peers that carry it over a reload."""

POLICY_COUNTERS: Final = f"{COUNTERS}-by-policy"
"""The table of those whose policy has limits of their own: few, and counted in another way."""

_RESERVED: Final = 8
"""One in so many of a bind's connections is for guests that are known."""

_MISSES: Final = 20
"""One in so many of an instance's requests may lead to no document."""

_FEWEST_MISSES: Final = 20

_LONGEST_WINDOW_S: Final = 3600

MOST_SHOWN: Final = 10
"""Instances in a report."""

_NETWORK: Final = "/"
"""How the key of a network's unknown guests begins."""

_LATELY_S: Final = 10
_BURST_S: Final = 10
"""A policy's burst may come in so many seconds."""


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


@dataclass(frozen=True, slots=True)
class Usage:
    """What one instance asks for, beside what it may.

    Attributes:
        requests: That were let pass in the last `window_s` seconds.
        most_requests: The most in that time; more are refused.
        connections: Open now.
        limited: Some of what it asks for is refused, or was in the last seconds.
    """

    requests: int
    most_requests: int
    window_s: int
    connections: int
    most_connections: int
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
        "misses_in_window": misses_in_window(most_in_window(limits.requests_per_s, limits.burst)),
    }


def most_in_window(requests_per_s: int, burst: int) -> int:
    """Requests in the time over which is counted."""
    return min(burst, requests_per_s * _window_s(requests_per_s, burst))


def misses_in_window(requests: int) -> int:
    """Requests in that time that may lead to no document; cloud-init's whole crawl has a handful.

    Args:
        requests: The most in that time.
    """
    return max(_FEWEST_MISSES, requests // _MISSES)


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
    """One instance's counters beside its limits.

    Args:
        usual: Its entry of the table of all instances, as `show table` prints it.
        own: The same of the table of instances whose policy has limits.
        requests_per_s: Of the settings, as the next and `connections`.
        burst: Requests at once.
        policy: The instance's, whose limits win.
        connections: Open at once.
        now: Unix time.
    """
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
    """Instances whose policy has limits, and that were refused in the last seconds; ten at most.

    Args:
        own: As of `busiest`.
        now: Unix time.
    """
    return [key for key, counted in parse_table(own) if _is_late(counted, now)][:MOST_SHOWN]


def _is_late(counted: Mapping[str, int], now: float) -> bool:
    return now - counted.get("gpt0", 0) <= _LATELY_S
