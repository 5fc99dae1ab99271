"""Rotation of the fleet's token keys: every connected host has the next key before it signs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from imdsproxy.errors import SourceCorrupt
from imdsproxy.fleet import codec
from imdsproxy.fleet.layout import HostId, View, parse_sealed_keys
from imdsproxy.hub.api.operations import Operations
from imdsproxy.hub.hosts.in_force import NOT_CONNECTED
from imdsproxy.hub.hosts.sealed import PLACE, FleetKeys, fresh_key, open_keys, seal_keys
from imdsproxy.hub.store.envelope import Envelope, name_of
from imdsproxy.hub.store.etcd_messages import unchanged
from imdsproxy.hub.store.transactions import Transaction, refuse_suspect
from imdsproxy.model.tokens import TokenKey


@dataclass(frozen=True, slots=True)
class FleetKeyRotation:
    """Result of a key rotation: hubs derive a key of each instance from the fleet's new key.

    Attributes:
        kid: Name of the new key. Tokens begin with the names of instances' keys.
        keys: Number of keys that verify tokens, including the new key.
        applied: Whether the new key signs on every connected host.
        pending: Hosts that lack the new key. While one is connected, the old key signs: repeat the request.
    """

    kid: str
    keys: int
    file: str
    applied: bool = True
    pending: tuple[str, ...] = ()


async def rotate_keys(operations: Operations) -> FleetKeyRotation:
    """Send a fresh key to every connected host, then make it sign.

    If another program damaged the keys in etcd, the hub writes its last known keys again, or fresh keys.

    Raises:
        ImdsproxyError: Errors of `Writes.write`; `SourceCorrupt` if this hub lacks the envelope key.
    """
    fresh = fresh_key()
    keys, waiting = await _change(operations, lambda keys: keys.begin_rotation(fresh))
    key = keys.pending or fresh
    if not all(why == NOT_CONNECTED for why in waiting.values()):
        return _rotation(key, keys, waiting, applied=False)
    keys, waiting = await _change(operations, lambda keys: keys.end_rotation(key))
    # A host that is not connected gets the key with its next stream, and signs with an old key until then.
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
    """Change the keys; return the new keys, and the hosts that lack them, with reasons."""
    writes, first = operations.writes, FleetKeys(fresh_key())
    ring = operations.token_keys
    last = None if ring is None else ring.keys(operations.state.value)
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
    """Return whether another hub may have the key for a value, which this hub must not replace then."""
    try:
        return name_of(parse_sealed_keys(value).sealed) not in envelope.keys
    except codec.Unreadable:
        return False
