"""Synchronisation of guests' passwords with a fleet: to files on each of their hosts, and from here to the hubs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeAlias

import structlog

from imdsproxy.documents.store import PasswordStore
from imdsproxy.errors import ImdsproxyError, SourceRefused
from imdsproxy.fleet.guests import Forget, Keep, Send, plan_password
from imdsproxy.model.entities import InstanceId
from imdsproxy.reconcile.reconciler import Reconciler

SendPassword: TypeAlias = Callable[[InstanceId, bytes], Awaitable[None]]
"""Sends a password to a hub; raises `SourceRefused` if the fleet accepts none, or has another."""

_LOOK_EVERY_S: Final = 1.0

_log = structlog.get_logger()


@dataclass(slots=True)
class FleetPasswords:
    """Synchroniser of the password files with the fleet.

    Args:
        store: Files in which the document server stores posted passwords.
        group: Group id that may read the files; `None` for this process's.
    """

    store: PasswordStore
    group: int | None
    _fleet: Mapping[InstanceId, bytes | None] = field(default_factory=dict, repr=False)
    _before: dict[InstanceId, bytes | None] = field(default_factory=dict, repr=False)
    _refused: dict[InstanceId, bytes] = field(default_factory=dict, repr=False)
    _seen: int | None = None
    _sending: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def forget(self, instance: InstanceId) -> bool:
        """Remove a password that no hub has yet; return `False` if there is none.

        Raises:
            SourceRefused: The fleet has the password, and so has each host of the instance.
            HostRefused: See `PasswordStore.remove`.
        """
        # Wait for a transfer under way: the hub then has the password, and the caller must clear it there.
        async with self._sending:
            if self._fleet.get(instance):
                raise SourceRefused(
                    f"the password of instance {instance} is a fleet's: it is on each of its hosts",
                    hint="the same command with --fleet URL, where a hub is",
                )
            return await asyncio.to_thread(self.store.remove, instance)

    async def take(self, fleet: Mapping[InstanceId, bytes | None]) -> None:
        """Write the fleet's passwords of the instances on this host to the files."""
        before, self._fleet = self._fleet, dict(fleet)
        self._before = {one: self._before.get(one) or before.get(one) for one in fleet}
        changed = [one for one, password in fleet.items() if before.get(one) != password]
        self._refused = {one: self._refused[one] for one in self._refused.keys() & fleet.keys()}
        for instance in changed:
            self._refused.pop(instance, None)
        self._seen = None
        for instance in changed:
            try:
                await self._settle(instance, None)
            except ImdsproxyError as error:
                _log.error("password not kept", instance=instance, error=error.message)

    async def run(self, send: SendPassword) -> None:
        rounds = Reconciler(
            "passwords", "passwords not sent", _LOOK_EVERY_S, 30.0, retried=ImdsproxyError
        )
        while True:
            await rounds.attempt(partial(self.look, send))
            await asyncio.sleep(_LOOK_EVERY_S)

    async def look(self, send: SendPassword) -> None:
        """Synchronise each password that may have changed.

        Raises:
            ImdsproxyError: No hub is reachable, or the disk refuses.
        """
        seen = await asyncio.to_thread(self.store.changed_at)
        if seen == self._seen:
            return
        here = await asyncio.to_thread(self.store.instances)
        for instance in (*self._fleet,):
            if instance in here or self._fleet.get(instance):
                await self._settle(instance, send)
        self._seen = seen

    async def _settle(self, instance: InstanceId, send: SendPassword | None) -> None:
        local = await asyncio.to_thread(self.store.read, instance)
        if instance not in self._fleet:
            return
        match plan_password(local, self._fleet[instance], self._before.get(instance)):
            case Keep(password):
                await asyncio.to_thread(self.store.replace, instance, password, self.group)
                self._before[instance] = password
            case Forget():
                await asyncio.to_thread(self.store.remove, instance)
                self._before[instance] = None
            case Send(password) if send is not None and self._refused.get(instance) != password:
                async with self._sending:
                    if await asyncio.to_thread(self.store.read, instance) == password:
                        await self._send(instance, password, send)
            case _:
                pass

    async def _send(self, instance: InstanceId, password: bytes, send: SendPassword) -> None:
        try:
            await send(instance, password)
        except SourceRefused as error:
            # The instance has moved to another host, or its guest has posted there; the fleet's password will arrive.
            self._refused[instance] = password
            _log.warning("password refused", instance=instance, error=error.message)
        else:
            self._before[instance] = password
            self._refused[instance] = password
            _log.info("password sent", instance=instance)
