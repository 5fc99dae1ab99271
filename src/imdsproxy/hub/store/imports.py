"""Import of many records: a check of all of them, then writes in parts, each with the import's progress.

To continue an interrupted import, the client sends the same records again: the hub recognizes written records by their
request. The name of an import is a digest of its content, so any hub can continue.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import HostId, Journal, render_journal
from imdsproxy.hub.store import plan_records
from imdsproxy.hub.store.etcd_messages import prefix_end
from imdsproxy.hub.store.plan_records import InstancePut
from imdsproxy.hub.store.transactions import Terms, Transaction
from imdsproxy.hub.store.write_checks import refuse_shared
from imdsproxy.hub.store.writes import Done, Fresh, Writes
from imdsproxy.model.entities import Network
from imdsproxy.model.records import NETWORK, PLACED, PlacedInstance
from imdsproxy.reconcile.progress import Progress

_CHECKING: Final = "checking records against the fleet"
_STORING: Final = "storing records"
_NETWORKS_AT_ONCE: Final = 50
_OPERATIONS: Final = 110
_BYTES: Final = 768 * 1024
_KNOWN_S: Final = 3600

_log = structlog.get_logger()


@dataclass(slots=True)
class Import:
    """Import of networks, which are all written before the first instance, and of instances with their user data.

    `run` replaces the request of the terms by the import's name, the result of `make_name`.
    """

    writes: Writes
    networks: Sequence[Network]
    instances: Sequence[PlacedInstance]
    terms: Terms
    name: str = ""
    progress: Progress = field(default_factory=Progress)

    async def run(self) -> Done:
        """Check all records, then write them; a failed check leaves all unwritten. Raises as `Writes.put`."""
        request = self.name
        key = layout.import_key(request)
        of = len(self.networks) + len(self.instances)
        try:
            begun = bool((await self.writes.etcd.read(key)).kvs)
            # Only an import that continues recognizes written records as its own.
            terms = replace(self.terms, request=request if begun else f"{request}+")
            await self._check(terms)
            terms = replace(terms, request=request)
            await self.writes.etcd.commit((), {key: _journal(0, of, terms.now)})
            done = await self._write(key, of, terms)
            # Keep the journal for a while: after a lost answer, the client sends the same records again.
            lease = await self.writes.etcd.grant(_KNOWN_S)
            await self.writes.etcd.commit((), {key: _journal(of, of, terms.now)}, lease=lease)
        finally:
            self.progress.end(_CHECKING)
            self.progress.end(_STORING)
        return done

    def make_name(self) -> str:
        """Return the digest of the records: the same for equal records of operators of one project."""
        digest = hashlib.sha256(b"1" if self.terms.create else b"0")
        digest.update(codec.encode({"scope": self.terms.scope}))
        for network in self.networks:
            digest.update(codec.encode(NETWORK.render(network)))
        for one in self.instances:
            digest.update(codec.encode(PLACED.render(replace(one, user_data=None))))
            digest.update(
                b"" if one.user_data is None else hashlib.sha256(bytes(one.user_data)).digest()
            )
        return digest.hexdigest()[:32]

    async def _check(self, terms: Terms) -> None:
        writes = self.writes
        writes.refuse_large(
            (("instances", number), one) for number, one in enumerate(self.instances)
        )
        view = Fresh(writes.state)
        wanted = {port.network for one in self.instances for port in one.ports}
        for number, network in enumerate(sorted(wanted)):
            self.progress.note(_CHECKING, number, len(wanted))
            await view.refresh(writes.etcd, [layout.network_key(network)])
            prefix = layout.claims_in(network)
            found = await writes.etcd.read(prefix, prefix_end(prefix))
            view.read |= {one.key: (one.value, one.mod_revision) for one in found.kvs}
        puts = [
            InstancePut(one, path=("instances", number))
            for number, one in enumerate(self.instances)
        ]
        # Parts are written one after the other, so an address may not move between records of one import.
        planned = await asyncio.to_thread(
            plan_records.plan_put, view, self.networks, puts, terms, at_once=False
        )
        await asyncio.to_thread(refuse_shared, writes.state, planned)

    async def _write(self, key: str, of: int, terms: Terms) -> Done:
        revision, hosts, done = 0, set[HostId](), 0

        async def write(networks: Sequence[Network], instances: Sequence[PlacedInstance]) -> None:
            nonlocal revision, done
            done += len(networks) + len(instances)
            journal = _journal(done, of, terms.now)

            def keep(planned: Transaction) -> Transaction:
                return (
                    replace(planned, puts={**planned.puts, key: journal})
                    if planned.puts
                    else planned
                )

            found = await self.writes.put(networks, instances, terms, bulk=True, finish=keep)
            revision = max(revision, found.revision)
            hosts.update(found.hosts)
            self.progress.note(_STORING, done, of)

        for begin in range(0, len(self.networks), _NETWORKS_AT_ONCE):
            await write(self.networks[begin : begin + _NETWORKS_AT_ONCE], [])
        for part in _parts(self.instances):
            await write([], part)
        return Done(revision, frozenset(hosts), terms.scope)


def _parts(instances: Sequence[PlacedInstance]) -> Iterator[Sequence[PlacedInstance]]:
    begin, operations, size = 0, 0, 0
    for number, one in enumerate(instances):
        # The record, and the override of a removed instance with the same id.
        most = 2 + len(plan_records.claims_of(one)) + len({port.network for port in one.ports})
        # Only the vendor data in a record can be large.
        length = 1024 + len(one.vendor_data or b"") * 2
        if number > begin and (operations + most > _OPERATIONS or size + length > _BYTES):
            yield instances[begin:number]
            begin, operations, size = number, 0, 0
        operations += most + (one.user_data is not None)
        size += length
    if instances:
        yield instances[begin:]


def _journal(done: int, of: int, at: int) -> bytes:
    return render_journal(Journal(done, of, at))
