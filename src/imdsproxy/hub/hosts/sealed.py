"""Sealed secrets of guests: the fleet's session token keys, and passwords that guests posted.

Hubs derive keys per instance for hosts. The next key reaches every connected host before it signs, so a token stays
valid wherever its instance moves. A guest encrypts its password with its ssh key. Hubs seal it nevertheless, like every
secret of an instance; each host of the instance gets it, and it is removed with the instance.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog

from imdsproxy.errors import AlreadyExists, ImdsproxyError, NotFound, SourceCorrupt
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Json, attempt
from imdsproxy.fleet.layout import (
    HostId,
    SealedKeys,
    Sealing,
    StoredPassword,
    View,
    is_cleared,
    parse_password,
    parse_sealed_keys,
    render_password,
    render_sealed_keys,
    render_sealing,
)
from imdsproxy.hub.store.envelope import Envelope, name_of
from imdsproxy.hub.store.etcd_messages import unchanged
from imdsproxy.hub.store.state import Item
from imdsproxy.hub.store.transactions import (
    Draft,
    Terms,
    Transaction,
    no_such,
    read_instance,
    refuse_suspect,
)
from imdsproxy.hub.store.writes import Done, Writes
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.tokens import KEPT_KEYS, KEY_BYTES, TokenKey, instance_key
from imdsproxy.reconcile.reconciler import Reconciler

PLACE: Final = layout.TOKEN_KEYS
_ANEW: Final = "`imdsproxy token rotate` writes new keys"

_AGAIN_S: Final = 10.0
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class FleetKeys:
    """Keys from which hubs derive the keys of instances.

    Attributes:
        pending: Key that signs once every connected host has it.
        old: Keys that only verify, the newest first.
    """

    current: TokenKey
    pending: TokenKey | None = None
    old: tuple[TokenKey, ...] = ()

    def begin_rotation(self, fresh: TokenKey) -> FleetKeys:
        """Return the keys with `fresh` pending, unless another key is pending already."""
        return FleetKeys(self.current, self.pending or fresh, self.old)

    def end_rotation(self, confirmed: TokenKey) -> FleetKeys:
        """Make the pending key sign, if it is the confirmed key; keep `KEPT_KEYS` keys, like a single host.

        Another rotation may have ended this one and begun anew: its pending key is not confirmed.
        """
        if self.pending != confirmed:
            return self
        return FleetKeys(confirmed, None, (self.current, *self.old)[: KEPT_KEYS - 1])

    def item_of(self, instance: InstanceId) -> Json:
        pending = () if self.pending is None else (self.pending,)
        own = [instance_key(key, instance) for key in (self.current, *pending, *self.old)]
        kids = [key.kid for key in own]
        return {
            "current": kids[0],
            "keys": {kid: key.text for kid, key in zip(kids, own, strict=True)},
        }


def seal_keys(keys: FleetKeys, envelope: Envelope) -> bytes:
    pending = None if keys.pending is None else keys.pending.text
    shape = {"current": keys.current.text, "pending": pending, "old": [k.text for k in keys.old]}
    return render_sealed_keys(SealedKeys(envelope.seal(PLACE, json.dumps(shape).encode())))


def sealed_keys(value: bytes) -> bytes:
    """Return the sealed part of a value of `layout.TOKEN_KEYS`; raise `SourceCorrupt` if another program wrote it."""
    try:
        return parse_sealed_keys(value).sealed
    except codec.Unreadable as error:
        raise SourceCorrupt(
            f"{PLACE} was written by another program: {error}", hint=_ANEW
        ) from error


def open_keys(value: bytes, envelope: Envelope) -> FleetKeys:
    """Reverse `seal_keys`; raise `SourceCorrupt` for another program's value, or one sealed with a missing key."""
    opened = envelope.open(PLACE, sealed_keys(value))
    try:
        return _parse_keys(json.loads(opened))
    except ValueError:
        # The exception's cause would show a part of the secret.
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
    """Token keys from this hub's copy of etcd; the earlier keys while the newest are unreadable."""

    envelope: Envelope
    _problem: str | None = None
    _looked_at: tuple[bytes, int] | None = None
    _revision: int = 0
    _keys: FleetKeys | None = field(default=None, repr=False)

    def keys(self, view: View) -> FleetKeys | None:
        found = view(PLACE)
        if found is not None and found != self._looked_at:
            self._looked_at = found
            try:
                self._keys, self._revision = open_keys(found[0], self.envelope), found[1]
                self._problem = None
            except SourceCorrupt as error:
                self._problem = error.message
                _log.error("token keys not read", code=error.code, error=error.message)
        return self._keys

    def problem(self, view: View) -> str | None:
        """Return the reason why the envelope does not open the newest keys; the earlier keys are in force then."""
        self.keys(view)
        return self._problem

    def item_of(self, view: View, instance: InstanceId) -> Item | None:
        """Return `FleetKeys.item_of` with the revision of the keys; `None` while there are no keys."""
        keys = self.keys(view)
        return None if keys is None else (self._revision, keys.item_of(instance))


def fresh_key() -> TokenKey:
    return TokenKey(os.urandom(KEY_BYTES))


