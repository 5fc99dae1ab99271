"""What operators change about tokens and boots; a change is on disk first, and confirmed by every worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from imdsproxy.app.policy_store import PolicyStore
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import InstanceId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.plan import record_key
from imdsproxy.core.policy import OperatorOverride
from imdsproxy.core.wire import parse_map_value
from imdsproxy.errors import NotFound, Problem
from imdsproxy.host.clock import Clock

_APPLY_DEADLINE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class GuardChange:
    """What an operator did about one instance; it is on disk, and outlives every restart.

    Attributes:
        epoch: How often its tokens were revoked.
        reopened_at: When its boot was opened again, Unix time; `None` for never.
        applied: No worker of HAProxy goes by the state before. Off: it comes in force when `pending` is mended.
        pending: Why it is not in force yet.
        shared: Of a revocation, the file of keys that other hosts have too: none of them hears of it.
    """

    instance: InstanceId
    epoch: int
    reopened_at: int | None = None
    applied: bool = True
    pending: tuple[str, ...] = ()
    shared: str | None = None


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """A fresh key signs tokens.

    Attributes:
        kid: Its name, with which its tokens begin.
        keys: How many keys are believed, with this one.
        file: Where they are.
        applied: Every worker of HAProxy knows it.
        pending: Why not yet.
    """

    kid: str
    keys: int
    file: str
    applied: bool = True
    pending: tuple[str, ...] = ()


@dataclass(slots=True)
class TokenService:
    """Changes what operators decided about single instances, and the keys of session tokens.

    Args:
        unapplied: What keeps changes from guests.
    """

    inventory: Inventory
    records: RecordLoop
    policy_store: PolicyStore
    clock: Clock
    unapplied: Callable[[], tuple[Problem, ...]]
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def revoke(self, instance: InstanceId) -> GuardChange:
        """Revoke the session tokens that the instance has now; fresh ones are good.

        Raises:
            NotFound: No source has the instance, and no operator ever changed anything about it.
            HostRefused: It cannot be written; nothing has changed.
        """
        self._refuse_unknown(instance)
        async with self._lock:
            override = await asyncio.to_thread(self.policy_store.overrides.revoke, instance)
        shared = self.policy_store.keys.shared
        done = await self._in_force(instance, override)
        return done if shared is None else replace(done, shared=str(shared))

    async def reopen(self, instance: InstanceId) -> GuardChange:
        """Let its boot begin now: what is locked after the boot is open until it is over again. Raises as `revoke`."""
        self._refuse_unknown(instance)
        now = int(self.clock.now().timestamp())
        async with self._lock:
            override = await asyncio.to_thread(self.policy_store.overrides.reopen, instance, now)
        return await self._in_force(instance, override)

    async def rotate(self) -> KeyRotation:
        """Let a fresh key sign tokens; those of the two keys before it stay good as long as they would be.

        Raises:
            SecretUnreadable: The file of the keys cannot be used; nothing has changed.
            HostRefused: It cannot be written; nothing has changed.
        """
        keys = self.policy_store.keys
        async with self._lock:
            fresh = await asyncio.to_thread(keys.rotate)
            keys.send()
        done = KeyRotation(fresh.kid, len(keys.keys), str(keys.path))
        try:
            async with asyncio.timeout(_APPLY_DEADLINE_S):
                await keys.confirmed()
        except TimeoutError:
            return replace(done, applied=False, pending=self._unconfirmed())
        return done

    def _refuse_unknown(self, instance: InstanceId) -> None:
        if (
            self.inventory.sources_of_instance(instance)
            or instance in self.policy_store.overrides.overrides
        ):
            return
        missing = [name for name, there in self.inventory.sources.items() if not there]
        hint = "imdsproxy instance list"
        if missing:
            hint = f"source {', '.join(missing)} is not in sync yet and may tell of it: try again"
        raise NotFound(f"there is no instance {instance}", hint=hint)

    async def _in_force(self, instance: InstanceId, override: OperatorOverride) -> GuardChange:
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
        if not self.inventory.in_sync and self._was_in_force(instance, keys):
            pending.append(
                "no source that is in sync reports it: HAProxy keeps the record that it has"
            )
        return GuardChange(
            instance,
            override.epoch,
            override.reopened_at or None,
            applied=not pending,
            pending=tuple(pending),
        )

    def _was_in_force(self, instance: InstanceId, keys: frozenset[AddressKey]) -> bool:
        """Whether HAProxy has the instance at an address that no source tells of now."""
        made_anew = {record_key(key) for key in keys}
        for key, value in self.records.applier.state.entries():
            record = None if key in made_anew else parse_map_value(value)
            if record is not None and record.instance == instance:
                return True
        return False

    def _unconfirmed(self) -> tuple[str, ...]:
        reasons = (problem.reason for problem in self.unapplied())
        return tuple(dict.fromkeys(("the data plane has not confirmed it yet", *reasons)))
