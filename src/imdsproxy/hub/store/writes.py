"""Writes of a fleet's records: planned from this hub's copy, committed by etcd if the copy is current.

If another hub wrote meanwhile, etcd's answer has the newer values, and the write is planned again. After a lost answer,
the hub recognizes its own write by the request in the record.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

from imdsproxy.errors import (
    AdminError,
    NotFound,
    Problem,
    RequestRefused,
    RestoreSuspected,
    SourceCorrupt,
    SourceRefused,
    SourceUnavailable,
    UserDataUnreadable,
    WriteUnknown,
)
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import HostId, StoredInstance, UserData, View, parse_override
from imdsproxy.fleet.restores import join_overrides, read_suspicion
from imdsproxy.host.clock import Clock
from imdsproxy.hub.store import plan_changes, plan_records, scopes, transactions
from imdsproxy.hub.store.envelope import Envelope
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Committed, Compare, KeyValue, prefix_end
from imdsproxy.hub.store.journal import Keep, keep_nothing
from imdsproxy.hub.store.plan_records import InstancePut
from imdsproxy.hub.store.state import FleetState
from imdsproxy.hub.store.transactions import Terms, Transaction
from imdsproxy.hub.store.write_checks import plan_levels, refuse_older, refuse_shared
from imdsproxy.model.entities import InstanceId, Network, NetworkId
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records import PlacedInstance
from imdsproxy.model.records.grant import Grant
from imdsproxy.model.records.levels import SCHEMA, Schema

_ATTEMPTS: Final = 5
_READS_AT_ONCE: Final = 16
_LOOK_S, _LOOKS = 0.05, 200
_KIB: Final = 1024
_MOST_WHOLE: Final = 1000
"""Maximum number of blobs remembered as intact."""


_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Done:
    """Result of a write: its revision, or the unchanged record's, and hosts on which it must come into force."""

    revision: int
    hosts: frozenset[HostId]
    scope: str | None = None


class TooMuch(RequestRefused):
    """A write exceeds etcd's limits for one transaction."""


class _Swept(Exception):
    """A hub swept chunks of user data before the record was written."""


@dataclass(slots=True)
class Fresh:
    """View of the hub's copy, with newer values from etcd's answers on top."""

    state: FleetState
    read: dict[str, tuple[bytes, int] | None] = field(default_factory=dict)
    asked: dict[str, tuple[bytes, int] | None] = field(default_factory=dict)
    in_ranges: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __call__(self, key: str) -> tuple[bytes, int] | None:
        if key in self.read:
            return self.read[key]
        # The copy changes while a write waits, so the first value is kept: `refresh` compares etcd with it.
        return self.asked.setdefault(key, self.state.stored(key))

    def take(self, compares: Iterable[Compare], kvs: Sequence[KeyValue]) -> None:
        found = {one.key: (one.value, one.mod_revision) for one in kvs}
        for one in compares:
            if one.range_end:
                users = (kv for kv in kvs if kv.key.startswith(one.key))
                holders = (codec.plain(kv.value.decode(errors="replace")) for kv in users)
                self.in_ranges[one.key] = tuple(dict.fromkeys(holders))
            else:
                self.read[one.key] = found.get(one.key)

    async def refresh(self, etcd: Etcd, keys: Iterable[str] | None = None) -> bool:
        """Read these keys, or by default all keys used from the copy; return whether one has changed."""
        asked = list(self.asked if keys is None else keys)
        limit, changed = asyncio.Semaphore(_READS_AT_ONCE), False

        async def read(key: str) -> bool:
            before = self.read[key] if key in self.read else self.asked.get(key)
            async with limit:
                # A known large value is not read again, so it takes no longer than an absent one.
                kvs = (await etcd.read(key, keys_only=before is not None)).kvs
                if before is not None and kvs:
                    if kvs[0].mod_revision == before[1]:
                        self.read[key] = before
                        return False
                    kvs = (await etcd.read(key)).kvs
            found = (kvs[0].value, kvs[0].mod_revision) if kvs else None
            self.read[key] = found
            return found != before

        for one in await asyncio.gather(*map(read, asked)):
            changed = changed or one
        self.asked.clear()
        return changed


async def _no_levels() -> Mapping[HostId, int]:
    return {}


