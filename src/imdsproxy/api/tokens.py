"""Operators' changes to tokens and boots. A change is first written to disk, then confirmed by every worker."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from imdsproxy.api.records import no_such
from imdsproxy.controller.in_force import UNCONFIRMED
from imdsproxy.controller.parts import Parts
from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.controller.record_plan import record_key
from imdsproxy.errors import SourceRefused
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.wire import parse_map_value
from imdsproxy.reconcile.part import Impact, list_problems

_APPLY_DEADLINE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class OverrideChange:
    """An operator's change to one instance, stored on disk and kept over restarts.

    Attributes:
        epoch: How often the instance's tokens were revoked.
        reopened_at: Unix time when the boot was last reopened; `None` for never.
        applied: No worker of HAProxy uses the previous state. If false, the change takes effect once `pending` is
            resolved.
        pending: Reasons why the change is not in force yet.
        shared: For a revocation, the key file shared with other hosts, which the revocation does not reach.
    """

    instance: InstanceId
    epoch: int
    reopened_at: int | None = None
    applied: bool = True
    pending: tuple[str, ...] = ()
    shared: str | None = None


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """A new key that signs tokens.

    Attributes:
        kid: The key's name, with which its tokens begin.
        keys: Number of valid keys, with this one.
        of_fleet: Number of instances that keep using keys of a fleet.
        applied: Every worker of HAProxy has the key.
        pending: Reasons why some worker does not have the key yet.
    """

    kid: str
    keys: int
    file: str
    applied: bool = True
    pending: tuple[str, ...] = ()
    of_fleet: int = 0


async def revoke_tokens(parts: Parts, instance: InstanceId) -> OverrideChange:
    """Revoke the instance's current session tokens; tokens issued later are valid.

    Raises:
        NotFound: No source has the instance, and no operator ever changed anything about it.
        SourceRefused: The instance is a fleet's: after a move to another host its old tokens would be valid again.
        HostRefused: The file cannot be written; nothing has changed.
    """
    shared = parts.policy_store.keys.shared
    change = await _override(parts, instance, parts.policy_store.revoke)
    return replace(change, shared=None if shared is None else str(shared))


async def reopen_boot(parts: Parts, instance: InstanceId) -> OverrideChange:
    """Begin the boot again: access that ends with the boot is open until it is over. Raises as `revoke_tokens`."""
    now = int(parts.clock.now().timestamp())
    reopen = partial(parts.policy_store.reopen, now=now)
    return await _override(parts, instance, reopen)


async def rotate_keys(parts: Parts) -> KeyRotation:
    """Sign tokens with a new key; tokens of the two keys before it stay valid until they expire.

    The key is this host's own: a fleet's instances have keys that the fleet's operators replace.

    Raises:
        SecretUnreadable: The key file cannot be used; nothing has changed.
        HostRefused: The key file cannot be written; nothing has changed.
    """
    keys = parts.policy_store.keys
    async with parts.overriding:
        fresh = await asyncio.to_thread(keys.rotate)
        keys.send()
    pending = await _pending(parts, keys.confirmed())
    applied, of_fleet = not pending, len(parts.policy_store.fleet.keys)
    return KeyRotation(fresh.kid, len(keys.keys), str(keys.path), applied, pending, of_fleet)


async def _override(
    parts: Parts, instance: InstanceId, change: Callable[..., OperatorOverride]
) -> OverrideChange:
    records, inventory = parts.records, parts.inventory
    overridden = instance in parts.policy_store.overrides
    if not (overridden or inventory.sources_of_instance(instance)):
        missing = ", ".join(name for name, one in inventory.reports.items() if not one.in_sync)
        late = f"source {missing} is not in sync yet and may report the instance: try again"
        raise no_such("instance", instance, late if missing else "")
    if parts.policy_store.is_of_fleet(instance):
        raise SourceRefused(
            f"instance {instance} is a fleet's: its tokens and its boot are the same on each of the fleet's hosts",
            hint="the same command with --fleet URL, where a hub is",
        )
    # Sources may report while the file is written.
    here = frozenset(inventory.instances) if inventory.in_sync else None
    async with parts.overriding:
        override = await asyncio.to_thread(change, instance, here=here)
    keys = records.addresses_of(instance)
    for key in keys:
        records.touch(key)
    pending = await _pending(parts, records.tickets.wait(records.tickets.given))
    if not inventory.in_sync and _was_in_force(records, instance, keys):
        kept = "no source in sync reports the instance: HAProxy keeps its present record"
        pending = (*pending, kept)
    reopened_at = override.reopened_at or None
    return OverrideChange(instance, override.epoch, reopened_at, not pending, pending)


def _was_in_force(records: RecordLoop, instance: InstanceId, keys: frozenset[AddressKey]) -> bool:
    """Return whether HAProxy has the instance at an address that no source reports now."""
    made_anew = {record_key(key) for key in keys}
    entries = records.applier.state.entries()
    found = (parse_map_value(value) for key, value in entries if key not in made_anew)
    return any(record is not None and record.instance == instance for record in found)


async def _pending(parts: Parts, confirmation: Awaitable[object]) -> tuple[str, ...]:
    try:
        async with asyncio.timeout(_APPLY_DEADLINE_S):
            await confirmation
    except TimeoutError:
        reasons = (problem.reason for problem in list_problems(parts.all(), Impact.DELAYS))
        return tuple(dict.fromkeys((UNCONFIRMED, *reasons)))
    return ()
