"""What operators do about tokens and boots: on disk first, and back only when no worker of HAProxy goes by the old."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from imdsproxy.admin.operations import GuardChange, KeyRotation
from imdsproxy.app.guarding import Guarding
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import InstanceId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.plan import record_key
from imdsproxy.core.policy import Guard
from imdsproxy.core.wire import parse_map_value
from imdsproxy.errors import NotFound, Problem
from imdsproxy.host.clock import Clock

__all__ = ["GuardWrites"]

_APPLY_DEADLINE_S: Final = 10.0


@dataclass(slots=True)
class GuardWrites:
    """The part of `imdsproxy.admin.operations.Operations` that changes guards and token keys.

    Args:
        problems: What keeps the data plane from being as it should.
    """

    inventory: Inventory
    records: RecordLoop
    guarding: Guarding
    clock: Clock
    problems: Callable[[], tuple[Problem, ...]]
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def revoke(self, instance: InstanceId) -> GuardChange:
        """See `Operations.revoke_tokens`."""
        self._refuse_unknown(instance)
        async with self._lock:
            guard = await asyncio.to_thread(self.guarding.guards.revoke, instance)
        shared = self.guarding.keys.shared
        done = await self._in_force(instance, guard)
        return done if shared is None else replace(done, shared=str(shared))

    async def reopen(self, instance: InstanceId) -> GuardChange:
        """See `Operations.reopen_instance`."""
        self._refuse_unknown(instance)
        now = int(self.clock.now().timestamp())
        async with self._lock:
            guard = await asyncio.to_thread(self.guarding.guards.reopen, instance, now)
        return await self._in_force(instance, guard)

    async def rotate(self) -> KeyRotation:
        """See `Operations.rotate_token_keys`."""
        keys = self.guarding.keys
        async with self._lock:
            fresh = await asyncio.to_thread(keys.rotate)
            keys.tell()
        done = KeyRotation(fresh.kid, len(keys.keys), str(keys.path))
        try:
            async with asyncio.timeout(_APPLY_DEADLINE_S):
                await keys.told()
        except TimeoutError:
            return replace(done, applied=False, pending=self._unconfirmed())
        return done

    def _refuse_unknown(self, instance: InstanceId) -> None:
        if self.inventory.sources_of_instance(instance) or instance in self.guarding.guards.guards:
            return
        missing = [name for name, there in self.inventory.sources.items() if not there]
        hint = "imdsproxy instance list"
        if missing:
            hint = f"source {', '.join(missing)} is not in sync yet and may tell of it: try again"
        raise NotFound(f"there is no instance {instance}", hint=hint)

    async def _in_force(self, instance: InstanceId, guard: Guard) -> GuardChange:
        learned = self.records.learned.items()
        keys = self.inventory.addresses_of(instance)
        keys |= {key for key, entry in learned if entry.instance == instance}
        for key in keys:
            self.records.touch(key)
        pending: list[str] = []
        try:
            async with asyncio.timeout(_APPLY_DEADLINE_S):
                await self.records.tickets.wait(self.records.tickets.given)
        except TimeoutError:
            pending += self._unconfirmed()
        if not self.inventory.in_sync and self._told_before(instance, keys):
            pending.append(
                "no source that is in sync tells of it: HAProxy goes on with what it was told before"
            )
        return GuardChange(
            instance,
            guard.epoch,
            guard.reopened_at or None,
            applied=not pending,
            pending=tuple(pending),
        )

    def _told_before(self, instance: InstanceId, keys: frozenset[AddressKey]) -> bool:
        """Whether HAProxy has the instance at an address that no source tells of now."""
        made_anew = {record_key(key) for key in keys}
        for key, value in self.records.applier.state.entries():
            record = None if key in made_anew else parse_map_value(value)
            if record is not None and record.instance == instance:
                return True
        return False

    def _unconfirmed(self) -> tuple[str, ...]:
        reasons = (problem.reason for problem in self.problems())
        return tuple(dict.fromkeys(("the data plane has not confirmed it yet", *reasons)))
