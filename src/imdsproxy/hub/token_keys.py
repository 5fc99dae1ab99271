"""The fleet's keys of session tokens: sealed in etcd, and for hosts made into keys of single instances.

The next key is on every connected host before it signs, so a token is good wherever its instance moves.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from imdsproxy.core.fleet import layout
from imdsproxy.core.fleet.layout import HostId, Json, View
from imdsproxy.core.fleet.values import (
    SealedKeys,
    Sealing,
    parse_sealed_keys,
    render_sealed_keys,
    render_sealing,
)
from imdsproxy.core.model import InstanceId
from imdsproxy.core.tokens import KEPT_KEYS, KEY_BYTES, TokenKey, instance_key
from imdsproxy.errors import ImdsproxyError, SourceCorrupt
from imdsproxy.hub.envelope import Envelope, name_of
from imdsproxy.hub.etcd_messages import unchanged
from imdsproxy.hub.in_force import NOT_CONNECTED
from imdsproxy.hub.operations import Operations
from imdsproxy.hub.plan_writes import Transaction, refuse_suspect
from imdsproxy.hub.state import FleetState, Item
from imdsproxy.hub.writes import Writes

PLACE: Final = layout.TOKEN_KEYS
_ANEW: Final = "`imdsproxy token rotate` writes keys anew"

_AGAIN_S: Final = 10.0
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class FleetKeys:
    """The keys that make those of instances.

    Attributes:
        current: Signs.
        pending: Signs once every connected host has it.
        old: Are believed, the last one first.
    """

    current: TokenKey
    pending: TokenKey | None = None
    old: tuple[TokenKey, ...] = ()

    def begin_rotation(self, fresh: TokenKey) -> FleetKeys:
        """With `fresh` as the next one, unless one is pending already."""
        return FleetKeys(self.current, self.pending or fresh, self.old)

    def end_rotation(self, confirmed: TokenKey) -> FleetKeys:
        """Let the pending key sign, if it is the one that hosts confirmed; as many are believed as of a host's own.

        Another rotation may have ended this one and begun anew: its pending key is not confirmed.
        """
        if self.pending != confirmed:
            return self
        return FleetKeys(confirmed, None, (self.current, *self.old)[: KEPT_KEYS - 1])

    def item_of(self, instance: InstanceId) -> Json:
        """What hosts get for an instance (`core.fleet.stream`)."""
        pending = () if self.pending is None else (self.pending,)
        own = [instance_key(key, instance) for key in (self.current, *pending, *self.old)]
        kids = [key.kid for key in own]
        return {
            "current": kids[0],
            "keys": {kid: key.text for kid, key in zip(kids, own, strict=True)},
        }


def seal_keys(keys: FleetKeys, envelope: Envelope) -> bytes:
    """The value of `layout.TOKEN_KEYS`."""
    pending = None if keys.pending is None else keys.pending.text
    shape = {"current": keys.current.text, "pending": pending, "old": [k.text for k in keys.old]}
    return render_sealed_keys(SealedKeys(envelope.seal(PLACE, json.dumps(shape).encode())))


def sealed_keys(value: bytes) -> bytes:
    """What the envelope opens of it; `SourceCorrupt` where another program wrote it."""
    try:
        return parse_sealed_keys(value).sealed
    except layout.Unreadable as error:
        raise SourceCorrupt(f"{PLACE} is not what hubs write: {error}", hint=_ANEW) from error


def open_keys(value: bytes, envelope: Envelope) -> FleetKeys:
    """The reverse of `seal_keys`.

    Raises:
        SourceCorrupt: Another program wrote it, or no key of the envelope opens it.
    """
    opened = envelope.open(PLACE, sealed_keys(value))
    try:
        return _parse_keys(json.loads(opened))
    except ValueError:
        # Its cause would show a part of the secret.
        raise SourceCorrupt(f"{PLACE} has no keys that this version reads", hint=_ANEW) from None


def _parse_keys(shape: object) -> FleetKeys:
    match shape:
        case {"current": current, "pending": pending, "old": list(old)}:
            following = None if pending is None else _key(pending)
            return FleetKeys(_key(current), following, tuple(map(_key, old)))
        case _:
            raise ValueError("no keys")


def _key(text: object) -> TokenKey:
    secret = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    if len(secret) != KEY_BYTES:
        raise ValueError("no key")
    return TokenKey(secret)


@dataclass(slots=True)
class TokenKeyRing:
    """The keys as this hub's copy of etcd has them; those of before while the newest cannot be read."""

    state: FleetState
    envelope: Envelope
    _problem: str | None = None
    _looked_at: tuple[bytes, int] | None = None
    _revision: int = 0
    _keys: FleetKeys | None = field(default=None, repr=False)

    def keys(self) -> FleetKeys | None:
        """The newest that can be read."""
        found = self.state.value(PLACE)
        if found is not None and found != self._looked_at:
            self._looked_at = found
            try:
                self._keys, self._revision = open_keys(found[0], self.envelope), found[1]
                self._problem = None
            except SourceCorrupt as error:
                self._problem = error.message
                _log.error("token keys not read", code=error.code, error=error.message)
        return self._keys

    @property
    def problem(self) -> str | None:
        """Why the newest ones cannot be read; those before them are in force."""
        self.keys()
        unread = self.state.unreadable.get(PLACE)
        return self._problem if unread is None else f"{PLACE} is not what hubs write: {unread.why}"

    def item_of(self, instance: InstanceId) -> Item | None:
        """As `FleetKeys.item_of`, with the revision of the keys that it is made of; `None` while there are no keys."""
        keys = self.keys()
        return None if keys is None else (self._revision, keys.item_of(instance))