async def make_first_key(writes: Writes) -> None:
    """Write the first token key and the choice of the sealing key, if absent; retry until etcd has them."""
    envelope = writes.envelope

    def plan(view: View) -> Transaction:
        unsuspected, chosen = refuse_suspect(view), view(layout.ENVELOPE)
        if view(PLACE) is not None:
            return Transaction()
        puts = {PLACE: seal_keys(FleetKeys(fresh_key()), envelope)}
        if chosen is None:
            first = next(iter(envelope.keys))
            sealing = Sealing(first, envelope.fingerprint(first) or "")
            puts[layout.ENVELOPE] = render_sealing(sealing)
        known = unchanged(layout.ENVELOPE, 0 if chosen is None else chosen[1])
        return Transaction((unsuspected, unchanged(PLACE, 0), known), puts)

    rounds = Reconciler(
        "token keys", "no token key yet", _AGAIN_S, _AGAIN_S, retried=ImdsproxyError
    )
    await rounds.attempt(partial(writes.write, plan))


def plan_password(
    view: View,
    instance: InstanceId,
    host: HostId,
    sealed: bytes,
    *,
    is_same: Callable[[bytes], bool],
    terms: Terms,
) -> Transaction:
    """Store a password that a guest posted on a host; `is_same` compares a stored sealed password.

    Raises:
        AlreadyExists: The instance has another password, which stays until an operator clears it.
        NotFound: The host has no such instance.
    """
    draft, stored = Draft(view, terms), read_instance(view, instance)
    if stored is None or host not in stored[0].hosts:
        raise no_such("instance", instance)
    key = layout.password_key(instance)
    found = view(key)
    known = _sealed_in(found)
    if found is not None and known is not None:
        if is_same(known):
            return Transaction(revision=found[1])
        raise AlreadyExists(f"instance {instance} has another password already")
    draft.hold(layout.instance_key(instance))
    draft.hold(key)
    draft.puts[key] = render_password(StoredPassword(sealed, terms.request))
    draft.hosts.update(stored[0].hosts)
    return draft.finish()


def plan_clearing(view: View, instance: InstanceId, terms: Terms) -> Transaction:
    """Clear a password, so that the guest can post another; do nothing if there is none."""
    draft, stored = Draft(view, terms), read_instance(view, instance)
    key = layout.password_key(instance)
    found = view(key)
    if found is not None and is_cleared(found[0]):
        draft.revision = found[1]
    elif found is not None:
        draft.hold(key)
        draft.puts[key] = render_password(StoredPassword(None, terms.request, terms.now))
        draft.hosts.update(() if stored is None else stored[0].hosts)
    return draft.finish()


def _sealed_in(found: tuple[bytes, int] | None) -> bytes | None:
    """Return a sealed password; `None` also for an unreadable value, which a new password replaces."""
    stored = None if found is None else attempt(parse_password, found[0])
    return None if stored is None else stored.sealed


@dataclass(frozen=True, slots=True)
class Passwords:
    writes: Writes

    async def keep(self, instance: InstanceId, host: HostId, password: bytes) -> None:
        """Store a password; raise the errors of `plan_password` and `Writes.write`."""
        key, envelope = layout.password_key(instance), self.writes.envelope
        sealed = envelope.seal(key, password)

        def is_same(known: bytes) -> bool:
            try:
                return envelope.open(key, known) == password
            except SourceCorrupt:
                return False

        terms = self.writes.terms("")
        await self.writes.write(
            lambda view: plan_password(view, instance, host, sealed, is_same=is_same, terms=terms)
        )

    async def clear(self, instance: InstanceId, terms: Terms) -> tuple[Done, bool]:
        """Clear a password, even if unreadable; also return whether there was one."""
        stored = self.writes.state.stored(layout.password_key(instance))
        there = stored is not None and not is_cleared(stored[0])
        return await self.writes.write(lambda view: plan_clearing(view, instance, terms)), there

    def sealed(self, instance: InstanceId) -> bytes | None:
        found = self.writes.state.value(layout.password_key(instance))
        return None if found is None else parse_password(found[0]).sealed

    def read(self, instance: InstanceId) -> bytes:
        """Return the password of an instance; raise `NotFound`, or `SourceCorrupt` if no key of this hub opens it."""
        sealed = self.sealed(instance)
        if sealed is None:
            raise NotFound(f"the fleet has no password of instance {instance}")
        return self.writes.envelope.open(layout.password_key(instance), sealed)


def password_item(envelope: Envelope, place: str, sealed: bytes) -> str | None:
    """Return a password in the form for hosts; `None` if no key of the envelope opens it."""
    try:
        return base64.b64encode(envelope.open(place, sealed)).decode()
    except SourceCorrupt:
        return None


def reseal_password(envelope: Envelope, place: str, value: bytes, key: str) -> bytes | None:
    """Reseal a stored password with `key`; return `None` if it has that key already, or if there is no password.

    Raises `SourceCorrupt` if no key of the envelope opens the password.
    """
    stored = parse_password(value)
    if stored.sealed is None:
        return None
    opened = envelope.open(place, stored.sealed)
    if name_of(stored.sealed) == key:
        return None
    return render_password(StoredPassword(envelope.seal(place, opened), stored.request))
