"""Replacement of the key that seals secrets in etcd: all hubs switch to the new key, then one hub reseals each value.

A value names the key that opens it, so an interrupted replacement can start again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import structlog

from imdsproxy.errors import RequestRefused, SourceCorrupt, SourceUnavailable
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import Sealing, View, render_sealing
from imdsproxy.fleet.stream import CONNECT_S
from imdsproxy.hub.api.operations import Operations
from imdsproxy.hub.hosts.sealed import PLACE, open_keys, reseal_password, seal_keys, sealed_keys
from imdsproxy.hub.store.envelope import Envelope, name_of
from imdsproxy.hub.store.etcd_messages import Committed, prefix_end, unchanged
from imdsproxy.hub.store.transactions import Transaction, refuse_suspect

ENVELOPE_PATH: Final = "/fleet/envelope"
_PART_S: Final = 3.0
_AT_ONCE: Final = 8
_LOOKS: Final = 50
_LOOK_EVERY_S: Final = 0.1

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Resealed:
    """Progress of resealing.

    Attributes:
        done: Number of passwords and parts of user data checked so far.
        of: Number of all passwords and parts of user data.
        after: Position for the next request; `None` at the end.
        unreadable: Keys of values in this request that no key of this hub opens; these values stay unchanged.
    """

    key: str
    done: int
    of: int
    changed: int
    after: str | None
    unreadable: tuple[str, ...] = ()


async def reseal(operations: Operations, after: str) -> Resealed:
    """Make all hubs seal with this hub's newest key, then reseal values of other keys for some seconds.

    Args:
        after: Position from the last answer; empty at first.

    Raises:
        ImdsproxyError: Errors of `Writes.write`.
        RequestRefused: A hub lacks the key, or does not answer.
        SourceUnavailable: A hub still seals with another key.
    """
    key, unreadable = list(operations.writes.envelope.keys)[-1], list[str]()
    await _ask_hubs(operations, key)
    sealing = Sealing(key, operations.writes.envelope.fingerprint(key) or "")
    await operations.writes.write(lambda view: _plan_sealing(view, sealing))
    for _ in range(_LOOKS):
        behind = await _ask_hubs(operations, key)
        if operations.writes.envelope.sealing == key and not behind:
            break
        await asyncio.sleep(_LOOK_EVERY_S)
    else:
        names = ", ".join(behind) or operations.peers.name
        raise SourceUnavailable(f"another key seals yet at {names}", hint="try again")
    changed = int(await _reseal_token_keys(operations, key, unreadable))
    sealed = [
        await operations.etcd.read(prefix, prefix_end(prefix), keys_only=True)
        for prefix in (layout.PASSWORDS, layout.BLOBS)
    ]
    keys = sorted(one.key for found in sealed for one in found.kvs)
    left = [one for one in keys if one > after]
    until = operations.clock.monotonic() + _PART_S
    while left and operations.clock.monotonic() < until:
        part, left = left[:_AT_ONCE], left[_AT_ONCE:]
        parts = (_reseal_value(operations, one, key, unreadable) for one in part)
        done = await asyncio.gather(*parts)
        changed, after = changed + sum(done), part[-1]
    _log.info("sealed anew", key=key, done=len(keys) - len(left), of=len(keys))
    return Resealed(
        key,
        len(keys) - len(left),
        len(keys),
        changed,
        after if left else None,
        tuple(map(codec.plain, unreadable)),
    )


async def _ask_hubs(operations: Operations, key: str) -> list[str]:
    """Return the hubs that still seal with another key; raise `RequestRefused` if a hub lacks this key."""
    fingerprint = operations.writes.envelope.fingerprint(key)
    answers = await operations.peers.ask_all(ENVELOPE_PATH, {}, CONNECT_S)
    for name in operations.peers.urls():
        if name not in answers:
            raise RequestRefused(
                f"hub {name} does not answer, and may lack the key {key}",
                hint="start it, or wait fifteen seconds where it is gone",
            )
        keys = answers[name].get("keys")
        if not isinstance(keys, dict) or keys.get(key) != fingerprint:
            raise RequestRefused(
                f"hub {name} does not have the key {key} that seals next",
                hint=f"copy envelope.key to {name}, and restart it",
            )
    return [name for name, one in answers.items() if one.get("sealing") != key]


def _plan_sealing(view: View, sealing: Sealing) -> Transaction:
    unsuspected, found = refuse_suspect(view), view(layout.ENVELOPE)
    value = render_sealing(sealing)
    if found is not None and found[0] == value:
        return Transaction(revision=found[1])
    before = unchanged(layout.ENVELOPE, 0 if found is None else found[1])
    return Transaction((unsuspected, before), {layout.ENVELOPE: value})


async def _reseal_token_keys(operations: Operations, key: str, unreadable: list[str]) -> bool:
    envelope, changed, damaged = operations.writes.envelope, False, False

    def plan(view: View) -> Transaction:
        nonlocal changed, damaged
        unsuspected, found = refuse_suspect(view), view(PLACE)
        changed = damaged = False
        if found is None:
            return Transaction()
        try:
            keys = open_keys(found[0], envelope)
        except SourceCorrupt:
            damaged = True
            return Transaction()
        changed = name_of(sealed_keys(found[0])) != key
        if not changed:
            return Transaction()
        value = seal_keys(keys, envelope)
        return Transaction((unsuspected, unchanged(PLACE, found[1])), {PLACE: value})

    await operations.writes.write(plan)
    unreadable += [PLACE] if damaged else []
    return changed


async def _reseal_value(
    operations: Operations, place: str, key: str, unreadable: list[str]
) -> bool:
    """Reseal a value; return whether this call did. A value that changes meanwhile needs no resealing."""
    etcd, envelope = operations.etcd, operations.writes.envelope
    anew = reseal_password if place.startswith(layout.PASSWORDS) else _reseal_chunk
    for one in (await etcd.read(place)).kvs:
        try:
            value = anew(envelope, place, one.value, key)
        except (SourceCorrupt, codec.Unreadable):
            unreadable.append(place)
            continue
        if value is not None:
            done = await etcd.commit([unchanged(place, one.mod_revision)], {place: value})
            return isinstance(done, Committed)
    return False


def _reseal_chunk(envelope: Envelope, place: str, value: bytes, key: str) -> bytes | None:
    """Reseal a part of user data with `key`; return `None` if the part has that key already."""
    opened = envelope.open(place, value)
    return None if name_of(value) == key else envelope.seal(place, opened)
