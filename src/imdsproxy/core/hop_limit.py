"""How far the answer that holds a session token goes: from the policy word to packets.

HAProxy cannot set a packet's TTL. It can write a DSCP on what a connection sends, without any privilege; a rule in
the kernel (`host.hop_table`) makes the TTL or hop limit of it, and takes it off. Without that rule the answer would go
as far as any other, so where there is none, the record says `WITHHELD` in the limit's place, and no token is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.gates import ANSWER_DSCP
from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.core.model import NetworkId
from imdsproxy.core.policy_word import HOP_LIMIT, word_of

UNLIMITED: Final = 64
"""What the kernel sends with by itself; nothing is written on such an answer."""

WITHHELD: Final = 0
"""No token is given."""

NEXT_TO_MARK: Final = ANSWER_DSCP - 1
"""The DSCP is the limit itself. One of them is taken (`core.gates`), and a limit of that many goes as one less."""

HopPlace: TypeAlias = NamespaceRef | None
"""Where answers are sent from; `None` is the host's own namespace."""


def limit_of(value: str | None) -> int:
    """The hop limit in a map value (`core.wire.render_map_value`)."""
    word = word_of(value or "")
    return int(HOP_LIMIT.read(word)) if word else UNLIMITED


def withhold(value: str) -> str:
    """The same map value, or policy word, where no token is given."""
    word = word_of(value)
    return HOP_LIMIT.replace(word, str(WITHHELD)) + value.removeprefix(word)


def plan_places(
    endpoints: Iterable[Endpoint], networks: frozenset[NetworkId]
) -> dict[NetworkId, frozenset[HopPlace]]:
    """Where answers to guests of these networks are sent from; without those that nobody listens in."""
    places: dict[NetworkId, set[HopPlace]] = {}
    for one in endpoints:
        if one.network in networks:
            places.setdefault(one.network, set()).add(one.namespace)
    return {network: frozenset(some) for network, some in places.items()}
