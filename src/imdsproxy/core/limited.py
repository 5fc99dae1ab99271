"""Instances that are limited now, and those closest to their limit, out of HAProxy's tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

MOST_SHOWN: Final = 10

_LINE: Final = re.compile(r"^0x[0-9a-f]+: key=((?:\\.|[^ \\])*) (.*)$")
_COUNTER: Final = re.compile(r"(gpt0|conn_cur|gpc0_rate|gpc1_rate)(?:\(\d+\))?=(\d+)")
_NETWORK: Final = "/"
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


def busiest(usual: str, own: str, *, requests: int, connections: int, now: float) -> list[Asker]:
    """Those that are limited, and then those closest to their limit; ten of them.

    Args:
        usual: The table of all instances, as `show table` prints it.
        own: The same of the table of instances whose policy has limits.
        requests: The settings' limit in the time over which is counted.
        connections: The same of connections.
        now: Unix time.
    """
    limited = dict(_entries(own))
    found = []
    for key, counted in dict(_entries(usual)).items():
        theirs = limited.get(key)
        asked_too_much = (
            counted.get("gpc0_rate", 0) >= requests if theirs is None else _is_late(theirs, now)
        )
        over = asked_too_much or counted.get("conn_cur", 0) > connections
        unknown = key.startswith(_NETWORK)
        found.append(
            Asker(
                None if unknown else key,
                key.removeprefix(_NETWORK) if unknown else None,
                counted.get("gpc0_rate", 0) if theirs is None else theirs.get("gpc0_rate", 0),
                counted.get("conn_cur", 0),
                over and not unknown,
            )
        )
    found.sort(key=lambda one: (-one.limited, -one.requests, -one.connections, one.instance or ""))
    return [one for one in found if one.requests or one.connections][:MOST_SHOWN]


def refused_lately(own: str, now: float) -> list[str]:
    """Instances whose policy has limits, and that were refused in the last seconds; ten at most.

    Args:
        own: As of `busiest`.
        now: Unix time.
    """
    found = [key for key, counted in _entries(own) if _is_late(counted, now)]
    return found[:MOST_SHOWN]


def _is_late(counted: Mapping[str, int], now: float) -> bool:
    return now - counted.get("gpt0", 0) <= _LATELY_S


def _entries(text: str) -> Iterator[tuple[str, Mapping[str, int]]]:
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is not None:
            key = re.sub(r"\\(.)", r"\1", found[1])
            yield key, {name: int(number) for name, number in _COUNTER.findall(found[2])}
