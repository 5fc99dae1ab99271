"""Keys of an issuer by their state: the next key, the key that signs, and earlier keys that verifiers still need."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Final

_FORMAT: Final = 1
_EARLY_S: Final = 60
SET_CLOCK: Final = "set the clock; if it is right, a wrong one made the key: imdsproxy identity rotate --compromised"


class KeyState(StrEnum):
    SIGNING = "signing"
    """Signs every token; it is the first key of the issuer's documents."""

    NEXT = "next"
    """In the documents, so that verifiers know it before it signs."""

    OLD = "old"
    """In the documents for tokens that it has signed."""


_ORDER: Final = (KeyState.SIGNING, KeyState.NEXT, KeyState.OLD)


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key of the ring; `since` is the time of its last change of state, Unix time."""

    id: str
    state: KeyState
    since: int


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys of an issuer, the signing one first; `sequence` grows with each change."""

    entries: tuple[KeyEntry, ...] = ()
    sequence: int = 0

    @property
    def signing(self) -> str | None:
        return next((one.id for one in self.entries if one.state is KeyState.SIGNING), None)

    def explain_early(self, now: int) -> str | None:
        """Return the reason why no key may sign at this time: the clock is before the signing key's time."""
        since = next((one.since for one in self.entries if one.state is KeyState.SIGNING), now)
        if now >= since - _EARLY_S:
            return None
        return f"the clock is wrong: {since - now} s before the time since which its key signs"

    def add(self, key: str, now: int) -> "KeyRing":
        """Add a key: the first signs, each other is the next one, in place of an earlier next one."""
        if self.signing is None:
            return self._with(self.entries, KeyEntry(key, KeyState.SIGNING, now))
        kept = tuple(one for one in self.entries if one.state is not KeyState.NEXT)
        return self._with(kept, KeyEntry(key, KeyState.NEXT, now))

    def promote(self, key: str, now: int) -> "KeyRing":
        """Make a key of the ring the signing one; the signing one becomes old. Nothing changes if it signs already."""
        if self.signing == key or key not in {one.id for one in self.entries}:
            return self
        rest = (one for one in self.entries if one.id != key)
        entries = tuple(
            replace(one, state=KeyState.OLD, since=now) if one.state is KeyState.SIGNING else one
            for one in rest
        )
        return self._with(entries, KeyEntry(key, KeyState.SIGNING, now))

    def prefer(self, key: str, held: Collection[str], now: int) -> "KeyRing":
        """Begin to sign with a key: at once if the signing key is gone or this key is an old one, else as the next one.

        Args:
            held: Keys that the signer has. The others leave the ring.
        """
        ids = {one.id for one in self.entries}
        ring = self if key in ids else self.add(key, now)
        state = next(one.state for one in ring.entries if one.id == key)
        if state is KeyState.OLD or ring.signing not in held:
            ring = ring.promote(key, now)
        others = {one.id for one in ring.entries if one.state is KeyState.NEXT} - {key}
        return ring.drop(others | (ids - {*held}))

    def drop(self, keys: Collection[str]) -> "KeyRing":
        """Remove keys that do not sign."""
        gone = {one.id for one in self.entries if one.id in keys} - {self.signing}
        if not gone:
            return self
        kept = tuple(one for one in self.entries if one.id not in gone)
        return KeyRing(kept, self.sequence + 1)

    def render(self) -> bytes:
        shape = {"format": _FORMAT, "sequence": self.sequence, "keys": [*map(asdict, self.entries)]}
        return json.dumps(shape, indent=1).encode("ascii")

    def _with(self, others: tuple[KeyEntry, ...], entry: KeyEntry) -> "KeyRing":
        entries = sorted((*others, entry), key=lambda one: _ORDER.index(one.state))
        return KeyRing(tuple(entries), self.sequence + 1)


def parse_ring(content: bytes) -> KeyRing:
    """Parse the result of `KeyRing.render`; raise `ValueError` if it is damaged."""
    try:
        shape = json.loads(content)
        if shape["format"] != _FORMAT:
            raise ValueError(f"it has format {shape['format']}, not {_FORMAT}")
        entries = (
            KeyEntry(one["id"], KeyState(one["state"]), one["since"]) for one in shape["keys"]
        )
        return KeyRing(tuple(entries), shape["sequence"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no ring of keys: {error}") from error
