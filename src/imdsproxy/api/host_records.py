"""Records of a host behind the routes of `record_routes`: changes go to the SQLite store.

A change returns once no worker of HAProxy answers with the previous state. A change raises `SourceRefused` if no
writable source is enabled or another source has the record, and `SourceUnavailable` if the store does not answer.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from imdsproxy.api import bodies, tokens
from imdsproxy.api.answers import Written
from imdsproxy.api.record_routes import Change, RecordStore
from imdsproxy.api.records import HostReports, no_such, refuse_unknown
from imdsproxy.controller.in_force import UNCONFIRMED, find_unserved, wait_confirmed
from imdsproxy.documents.dialects.ec2 import list_warnings, warn_of_names
from imdsproxy.errors import AlreadyExists, NotFound, Problem, RecordConflict, SourceRefused
from imdsproxy.model.claims import find_shared
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId
from imdsproxy.model.packed import PackedInstances
from imdsproxy.model.records import TABLES, parse_instance, render_record
from imdsproxy.reconcile.part import Impact, list_problems
from imdsproxy.reconcile.progress import Step
from imdsproxy.sources.sqlite.source import SqliteSource

_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class HostRecords(HostReports, RecordStore):
    tables = TABLES
    clearable = (bodies.PASSWORD,)

    def collect(self) -> PackedInstances:
        return PackedInstances()

    def steps(self) -> Sequence[Step]:
        return self.parts.records.progress.steps

    async def put(self, change: Change) -> Written:
        networks, instances, create = change.networks, change.instances, change.create
        store, prefix = self._store, "{}[{}]." if change.bulk else ""
        coming = {one.id for one in networks}
        for network in networks:
            self._refuse_foreign("network", network.id, create=create)
        unknown: list[Problem] = []
        async for place, instance in _enumerated(instances):
            self._refuse_foreign("instance", instance.id, create=create)
            unknown += [
                Problem(
                    f"{prefix.format('instances', place)}ports[{number}].network",
                    f"there is no network {port.network}",
                    "imdsproxy network list",
                )
                for number, port in enumerate(instance.ports)
                if not (port.network in coming or self.parts.inventory.knows(port.network))
            ]
        if unknown:
            raise SourceRefused("a port is in a network that does not exist", problems=unknown)
        async with self.parts.claiming if networks else contextlib.nullcontext():
            await self._refuse_shared(networks, prefix)
            await store.put(networks, instances, bulk=change.bulk)
        written = await self._in_force([one.id for one in networks], instances=len(instances))
        misnamed: list[Problem] = []
        async for _, instance in _enumerated(instances):
            misnamed += warn_of_names(instance)
        return replace(written, warnings=list_warnings(misnamed))

    async def patch_network(self, network: NetworkId, patch: Mapping[str, object]) -> Written:
        async with self.parts.patching:
            stored = render_record((await self.report_network(network))["record"])
            return await self.put(Change([bodies.read_network(bodies.merge_patch(stored, patch))]))

    async def patch_instance(self, instance: InstanceId, patch: Mapping[str, object]) -> Written:
        clears_password = patch.get(bodies.PASSWORD, "") is None
        async with self.parts.patching:
            stored = render_record((await self.report_instance(instance))["record"])
            changed = bodies.merge_patch(stored, patch)
            record = bodies.read_record("instance", parse_instance, changed)
            # A password is not part of the record, which may belong to another source.
            written = Written(instances=1)
            if not (clears_password and patch.keys() == {"id", bodies.PASSWORD}):
                written = await self.put(Change(instances=[record]))
            if clears_password:
                await self._remove_password(instance)
            return written

    async def remove_network(self, network: NetworkId) -> Written:
        self._require("network", network)
        await self._store.remove_network(network)
        return await self._in_force([network])

    async def remove_instance(self, instance: InstanceId) -> Written:
        self._require("instance", instance)
        await self._store.remove_instance(instance)
        return await self._in_force([], instances=1)

    async def revoke_tokens(self, instance: InstanceId) -> tokens.OverrideChange:
        return await tokens.revoke_tokens(self.parts, instance)

    async def reopen(self, instance: InstanceId) -> tokens.OverrideChange:
        return await tokens.reopen_boot(self.parts, instance)

    async def show_password(self, instance: InstanceId) -> bodies.PasswordBody:
        refuse_unknown(self.parts.inventory, instance)
        password = await asyncio.to_thread(self.parts.passwords.read, instance)
        if password is None:
            raise _no_password(instance)
        return bodies.PasswordBody(instance=instance, password=bodies.DocumentBody.of(password))

    async def clear_password(self, instance: InstanceId) -> Written:
        if not await self._remove_password(instance):
            raise _no_password(instance)
        return Written(instances=1)

    async def _remove_password(self, instance: InstanceId) -> bool:
        """Remove a password; return whether there was one. If it is a fleet's, raise `SourceRefused`."""
        refuse_unknown(self.parts.inventory, instance)
        if self.parts.fleet_passwords is not None:
            return await self.parts.fleet_passwords.forget(instance)
        return await asyncio.to_thread(self.parts.passwords.remove, instance)

    @property
    def _store(self) -> SqliteSource:
        if (store := self.parts.sources.writable) is None:
            hint = "set sources.sqlite.enabled: true"
            raise SourceRefused("no source can be written to", hint=hint)
        return store

    def _require(self, kind: str, subject: str) -> None:
        if not self._refuse_foreign(kind, subject):
            raise no_such(kind, subject)

    def _refuse_foreign(self, kind: str, subject: str, *, create: bool = False) -> bool:
        """Return whether the store has the record; refuse records of other sources, and existing ones with `create`."""
        inventory = self.parts.inventory
        if kind == "network":
            sources, article = inventory.sources_of_network(NetworkId(subject)), "a"
        else:
            sources, article = inventory.sources_of_instance(InstanceId(subject)), "an"
        if sources and self._store.name not in sources:
            message = f"{kind} {subject} belongs to source {', '.join(sources)}"
            raise RecordConflict(message, hint="change it there")
        if sources and create:
            message = f"there is {article} {kind} {subject} already"
            raise AlreadyExists(message, hint="use set to change it")
        return bool(sources)

    async def _refuse_shared(self, networks: Sequence[Network], prefix: str) -> None:
        if not networks:
            return
        known, host = self.parts.inventory.networks, self.parts.listeners.host
        every = {**known, **{one.id: one for one in networks}}
        shared = find_shared(every.values(), known, host.seen.inode_of)
        if shared:
            # The namespace of an earlier observation may be gone, and another may have its inode now.
            involved = [every[one] for one in shared.keys() | shared.values()]
            observed = await host.look_at(involved)
            shared = find_shared(every.values(), known, observed.inode_of)
        problems = [
            Problem(
                f"{prefix.format('networks', place)}listener",
                f"network {shared[network.id]} has this listener",
                "change one of the two, or remove it",
            )
            for place, network in enumerate(networks)
            if network.id in shared
            and (network.id not in known or known[network.id].listener != network.listener)
        ]
        if problems:
            raise RecordConflict("a listener is in use", problems=problems)

    async def _in_force(self, networks: Sequence[NetworkId], *, instances: int = 0) -> Written:
        pending: list[str] = []
        if not await wait_confirmed(
            self.parts.records, self.parts.listeners, changed=bool(networks)
        ):
            pending.append(UNCONFIRMED)
        delays = list_problems(self.parts.all(), Impact.DELAYS)
        pending += [problem.reason for problem in delays]
        if networks:
            pending += map(str, await find_unserved(self.parts.listeners, frozenset(networks)))
        reasons = tuple(dict.fromkeys(pending))
        return Written(len(networks), instances, applied=not reasons, pending=reasons)


def _no_password(instance: InstanceId) -> NotFound:
    return NotFound(
        f"the guest of instance {instance} has posted no password",
        hint="a guest posts it to /openstack/latest/password; Nova keeps those of its own instances",
    )


async def _enumerated(instances: Iterable[Instance]) -> AsyncIterator[tuple[int, Instance]]:
    """Yield instances with their numbers, and let the event loop do other work now and then."""
    for number, instance in enumerate(instances):
        if number % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)
        yield number, instance
