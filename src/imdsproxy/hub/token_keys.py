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
from typing import Any, Final

import structlog

from imdsproxy.core.fleet import layout
from imdsproxy.core.fleet.layout import HostId, Json, View
from imdsproxy.core.model import InstanceId
from imdsproxy.core.tokens import KEPT_KEYS, KEY_BYTES, TokenKey, instance_key
from imdsproxy.errors import ImdsproxyError, SourceCorrupt
from imdsproxy.hub.envelope import Envelope
from imdsproxy.hub.etcd_messages import unchanged
from imdsproxy.hub.in_force import NOT_CONNECTED
from imdsproxy.hub.operations import Operations
from imdsproxy.hub.plan_writes import Transaction, refuse_suspect
from imdsproxy.hub.state import FleetState
from imdsproxy.hub.writes import Writes

PLACE: Final = f"{layout.KEYS}tokens"
"""Where all of them are in etcd, so that they change together."""

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

    def end_rotation(self) -> FleetKeys:
        """The pending key signs; as many go on being believed as of a host's own."""
        if self.pending is None:
            return self
        return FleetKeys(self.pending, None, (self.current, *self.old)[: KEPT_KEYS - 1])

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
    """The value of `PLACE`."""
    pending = None if keys.pending is None else keys.pending.text
    shape = {"current": keys.current.text, "pending": pending, "old": [k.text for k in keys.old]}
    sealed = envelope.seal(PLACE, json.dumps(shape).encode())
    return layout.encode({"sealed": base64.b64encode(sealed).decode()})


def sealed_keys(value: bytes) -> bytes:
    """What the envelope opens of it; `SourceCorrupt` where another program wrote it."""
    try:
        return base64.b64decode(str(layout.decode(value)["sealed"]), validate=True)
    except (layout.Unreadable, KeyError, ValueError) as error:
        raise SourceCorrupt(f"{PLACE} is not what hubs write") from error


def open_keys(value: bytes, envelope: Envelope) -> FleetKeys:
    """The reverse of `seal_keys`.

    Raises:
        SourceCorrupt: Another program wrote it, or no key of the envelope opens it.
    """
    shape: dict[str, Any] = json.loads(envelope.open(PLACE, sealed_keys(value)))
    pending = shape["pending"]
    return FleetKeys(
        _key(shape["current"]),
        None if pending is None else _key(pending),
        tuple(map(_key, shape["old"])),
    )


def _key(text: str) -> TokenKey:
    return TokenKey(base64.b64decode(text))


@dataclass(slots=True)
class TokenKeyRing:
    """The keys as this hub's copy of etcd has them."""

    state: FleetState
    envelope: Envelope
    _problem: str | None = None
    _revision: int = 0
    _keys: FleetKeys | None = field(default=None, repr=False)

    def keys(self) -> FleetKeys | None:
        """The newest that can be read."""
        found = self.state.value(PLACE)
        if found is not None and found[1] != self._revision:
            self._revision = found[1]
            try:
                self._keys, self._problem = open_keys(found[0], self.envelope), None
            except SourceCorrupt as error:
                self._problem = error.message
                _log.error("token keys not read", code=error.code, error=error.message)
        return self._keys

    @property
    def problem(self) -> str | None:
        """Why the newest ones cannot be read; those before them are in force."""
        self.keys()
        return self._problem

    def item_of(self, instance: InstanceId) -> Json | None:
        """As `FleetKeys.item_of`; `None` while there are no keys."""
        keys = self.keys()
        return None if keys is None else keys.item_of(instance)


def _fresh() -> TokenKey:
    return TokenKey(os.urandom(KEY_BYTES))


async def make_first_key(writes: Writes) -> None:
    """Have a key in etcd, if there is none; again until it is there."""

    def plan(view: View) -> Transaction:
        unsuspected = refuse_suspect(view)
        if view(PLACE) is not None:
            return Transaction()
        value = seal_keys(FleetKeys(_fresh()), writes.envelope)
        return Transaction((unsuspected, unchanged(PLACE, 0)), {PLACE: value})

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

    Raises:
        ImdsproxyError: As `Writes.put`; `SourceCorrupt` where the keys cannot be opened.
    """
    fresh = _fresh()
    keys, waiting = await _change(operations, lambda keys: keys.begin_rotation(fresh))
    if not all(why == NOT_CONNECTED for why in waiting.values()):
        return _rotation(keys, waiting, applied=False)
    keys, waiting = await _change(operations, FleetKeys.end_rotation)
    # Who is not connected gets it with the next stream, and until then goes on by keys that are believed.
    return _rotation(keys, waiting, applied=all(one == NOT_CONNECTED for one in waiting.values()))


def _rotation(keys: FleetKeys, waiting: Mapping[HostId, str], *, applied: bool) -> FleetKeyRotation:
    pending = tuple(f"host {host}: {why}" for host, why in waiting.items())
    kid = (keys.pending or keys.current).kid
    count = 1 + len(keys.old) + (keys.pending is not None)
    return FleetKeyRotation(kid, count, "the fleet's etcd", applied, pending)


async def _change(
    operations: Operations, change: Callable[[FleetKeys], FleetKeys]
) -> tuple[FleetKeys, Mapping[HostId, str]]:
    """Change the keys; those that are in etcd now, and hosts that have them not yet, with the reasons."""
    writes, first = operations.writes, FleetKeys(_fresh())
    after = first

    def plan(view: View) -> Transaction:
        nonlocal after
        unsuspected = refuse_suspect(view)
        found = view(PLACE)
        before = first if found is None else open_keys(found[0], writes.envelope)
        revision = 0 if found is None else found[1]
        after = change(before)
        if after == before and found is not None:
            return Transaction(revision=revision)
        compares = unsuspected, unchanged(PLACE, revision)
        return Transaction(compares, {PLACE: seal_keys(after, writes.envelope)})

    done = await writes.write(plan)
    hosts, state = operations.state.enrolled(), operations.state
    items = {f"keys/{one}" for host in hosts for one in state.instances_on(host)}
    return after, await operations.in_force.wait(hosts, done.revision, items)
