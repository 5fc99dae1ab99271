"""Records of a fleet behind the routes of `record_routes`, for a caller's role and project."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Final, TypeAlias

from fastapi import Depends, Request
from starlette.responses import JSONResponse

from imdsproxy.api import bodies
from imdsproxy.api.answers import Written
from imdsproxy.api.client import path_to
from imdsproxy.api.record_routes import Change, RecordStore, Report
from imdsproxy.errors import NotFound, SourceUnavailable
from imdsproxy.fleet.layout import StoredInstance, View
from imdsproxy.fleet.stream import ItemKey
from imdsproxy.hub.api.ask import ask_host
from imdsproxy.hub.api.callers import Caller, Mover, Operator, Reader, TermsOf, Uses
from imdsproxy.hub.api.operations import FleetWritten, Importing, Operations
from imdsproxy.hub.api.views import Views, Wanted
from imdsproxy.hub.store import plan_records, scopes, transactions
from imdsproxy.hub.store.imports import Import
from imdsproxy.hub.store.transactions import Terms
from imdsproxy.hub.store.writes import Done, TooMuch
from imdsproxy.model.entities import Instance, InstanceId, NetworkId
from imdsproxy.model.records import PLACED_TABLES, PlacedInstance, parse_placed
from imdsproxy.reconcile.progress import Step

_IMPORT_S: Final = 1.0
_AT_ONCE: Final = 40
"""Maximum number of records to store in one transaction."""


@dataclass(frozen=True, slots=True)
class FleetOverrideChange:
    """Result of changing an instance's operator override on all its hosts.

    Attributes:
        epoch: Epoch of the instance's tokens, which rises with each revocation.
        applied: Whether all hosts of the instance have confirmed the change.
        pending: Hosts that have not confirmed it, with reasons.
    """

    instance: InstanceId
    epoch: int
    applied: bool = True
    pending: tuple[str, ...] = ()
    revision: int = 0
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetRecords(RecordStore):
    tables = PLACED_TABLES
    operations: Operations
    caller: Caller
    terms: Terms

    @property
    def views(self) -> Views:
        return self.caller.views(self.operations)

    def find_network(self, text: str) -> NetworkId:
        return self.views.find_network(text)

    def find_instance(self, text: str) -> InstanceId:
        return self.views.find_instance(text)

    def steps(self) -> Sequence[Step]:
        return self.operations.progress(self.caller.scope)

    async def report_networks(self) -> Iterable[Report]:
        return self.views.networks(await self.caller.reported(self.operations))

    async def report_network(self, network: NetworkId) -> Report:
        return self.views.network(network, await self.caller.reported(self.operations))

    async def match_instances(self, text: str, network: NetworkId | None) -> Sequence[InstanceId]:
        return [one async for one, _, _ in self.views.instances(Wanted(text, network))]

    async def report_page(self, instances: Sequence[InstanceId]) -> Sequence[Report]:
        return self.views.page(instances, await self.caller.reported(self.operations))

    async def report_instance(self, instance: InstanceId) -> Report:
        views, reported = self.views, await self.caller.reported(self.operations)
        stored, _ = views.stored(instance)
        data = None
        if stored.user_data is not None and self.caller.reads_secrets:
            data = await self.operations.writes.read_blob(stored.user_data)
        report = views.instance(instance, reported, data)
        if not self.caller.reads_secrets:
            report["record"].pop("vendor_data", None)
        return report

    async def put(self, change: Change) -> FleetWritten:
        terms, instances = replace(self.terms, create=change.create), [*change.instances]
        done = await self.operations.writes.put(change.networks, instances, terms, bulk=change.bulk)
        return await self._confirm(done, [one.id for one in change.networks], instances)

    async def put_many(self, change: Change) -> FleetWritten | Importing:
        if len(change.networks) + len(change.instances) <= _AT_ONCE:
            with contextlib.suppress(TooMuch):
                return await self.put(change)
        terms, instances = replace(self.terms, create=change.create), [*change.instances]
        started = Import(self.operations.writes, change.networks, instances, terms)
        started.name = await asyncio.to_thread(started.make_name)
        return await self.await_import(self.operations.begin(started))

    async def await_import(self, name: str) -> FleetWritten | Importing:
        """Return the answer to an import, or the import's progress if it takes longer than a second."""
        task = self.operations.imports[name][1]
        if not (await asyncio.wait([task], timeout=_IMPORT_S))[0]:
            return Importing(name, self.operations.progress(self.caller.scope))
        self.operations.forget(name, task)
        return await task

    async def patch_network(self, network: NetworkId, patch: Mapping[str, object]) -> FleetWritten:
        def plan(view: View) -> transactions.Transaction:
            known = transactions.read_network(view, network)
            if known is None or not scopes.in_scope(known[0].record, self.terms.scope):
                raise transactions.no_such("network", network)
            changed = bodies.read_network(bodies.merge_patch(known[0].record, patch))
            return plan_records.plan_put(view, [changed], [], self.terms)

        return await self._confirm(await self.operations.writes.write(plan), [network])

    async def patch_instance(
        self, instance: InstanceId, patch: Mapping[str, object]
    ) -> FleetWritten:
        changed: list[PlacedInstance] = []

        def change(stored: StoredInstance) -> PlacedInstance:
            merged = bodies.merge_patch({**stored.record, "hosts": list(stored.hosts)}, patch)
            changed[:] = [bodies.read_record("instance", parse_placed, merged)]
            return changed[0]

        keeps_data = "user_data" not in patch
        done = await self.operations.writes.change(
            instance, change, self.terms, keeps_data=keeps_data
        )
        return await self._confirm(done, instances=changed)

    async def remove_network(self, network: NetworkId) -> FleetWritten:
        done = await self.operations.writes.remove_network(network, self.terms)
        return await self._confirm(done, [network])

    async def remove_instance(self, instance: InstanceId) -> FleetWritten:
        done = await self.operations.writes.remove_instance(instance, self.terms)
        return await self.operations.confirm(done, {f"instance/{instance}"}, instances=1)

    async def _confirm(
        self,
        done: Done,
        networks: Collection[NetworkId] = (),
        instances: Collection[Instance] = (),
    ) -> FleetWritten:
        """Wait until records are in force: networks on every host that has an instance in them."""
        items: set[ItemKey] = {f"network/{one}" for one in networks}
        hosts = done.hosts.union(*map(self.operations.state.hosts_with, items))
        for one in instances:
            items |= {f"instance/{one.id}", *(f"network/{port.network}" for port in one.ports)}
        counts = {"networks": len(networks), "instances": len(instances)}
        return await self.operations.confirm(replace(done, hosts=hosts), items, **counts)

    async def revoke_tokens(self, instance: InstanceId) -> FleetOverrideChange:
        done, epoch = await self.operations.writes.revoke_tokens(instance, self.terms)
        return await self._confirm_override(instance, done, epoch)

    async def reopen(self, instance: InstanceId) -> FleetOverrideChange:
        done, epoch = await self.operations.writes.reopen(instance, self.terms)
        return await self._confirm_override(instance, done, epoch)

    async def _confirm_override(
        self, instance: InstanceId, done: Done, epoch: int
    ) -> FleetOverrideChange:
        state = self.operations.state
        # If the record is unreadable, the copy may still know the instance's hosts.
        hosts = done.hosts | set(state.hosts_of(instance))
        item = f"override/{instance}"
        written = await self.operations.confirm(replace(done, hosts=frozenset(hosts)), {item})
        pending = written.pending
        if not hosts and (why := state.unread(f"instance/{instance}")) is not None:
            pending = (
                f"instance {instance} is not readable in etcd ({why}): hosts get this once it is written again",
            )
        return FleetOverrideChange(
            instance, epoch, not pending, pending, written.revision, written.hosts
        )

    async def show_password(self, instance: InstanceId) -> bodies.PasswordBody | JSONResponse:
        hosts = self.views.stored(instance)[0].hosts
        try:
            password = bodies.DocumentBody.of(self.operations.passwords.read(instance))
            return bodies.PasswordBody(instance=instance, password=password)
        except NotFound as error:
            problem: Exception = error
        # A host may have a password that its hub has not stored yet.
        route = path_to("instances", instance, "password")
        for host in hosts:
            try:
                return JSONResponse(await ask_host(self.operations, host, route))
            except (NotFound, SourceUnavailable) as error:
                problem = error
        raise problem

    async def clear_password(self, instance: InstanceId) -> Written:
        problem: NotFound | None = None
        hosts = self.views.stored(instance)[0].hosts
        passwords = self.operations.passwords
        clear = partial(passwords.clear, instance, self.operations.writes.terms(""))
        done, cleared = await clear()
        if cleared:
            item = f"password/{instance}"
            await self.operations.in_force.wait(done.hosts, done.revision, {item})
        # A host may have a password that its hub has not stored yet.
        route = path_to("instances", instance, "password")
        for host in hosts:
            try:
                await ask_host(self.operations, host, route, method="DELETE")
                cleared = True
            except NotFound as error:
                problem = error
            except SourceUnavailable:
                if not cleared:
                    raise
        # A host may have sent the password meanwhile, so clear it again.
        cleared = (await clear())[1] or cleared
        if problem is not None and not cleared:
            raise problem
        return Written(instances=1)


