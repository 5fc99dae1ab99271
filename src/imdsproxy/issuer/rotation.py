"""Rotation of an issuer's keys: when the next key signs, and when an old key goes."""

import hashlib
from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

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


def ends_tokens(before: KeyRing, after: KeyRing, pace: Pace, now: int) -> bool:
    """Return whether a key is gone whose tokens may still be valid: replaced, or removed before its time."""
    kept = {one.id for one in after.entries}
    for entry in before.entries:
        due = pace.due_at(entry)
        if entry.id not in kept and entry.state is not KeyState.NEXT and (due is None or now < due):
            return True
    return False


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """Key of the issuer.

    Attributes:
        id: Member `kid` of its JWK, and of each token's header.
        state: `signing`, `next` or `old`.
        since: Time of its last change of state, Unix time.
        due_at: Time of its next change of state: `next` signs, `old` is removed; `None` for the key that signs.
        sha1: Thumbprint of its certificate, 40 hexadecimal digits, as Ceph's RGW and AWS take it.
        jwk: Public key (RFC 7517).
    """

    id: str
    algorithm: str
    state: str
    since: int
    due_at: int | None
    sha1: str
    jwk: dict[str, str | list[str]]


@dataclass(frozen=True, slots=True)
class IssuerKeys:
    """Keys of the issuer, the signing key first."""

    issuer: str
    keys: tuple[IssuerKey, ...]


def describe_keys(
    issuer: str, ring: KeyRing, jwks: Iterable[Mapping[str, Any]], pace: Pace
) -> IssuerKeys:
    """Describe the keys of a ring for operators; `jwks` has the public keys in the ring's order."""
    found = (
        IssuerKey(
            entry.id,
            jwk["alg"],
            entry.state.value,
            entry.since,
            pace.due_at(entry),
            hashlib.sha1(b64decode(jwk["x5c"][0]), usedforsecurity=False).hexdigest(),
            dict(jwk),
        )
        for entry, jwk in zip(ring.entries, jwks, strict=True)
    )
    return IssuerKeys(issuer, tuple(found))