def _fresh() -> TokenKey:
    return TokenKey(os.urandom(KEY_BYTES))


async def make_first_key(writes: Writes) -> None:
    """Have a key in etcd, if there is none, and say which key seals; again until it is there."""
    envelope = writes.envelope

    def plan(view: View) -> Transaction:
        unsuspected, chosen = refuse_suspect(view), view(layout.ENVELOPE)
        if view(PLACE) is not None:
            return Transaction()
        puts = {PLACE: seal_keys(FleetKeys(_fresh()), envelope)}
        if chosen is None:
            first = next(iter(envelope.keys))
            sealing = Sealing(first, envelope.fingerprint(first) or "")
            puts[layout.ENVELOPE] = render_sealing(sealing)
        known = unchanged(layout.ENVELOPE, 0 if chosen is None else chosen[1])
        return Transaction((unsuspected, unchanged(PLACE, 0), known), puts)

    while True:
        try:
            await writes.write(plan)
        except ImdsproxyError as error:
            _log.warning("no token key yet", code=error.code, error=error.message)
            await asyncio.sleep(_AGAIN_S)
            continue
        return


@dataclass(frozen=True, slots=True)
class FleetKeyRotation:
    """A fresh key of the fleet signs tokens; each instance has a key of its own that is made of it.

    Attributes:
        kid: Its name. Tokens begin with names of the instances' keys.
        keys: How many keys are believed, with this one.
        file: Where they are.
        applied: It signs on every host that is connected.
        pending: Hosts that have it not yet, and why. While one is connected, the key before goes on signing, and the
            same request goes on from there.
    """

    kid: str
    keys: int
    file: str
    applied: bool = True
    pending: tuple[str, ...] = ()


async def rotate_keys(operations: Operations) -> FleetKeyRotation:
    """Have a fresh key on every connected host, then let it sign.

    Keys that another program damaged in etcd are written anew: those that this hub had before, else fresh ones.

    Raises:
        ImdsproxyError: As `Writes.put`; `SourceCorrupt` where this hub lacks the key that opens them.
    """
    fresh = _fresh()
    keys, waiting = await _change(operations, lambda keys: keys.begin_rotation(fresh))
    key = keys.pending or fresh
    if not all(why == NOT_CONNECTED for why in waiting.values()):
        return _rotation(key, keys, waiting, applied=False)
    keys, waiting = await _change(operations, lambda keys: keys.end_rotation(key))
    # Who is not connected gets it with the next stream, and until then goes on by keys that are believed.
    applied = all(one == NOT_CONNECTED for one in waiting.values())
    return _rotation(key, keys, waiting, applied=applied)


def _rotation(
    key: TokenKey, keys: FleetKeys, waiting: Mapping[HostId, str], *, applied: bool
) -> FleetKeyRotation:
    pending = tuple(f"host {host}: {why}" for host, why in waiting.items())
    count = 1 + len(keys.old) + (keys.pending is not None)
    return FleetKeyRotation(key.kid, count, "the fleet's etcd", applied, pending)


async def _change(
    operations: Operations, change: Callable[[FleetKeys], FleetKeys]
) -> tuple[FleetKeys, Mapping[HostId, str]]:
    """Change the keys; those that are in etcd now, and hosts that have them not yet, with the reasons."""
    writes, first = operations.writes, FleetKeys(_fresh())
    ring = operations.token_keys
    last = None if ring is None else ring.keys()
    after = first

    def plan(view: View) -> Transaction:
        nonlocal after
        unsuspected = refuse_suspect(view)
        found, before = view(PLACE), first
        revision = 0 if found is None else found[1]
        if found is not None:
            try:
                before = open_keys(found[0], writes.envelope)
            except SourceCorrupt:
                if _may_open_elsewhere(found[0], writes.envelope):
                    raise
                before, found = last or first, None
        after = change(before)
        if after == before and found is not None:
            return Transaction(revision=revision)
        compares = unsuspected, unchanged(PLACE, revision)
        return Transaction(compares, {PLACE: seal_keys(after, writes.envelope)})

    done = await writes.write(plan)
    hosts, state = operations.state.enrolled(), operations.state
    items = {f"keys/{one}" for host in hosts for one in state.instances_on(host)}
    return after, await operations.in_force.wait(hosts, done.revision, items)


def _may_open_elsewhere(value: bytes, envelope: Envelope) -> bool:
    """Whether another hub may have the key that opens a value: this hub must not write over it."""
    try:
        return name_of(parse_sealed_keys(value).sealed) not in envelope.keys
    except layout.Unreadable:
        return False