async def open_reading(request: Request, operations: Uses, caller: Reader) -> FleetRecords:
    return _open(request, operations, caller)


async def open_secrets(request: Request, operations: Uses, caller: Operator) -> FleetRecords:
    return _open(request, operations, caller)


ReadingSecrets: TypeAlias = Annotated[FleetRecords, Depends(open_secrets)]


async def open_writing(request: Request, store: ReadingSecrets, terms: TermsOf) -> FleetRecords:
    """Open the records for a caller who may change them.

    FastAPI reads a body even if the terms are refused, so the records are open before.
    """
    return _open(request, store.operations, store.caller, terms)


async def _open_movable(request: Request, operations: Uses, caller: Mover) -> FleetRecords:
    return _open(request, operations, caller)


async def open_moving(
    request: Request, store: Annotated[FleetRecords, Depends(_open_movable)], terms: TermsOf
) -> FleetRecords:
    return _open(request, store.operations, store.caller, terms)


def _open(
    request: Request, operations: Operations, caller: Caller, terms: Terms | None = None
) -> FleetRecords:
    terms = operations.writes.terms("", scope=caller.scope) if terms is None else terms
    store = FleetRecords(operations, caller, terms)
    request.state.store = store
    return store


Reading: TypeAlias = Annotated[FleetRecords, Depends(open_reading)]
Moving: TypeAlias = Annotated[FleetRecords, Depends(open_moving)]
