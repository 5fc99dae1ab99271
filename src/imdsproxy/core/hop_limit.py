"""The hop limit of an answer that holds a session token, as map values have it.

HAProxy cannot set a packet's TTL. It can set a DSCP on a connection without any privilege; a rule in the kernel
(`anti_spoofing.hop_rules`) turns the DSCP into the TTL or hop limit. Without that rule the answer would go as far as
any other, so where it is missing the record has `WITHHELD` in place of the limit, and no token is given.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.policy_word import HOP_LIMIT, word_of
from imdsproxy.core.wire import ANSWER_DSCP

UNLIMITED: Final = 64
"""The kernel's own default; such an answer gets no DSCP."""

WITHHELD: Final = 0
"""No token is given."""

NEXT_TO_MARK: Final = ANSWER_DSCP - 1
"""The DSCP is the limit itself. `ANSWER_DSCP` is taken, so a limit of that value becomes one less."""


def limit_of(value: str | None) -> int:
    """The hop limit in a map value (`core.wire.render_map_value`)."""
    word = word_of(value or "")
    return int(HOP_LIMIT.read(word)) if word else UNLIMITED


def withhold(value: str) -> str:
    """The same map value, or policy word, where no token is given."""
    word = word_of(value)
    return HOP_LIMIT.replace(word, str(WITHHELD)) + value.removeprefix(word)
