"""Rotation of an issuer's keys: when the next key signs, and when an old key goes."""

from dataclasses import dataclass
from typing import Final

from imdsproxy.issuer.ring import KeyEntry, KeyRing, KeyState

MARGIN_S: Final = 300
"""Seconds for which an old key stays beyond the last token that it has signed: verifiers have leeway."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of a rotation.

    Attributes:
        cache_s: Longest time for which a verifier keeps the issuer's keys.
        lifetime_s: Longest life of a token.
    """

    cache_s: int
    lifetime_s: int

    def due_at(self, entry: KeyEntry) -> int | None:
        """Return the time of a key's next change of state, Unix time; `None` for the key that signs."""
        match entry.state:
            case KeyState.SIGNING:
                return None
            case KeyState.NEXT:
                # Twice: a verifier may have read the keys just before the next one was published.
                return entry.since + 2 * self.cache_s
            case KeyState.OLD:
                return entry.since + self.lifetime_s + MARGIN_S


def plan_rotation(ring: KeyRing, pace: Pace, now: int) -> KeyRing:
    """Return the ring after the changes that are due; the same ring if there are none."""
    for entry in ring.entries:
        due = pace.due_at(entry)
        if due is None or due > now:
            continue
        promoted = entry.state is KeyState.NEXT
        ring = ring.promote(entry.id, now) if promoted else ring.drop([entry.id])
    return ring