@dataclass(slots=True)
class Writes:
    """Writes to a fleet's etcd.

    Args:
        user_data_kib: Maximum size of an instance's user data, in KiB.
        levels: Returns the level of records that each connected host reads.
        keep: Writes values to this hub's journal; called before the client gets its answer.
    """

    etcd: Etcd
    state: FleetState
    envelope: Envelope
    clock: Clock
    user_data_kib: int = 1024
    schema: Schema = SCHEMA
    levels: Callable[[], Awaitable[Mapping[HostId, int]]] = _no_levels
    keep: Keep = keep_nothing
    _whole: set[frozenset[tuple[str, int]]] = field(default_factory=set)

    def terms(
        self,
        request: str,
        *,
        create: bool = False,
        revision: int | None = None,
        scope: str | None = None,
    ) -> Terms:
        return Terms(request, int(self.clock.now().timestamp()), create, revision, scope)

    async def put(
        self,
        networks: Sequence[Network],
        instances: Sequence[PlacedInstance],
        terms: Terms,
        *,
        bulk: bool = False,
        finish: Callable[[Transaction], Transaction] = lambda planned: planned,
    ) -> Done:
        """Store or replace complete records, all or none.

        With `bulk`, the field of each problem begins with the kind and number of its record. `finish` extends the
        planned transaction.

        Raises:
            ImdsproxyError: Errors of `plan_records.plan_put`.
            RequestRefused: User data is too large, or the records are too many for one write.
            SourceUnavailable: etcd does not answer or is full, or other hubs keep writing the same keys.
        """

        def path(number: int) -> tuple[str | int, ...]:
            return ("instances", number) if bulk else ()

        self.refuse_large([(path(number), one) for number, one in enumerate(instances)])
        while True:
            puts = [await self.prepare(one, path(number)) for number, one in enumerate(instances)]
            try:
                return await self.write(
                    lambda view, puts=puts: finish(  # type: ignore[misc] # mypy#4226
                        plan_records.plan_put(view, networks, puts, terms)
                    )
                )
            except _Swept:
                continue

    def refuse_large(
        self, instances: Iterable[tuple[tuple[str | int, ...], PlacedInstance]]
    ) -> None:
        """Raise `RequestRefused` if user data exceeds `user_data_kib`."""
        most = self.user_data_kib * _KIB
        problems = [
            Problem(
                ".".join(map(str, (*path, "user_data"))),
                f"has {len(one.user_data):,} bytes",
                f"a fleet accepts {self.user_data_kib} KiB: hub.user_data_kib",
            )
            for path, one in instances
            if one.user_data is not None and len(one.user_data) > most
        ]
        if problems:
            raise RequestRefused("user data is too large for a fleet", problems=problems)

    async def prepare(
        self, instance: PlacedInstance, path: tuple[str | int, ...] = ()
    ) -> InstancePut:
        """Store an instance's user data in etcd; return the instance to put."""
        if instance.user_data is None:
            return InstancePut(instance, path=path)
        found, revision = await self.store_blob(bytes(instance.user_data))
        return InstancePut(instance, found, revision, path)

    async def change(
        self,
        instance: InstanceId,
        make: Callable[[StoredInstance], PlacedInstance],
        terms: Terms,
        *,
        keeps_data: bool,
    ) -> Done:
        """Read an instance, make the new record of it and write it; retry if another write came between.

        With `keeps_data`, the stored user data stay instead of the new record's. Raises the errors of `put` and of
        `make`.
        """
        data: tuple[UserData | None, int] | None = None
        while True:
            if not keeps_data:
                record = make(await self.find(instance, terms.scope))
                self.refuse_large([((), record)])
                put = await self.prepare(record)
                data = put.user_data, put.chunk_revision

            def plan(view: View, data: tuple[UserData | None, int] | None = data) -> Transaction:
                known = scopes.read_owned(view, instance, terms.scope)
                if known is None:
                    raise transactions.no_such("instance", instance)
                stored = known[0]
                user_data, revision = (stored.user_data, 0) if data is None else data
                put = InstancePut(make(stored), user_data, revision)
                return plan_records.plan_put(view, [], [put], terms)

            try:
                return await self.write(plan)
            except _Swept:
                continue

    async def find(self, instance: InstanceId, project: str | None) -> StoredInstance:
        """Return a stored instance; raise `NotFound` if the operator's project has no such instance."""
        view = Fresh(self.state)
        known = scopes.read_owned(view, instance, project)
        if known is None:
            # This hub's copy may be behind.
            await view.refresh(self.etcd)
            known = scopes.read_owned(view, instance, project)
        if known is None:
            raise transactions.no_such("instance", instance)
        return known[0]

    async def remove_instance(self, instance: InstanceId, terms: Terms) -> Done:
        """Remove an instance; raise `NotFound`, and the errors of `put`."""
        return await self.write(lambda view: plan_records.plan_removal(view, instance, terms))

    async def remove_network(self, network: NetworkId, terms: Terms) -> Done:
        """Remove a network; raise `NotFound`, `RecordConflict` if instances use it, and the errors of `put`."""
        claims = layout.claims_in(network)

        def plan(view: Fresh) -> Transaction:
            users = view.in_ranges.get(claims, ())
            return plan_records.plan_network_removal(view, network, terms, users)

        hosts = self.state.hosts_with(f"network/{network}")
        done = await self.write(plan)
        return replace(done, hosts=done.hosts | hosts)

    async def write(self, plan: Callable[[Fresh], Transaction]) -> Done:
        """Commit a planned transaction; plan again if the keys have changed in etcd.

        Raises the errors of `plan` for the current keys in etcd, and `SourceUnavailable` as `put`.
        """
        view = Fresh(self.state)
        unknown: WriteUnknown | None = None
        for _ in range(_ATTEMPTS):
            try:
                planned = plan(view)
            except (AdminError, SourceRefused, SourceCorrupt) as error:
                # This hub's copy may be behind.
                if await view.refresh(self.etcd):
                    continue
                if unknown is not None and isinstance(error, RestoreSuspected):
                    # The write may have reached hosts before the restore.
                    raise unknown from error
                raise
            if not (planned.puts or planned.deletes):
                return Done(planned.revision, planned.hosts, planned.scope)
            await self._refuse(planned)
            known, incarnation = self.state.revision, self.state.meta.incarnation
            try:
                answer = await self.etcd.commit(planned.compares, planned.puts, planned.deletes)
            except WriteUnknown as lost:
                unknown = lost
                keys = [one.key for one in planned.compares if not one.range_end]
                await view.refresh(self.etcd, keys)
                continue
            if isinstance(answer, Committed):
                if answer.revision <= known:
                    # This happens only after a restore that another hub accepted.
                    await self._follow_acceptance(incarnation)
                return Done(answer.revision, planned.hosts, planned.scope)
            view.take(planned.compares, answer.kvs)
            _refuse_swept(view, planned.compares)
        raise SourceUnavailable("other hubs keep writing the same records", hint="try again")

    async def _refuse(self, planned: Transaction) -> None:
        """Raise if hosts cannot apply the planned records, or if they exceed etcd's limits."""
        refuse_shared(self.state, planned)
        if needed := plan_levels(self.state, planned, self.schema):
            refuse_older(needed, await self.levels())
        if not planned.fits:
            raise TooMuch(
                "the records are too large for one write",
                hint="etcd takes some forty addresses of an instance, and 1 MiB, at once",
            )

    async def revoke_tokens(self, instance: InstanceId, terms: Terms) -> tuple[Done, int]:
        """Revoke an instance's tokens; also return its new epoch. Raises `NotFound`, and the errors of `put`."""

        def revoke(old: OperatorOverride) -> OperatorOverride:
            epoch = transactions.next_epoch(old.epoch, self.state.meta.incarnation)
            return replace(old, epoch=epoch)

        return await self._override(instance, revoke, terms)

    async def reopen(self, instance: InstanceId, terms: Terms) -> tuple[Done, int]:
        """Restart an instance's boot grace now; returns and raises as `revoke_tokens`."""
        return await self._override(
            instance, lambda old: replace(old, reopened_at=terms.now), terms
        )

    async def _override(
        self,
        instance: InstanceId,
        change: Callable[[OperatorOverride], OperatorOverride],
        terms: Terms,
    ) -> tuple[Done, int]:
        epoch, key = 0, layout.override_key(instance)
        planned = Transaction()

        def raised(old: OperatorOverride) -> OperatorOverride:
            # After a restore, etcd may have an older override than this hub.
            known = self.state.value(key)
            return change(old if known is None else join_overrides(old, parse_override(known[0])))

        def plan(view: View) -> Transaction:
            nonlocal epoch, planned
            planned, epoch = plan_changes.plan_override(view, instance, raised, terms)
            return planned

        done = await self.write(plan)
        await self.keep(planned.puts)
        return done, epoch

    async def put_policy(
        self, place: str, change: Callable[[Mapping[str, Any]], Mapping[str, Any]], terms: Terms
    ) -> Done:
        """Change the policy of `fleet`, `host/ID` or `project/ID`; raise the errors of `put` and of `change`.

        `change` gets the old rules and returns the new ones, in the form of `model.records.network.POLICY`; empty rules
        clear the policy.
        """
        return await self.write(lambda view: plan_changes.plan_policy(view, place, change, terms))

    async def put_grant(self, project: str, change: Callable[[Grant], Grant], terms: Terms) -> Done:
        """Change the grant of a project; raise the errors of `put` and of `change`."""
        return await self.write(lambda view: plan_changes.plan_grant(view, project, change, terms))

    async def accept_restore(self) -> tuple[int, Mapping[str, str]]:
        """Accept the restored contents of etcd, although hosts had newer ones, and wait until this hub's copy has them.

        Returns the revision of the acceptance, and `Suspicion.regained`.
        """
        known, regained = self.state.meta, dict[str, str]()

        def plan(view: View) -> Transaction:
            planned = plan_changes.plan_acceptance(view, known)
            suspicion = read_suspicion(view)
            regained.update({} if suspicion is None else suspicion.regained)
            return planned

        done = await self.write(plan)
        await self._follow_acceptance(known.incarnation)
        return done.revision, regained

    async def _follow_acceptance(self, known: int) -> None:
        """Wait for this hub's copy to pass incarnation `known`: acknowledgements of earlier ones do not count."""
        for _ in range(_LOOKS):
            if self.state.meta.incarnation > known:
                break
            await asyncio.sleep(_LOOK_S)

    # User data

    async def store_blob(self, data: bytes) -> tuple[UserData, int]:
        """Store user data in etcd, unless an intact copy exists; return its reference, and the revision of chunk 0."""
        found = UserData(hashlib.sha256(data).hexdigest(), len(data))
        prefix, first = f"{layout.BLOBS}{found.sha256}/", layout.blob_key(found.sha256, 0)
        there = (await self.etcd.read(prefix, prefix_end(prefix), keys_only=True)).kvs
        chunks = {one.key: one.mod_revision for one in there}
        if first in chunks and await self._is_whole(found, frozenset(chunks.items())):
            return found, chunks[first]
        keys = [layout.blob_key(found.sha256, number) for number in range(_chunks(found))]
        others, revision = [key for key in chunks if key not in keys], 0
        # The first chunk is written last: its presence proves that all chunks are there.
        for number, key in reversed([*enumerate(keys)]):
            begin = number * layout.CHUNK_BYTES
            sealed = self.envelope.seal(key, data[begin : begin + layout.CHUNK_BYTES])
            deletes = others if key == first else ()
            revision = (await self.etcd.commit((), {key: sealed}, deletes)).revision
        return found, revision

    async def _is_whole(self, found: UserData, chunks: frozenset[tuple[str, int]]) -> bool:
        """Return whether user data is intact: another program may have changed a chunk."""
        if chunks not in self._whole:
            try:
                await self.read_blob(found)
            except (NotFound, UserDataUnreadable):
                return False
            if len(self._whole) >= _MOST_WHOLE:
                self._whole.clear()
            self._whole.add(chunks)
        return True

    async def read_blob(self, found: UserData) -> bytes:
        """Read user data from etcd.

        Raises:
            NotFound: etcd has no chunk: the user data was swept, or lost in a restore.
            UserDataUnreadable: Another program changed a chunk, or this hub lacks the key to decrypt it.
            SourceUnavailable: etcd does not answer.
        """
        prefix = f"{layout.BLOBS}{found.sha256}/"
        chunks = (await self.etcd.read(prefix, prefix_end(prefix))).kvs
        if not chunks:
            raise NotFound(
                f"etcd does not have user data {found.sha256}", hint="write the user data again"
            )
        try:
            data = b"".join(self.envelope.open(one.key, one.value) for one in chunks)
        except SourceCorrupt as error:
            raise UserDataUnreadable(error.message, hint=error.hint) from error
        if hashlib.sha256(data).hexdigest() != found.sha256:
            raise UserDataUnreadable(
                f"another program has changed user data {found.sha256}",
                hint="write the user data again",
            )
        return data


def _chunks(data: UserData) -> int:
    return max(1, -(-data.size // layout.CHUNK_BYTES))


def _refuse_swept(view: Fresh, compares: Iterable[Compare]) -> None:
    for one in compares:
        if one.key.startswith(layout.BLOBS):
            found = view.read.get(one.key)
            if found is None or found[1] != one.revision:
                raise _Swept
