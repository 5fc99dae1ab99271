"""Changes of a fleet's records, as `plan_writes` has them: planned of what this hub knows, written where that is so.

What another hub wrote meanwhile is in etcd's answer, and the write is planned again. A write whose answer is lost is
found by its request in the record.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

from imdsproxy.core.fleet import layout
from imdsproxy.core.fleet.lasting import join_overrides
from imdsproxy.core.fleet.layout import HostId, StoredInstance, UserData, View, parse_guard
from imdsproxy.core.fleet.suspicion import read_suspicion
from imdsproxy.core.model import InstanceId, Network, NetworkId
from imdsproxy.core.policy import OperatorOverride
from imdsproxy.core.records import PlacedInstance
from imdsproxy.core.records.grant import Grant
from imdsproxy.core.records.levels import SCHEMA, Schema
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
from imdsproxy.host.clock import Clock
from imdsproxy.hub import plan_writes
from imdsproxy.hub.envelope import Envelope
from imdsproxy.hub.etcd import Committed, Etcd
from imdsproxy.hub.etcd_messages import Compare, KeyValue, prefix_end
from imdsproxy.hub.journal import Keep, keep_nothing
from imdsproxy.hub.levels import plan_levels, refuse_older
from imdsproxy.hub.plan_writes import InstancePut, Terms, Transaction
from imdsproxy.hub.shared_listeners import refuse_shared
from imdsproxy.hub.state import FleetState

_ATTEMPTS: Final = 5
_READS_AT_ONCE: Final = 16
_LOOK_S, _LOOKS = 0.05, 200
_KIB: Final = 1024
_MOST_WHOLE: Final = 1000
"""User data that is known to be whole, by the revisions of its chunks."""


_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Done:
    """A write is in etcd.

    Attributes:
        revision: With which it came, or the record's own where it was so already.
        hosts: Where it has to come in force.
        scope: As `plan_writes.Terms.scope`.
    """

    revision: int
    hosts: frozenset[HostId]
    scope: str | None = None


class TooMuch(RequestRefused):
    """etcd does not take it in one transaction."""


class _Swept(Exception):
    """The chunks of user data went before the record was written."""


@dataclass(slots=True)
class Fresh:
    """What the hub's copy has, and over it what etcd answered since."""

    state: FleetState
    read: dict[str, tuple[bytes, int] | None] = field(default_factory=dict)
    asked: dict[str, tuple[bytes, int] | None] = field(default_factory=dict)
    in_ranges: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __call__(self, key: str) -> tuple[bytes, int] | None:
        """See `plan_writes.View`."""
        if key in self.read:
            return self.read[key]
        # The copy goes on while a write waits: what is planned is all of one moment, or is refreshed against that.
        return self.asked.setdefault(key, self.state.stored(key))

    def take(self, compares: Iterable[Compare], kvs: Sequence[KeyValue]) -> None:
        """What a write was refused for."""
        found = {one.key: (one.value, one.mod_revision) for one in kvs}
        for one in compares:
            if one.range_end:
                users = (kv for kv in kvs if kv.key.startswith(one.key))
                holders = (layout.plain(kv.value.decode(errors="replace")) for kv in users)
                self.in_ranges[one.key] = tuple(dict.fromkeys(holders))
            else:
                self.read[one.key] = found.get(one.key)

    async def refresh(self, etcd: Etcd, keys: Iterable[str] | None = None) -> bool:
        """Read these keys, or those that only the copy was asked for; whether one is another than there."""
        asked = list(self.asked if keys is None else keys)
        limit, changed = asyncio.Semaphore(_READS_AT_ONCE), False

        async def read(key: str) -> bool:
            before = self.read[key] if key in self.read else self.asked.get(key)
            async with limit:
                # A large value that is known takes no longer than an absent one.
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
        etcd: The store.
        state: This hub's copy of it.
        envelope: What seals user data.
        clock: Unix time.
        user_data_kib: The largest user data of an instance.
        schema: What this hub knows of records.
        levels: The level of records that connected hosts read.
        keep: Returns once values are in this hub's journal, before who wrote them is answered.
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
        """How records are to be written now; see `plan_writes.Terms`."""
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
        """Store records, or replace them: all of them, or none.

        Args:
            networks: The whole records.
            instances: The same, with their user data.
            terms: How.
            bulk: The field of a problem begins with the kind and number of its record.
            finish: Adds to what is written.

        Raises:
            ImdsproxyError: As `plan_writes.plan_put`.
            RequestRefused: User data is too large, or all of it for one write.
            SourceUnavailable: etcd does not answer, or is full, or others write the same all the time.
        """

        def path(number: int) -> tuple[str | int, ...]:
            return ("instances", number) if bulk else ()

        self.refuse_large([(path(number), one) for number, one in enumerate(instances)])
        while True:
            puts = [await self.prepare(one, path(number)) for number, one in enumerate(instances)]
            try:
                return await self.write(
                    lambda view, puts=puts: finish(  # type: ignore[misc] # mypy#4226
                        plan_writes.plan_put(view, networks, puts, terms)
                    )
                )
            except _Swept:
                continue

    def refuse_large(
        self, instances: Iterable[tuple[tuple[str | int, ...], PlacedInstance]]
    ) -> None:
        """`RequestRefused` where user data is larger than hubs are set to take."""
        most = self.user_data_kib * _KIB
        problems = [
            Problem(
                ".".join(map(str, (*path, "user_data"))),
                f"has {len(one.user_data):,} bytes",
                f"a fleet takes {self.user_data_kib} KiB: hub.user_data_kib",
            )
            for path, one in instances
            if one.user_data is not None and len(one.user_data) > most
        ]
        if problems:
            raise RequestRefused("user data is too large for a fleet", problems=problems)

    async def prepare(
        self, instance: PlacedInstance, path: tuple[str | int, ...] = ()
    ) -> InstancePut:
        """An instance whose user data is in etcd."""
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
        """Read an instance, change it and write it; again where another write was between.

        Args:
            instance: Which.
            make: The new record of the old one.
            terms: How.
            keeps_data: Its user data stays; otherwise it is the new record's.

        Raises:
            ImdsproxyError: As `put`, and what `make` raises.
        """
        data: tuple[UserData | None, int] | None = None
        while True:
            if not keeps_data:
                record = make(await self.find(instance, terms.scope))
                self.refuse_large([((), record)])
                put = await self.prepare(record)
                data = put.user_data, put.chunk_revision

            def plan(view: View, data: tuple[UserData | None, int] | None = data) -> Transaction:
                known = plan_writes.read_owned(view, instance, terms.scope)
                if known is None:
                    raise plan_writes.no_such("instance", instance)
                stored = known[0]
                user_data, revision = (stored.user_data, 0) if data is None else data
                put = InstancePut(make(stored), user_data, revision)
                return plan_writes.plan_put(view, [], [put], terms)

            try:
                return await self.write(plan)
            except _Swept:
                continue

    async def find(self, instance: InstanceId, project: str | None) -> StoredInstance:
        """An instance as etcd has it; `NotFound` where there is none that an operator of this project may know."""
        view = Fresh(self.state)
        known = plan_writes.read_owned(view, instance, project)
        if known is None:
            # This hub's copy may be behind.
            await view.refresh(self.etcd)
            known = plan_writes.read_owned(view, instance, project)
        if known is None:
            raise plan_writes.no_such("instance", instance)
        return known[0]

    async def remove_instance(self, instance: InstanceId, terms: Terms) -> Done:
        """Remove an instance; raises as `put`, and `NotFound`."""
        return await self.write(lambda view: plan_writes.plan_removal(view, instance, terms))

    async def remove_network(self, network: NetworkId, terms: Terms) -> Done:
        """Remove a network; raises as `put`, `NotFound`, and `SourceRefused` where instances have ports in it."""
        claims = layout.claims_in(network)

        def plan(view: Fresh) -> Transaction:
            users = view.in_ranges.get(claims, ())
            return plan_writes.plan_network_removal(view, network, terms, users)

        hosts = self.state.hosts_with(f"network/{network}")
        done = await self.write(plan)
        return replace(done, hosts=done.hosts | hosts)

    async def write(self, plan: Callable[[Fresh], Transaction]) -> Done:
        """Write what is planned of what is known, again where that has changed.

        Raises:
            ImdsproxyError: What `plan` raises of what etcd has.
            SourceUnavailable: As `put`.
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
                    # Hosts may have got it before the restore.
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
                    # Only after a restore, which was accepted at another hub.
                    await self._follow_acceptance(incarnation)
                return Done(answer.revision, planned.hosts, planned.scope)
            view.take(planned.compares, answer.kvs)
            _refuse_swept(view, planned.compares)
        raise SourceUnavailable("others write the same records all the time", hint="try again")

    async def _refuse(self, planned: Transaction) -> None:
        """Raise where hosts could not do what is planned, or etcd does not take it."""
        refuse_shared(self.state, planned)
        if needed := plan_levels(self.state, planned, self.schema):
            refuse_older(needed, await self.levels())
        if not planned.fits:
            raise TooMuch(
                "this is too much for one write",
                hint="etcd takes some forty addresses of an instance, and 1 MiB, at once",
            )

    async def revoke_tokens(self, instance: InstanceId, terms: Terms) -> tuple[Done, int]:
        """Revoke the tokens that an instance has now; raises as `put`, and `NotFound`.

        Returns:
            Also its new epoch.
        """

        def revoke(old: OperatorOverride) -> OperatorOverride:
            epoch = plan_writes.next_epoch(old.epoch, self.state.meta.incarnation)
            return replace(old, epoch=epoch)

        return await self._guard(instance, revoke, terms)

    async def reopen(self, instance: InstanceId, terms: Terms) -> tuple[Done, int]:
        """Let an instance's boot begin now; as `revoke_tokens`."""
        return await self._guard(instance, lambda old: replace(old, reopened_at=terms.now), terms)

    async def _guard(
        self,
        instance: InstanceId,
        change: Callable[[OperatorOverride], OperatorOverride],
        terms: Terms,
    ) -> tuple[Done, int]:
        epoch, key = 0, layout.guard_key(instance)
        planned = Transaction()

        def raised(old: OperatorOverride) -> OperatorOverride:
            # After a restore etcd may have an older one than this hub.
            known = self.state.value(key)
            return change(old if known is None else join_overrides(old, parse_guard(known[0])))

        def plan(view: View) -> Transaction:
            nonlocal epoch, planned
            planned, epoch = plan_writes.plan_guard(view, instance, raised, terms)
            return planned

        done = await self.write(plan)
        await self.keep(planned.puts)
        return done, epoch

    async def put_policy(
        self, place: str, change: Callable[[Mapping[str, Any]], Mapping[str, Any]], terms: Terms
    ) -> Done:
        """Change the policy of a scope.

        Args:
            place: `fleet`, `host/ID` or `project/ID`.
            change: The new rules of the old ones, as `core.records.network.POLICY` has them; none clears it.
            terms: How.

        Raises:
            ImdsproxyError: As `put`, and what `change` raises.
        """
        return await self.write(lambda view: plan_writes.plan_policy(view, place, change, terms))

    async def put_grant(self, project: str, change: Callable[[Grant], Grant], terms: Terms) -> Done:
        """Change what a project's operators may use; raises as `put`, and what `change` raises."""
        return await self.write(lambda view: plan_writes.plan_grant(view, project, change, terms))

    async def accept_restore(self) -> tuple[int, Mapping[str, str]]:
        """Take what etcd has as the truth, though hosts had newer.

        Returns:
            The revision with which it is so, here too, and `Suspicion.regained`.
        """
        known, regained = self.state.meta, dict[str, str]()

        def plan(view: View) -> Transaction:
            planned = plan_writes.plan_acceptance(view, known)
            suspicion = read_suspicion(view)
            regained.update({} if suspicion is None else suspicion.regained)
            return planned

        done = await self.write(plan)
        await self._follow_acceptance(known.incarnation)
        return done.revision, regained

    async def _follow_acceptance(self, known: int) -> None:
        """Wait until this hub's copy has an incarnation after `known`: acknowledgements from before it say nothing."""
        for _ in range(_LOOKS):
            if self.state.meta.incarnation > known:
                break
            await asyncio.sleep(_LOOK_S)

    # User data

    async def store_blob(self, data: bytes) -> tuple[UserData, int]:
        """Put user data into etcd, unless it is there and readable.

        Returns:
            Where it is, and the revision of its first chunk.
        """
        found = UserData(hashlib.sha256(data).hexdigest(), len(data))
        prefix, first = f"{layout.BLOBS}{found.sha256}/", layout.blob_key(found.sha256, 0)
        there = (await self.etcd.read(prefix, prefix_end(prefix), keys_only=True)).kvs
        chunks = {one.key: one.mod_revision for one in there}
        if first in chunks and await self._is_whole(found, frozenset(chunks.items())):
            return found, chunks[first]
        keys = [layout.blob_key(found.sha256, number) for number in range(_chunks(found))]
        others, revision = [key for key in chunks if key not in keys], 0
        # The first is the last one that is written: with it all of them are there.
        for number, key in reversed([*enumerate(keys)]):
            begin = number * layout.CHUNK_BYTES
            sealed = self.envelope.seal(key, data[begin : begin + layout.CHUNK_BYTES])
            deletes = others if key == first else ()
            revision = (await self.etcd.commit((), {key: sealed}, deletes)).revision
        return found, revision

    async def _is_whole(self, found: UserData, chunks: frozenset[tuple[str, int]]) -> bool:
        """Whether user data is as it was written: another program may have changed a chunk."""
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
        """User data that is in etcd.

        Raises:
            NotFound: etcd has none of it: it was swept, or lost with a restore.
            UserDataUnreadable: Another program has changed it, or this hub lacks the key that opens it.
            SourceUnavailable: etcd does not answer.
        """
        prefix = f"{layout.BLOBS}{found.sha256}/"
        chunks = (await self.etcd.read(prefix, prefix_end(prefix))).kvs
        if not chunks:
            raise NotFound(f"etcd does not have user data {found.sha256}", hint="write it again")
        try:
            data = b"".join(self.envelope.open(one.key, one.value) for one in chunks)
        except SourceCorrupt as error:
            raise UserDataUnreadable(error.message, hint=error.hint) from error
        if hashlib.sha256(data).hexdigest() != found.sha256:
            raise UserDataUnreadable(
                f"user data {found.sha256} is not as it was written", hint="write it again"
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
