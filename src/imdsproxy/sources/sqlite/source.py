"""The embedded source: records in one SQLite file, written through the admin API."""

import asyncio
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

from imdsproxy.errors import Problem, SourceError, SourceUnavailable
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId
from imdsproxy.model.observation import Observation, StrandedPort
from imdsproxy.reconcile.progress import Progress
from imdsproxy.sources.api import Publish, Reports, publish_in_pieces
from imdsproxy.sources.sqlite.store import Store

_T = TypeVar("_T")


@dataclass(slots=True)
class SqliteSource:
    """Source of the records in the store at `path`.

    SQLite works in a thread of its own. A write is published as soon as it is committed, so that guests do not wait for
    the disk. It is acknowledged when the disk has it; concurrent writes share one wait. A write is atomic: the store
    does all or refuses all (`SourceRefused` with the fields). While the source is not running or its store cannot be
    used, writes raise `SourceUnavailable` or `SourceCorrupt`.

    `retry_s`: seconds before a store that cannot be used is tried again.
    """

    name: ClassVar = "sqlite"
    path: Path
    retry_s: float = 1.0
    now: Callable[[], float] = time.time
    progress: Progress = field(default_factory=Progress)
    _reports: Reports = field(default_factory=partial(Reports, name))
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="imdsproxy-store")
    )
    _publish: Publish | None = None
    _publishing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _store: Store | None = None
    _failure: SourceError | None = None
    _writes: set[asyncio.Task[None]] = field(default_factory=set)
    _committed: int = 0
    _synced: int = 0
    _syncing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def explain_stranded(self, port: StrandedPort) -> Problem:
        """Describe the problem by the record's own field: operators do not read the store's file."""
        return port.problem()

    async def run(self, publish: Publish) -> None:
        """Report all records in the store, and every write, until cancelled.

        While the store cannot be used, the source is out of sync, and writes raise the reason.
        """
        try:
            await self._open(publish)
            self._publish = publish
            await asyncio.Event().wait()
        finally:
            self._publish = None
            if self._writes:
                await asyncio.wait(self._writes)
            # The thread works in order, so this closes the store after all earlier work.
            await self._in_thread(self._close_store)
            self._thread.shutdown(wait=False)

    async def _open(self, publish: Publish) -> None:
        while True:
            try:
                records = await self._in_thread(self._open_store)
                self._failure = None
            except SourceError as error:
                self._failure, records = error, Observation()
                await self._in_thread(self._close_store)
            await self._report(publish, records)
            if self._failure is None:
                return
            await asyncio.sleep(self.retry_s)

    def _open_store(self) -> Observation:
        self._store = Store(self.path, now=self.now, progress=self.progress)
        return self._store.load()

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    # Writes

    async def put(
        self, networks: Collection[Network], instances: Collection[Instance], *, bulk: bool = False
    ) -> None:
        """Add or change records: all or none.

        An instance without a creation time keeps the stored creation time; a new instance gets the current time.

        `bulk`: whether a problem's field begins with `networks[i]` or `instances[i]`. Raises `SourceRefused`: another
        instance in the store has an address or a MAC, or an id occurs twice.
        """
        await self._write(lambda store: store.put(networks, instances, bulk=bulk))

    async def remove_network(self, network: NetworkId) -> None:
        """Remove a network, if it exists; raise `SourceRefused` if instances in the store have ports in the network."""
        await self._write(lambda store: store.remove_network(network))

    async def remove_instance(self, instance: InstanceId) -> None:
        await self._write(lambda store: store.remove_instance(instance))

    async def _write(self, work: Callable[[Store], Observation]) -> None:
        """Complete and publish a write even if its caller is cancelled meanwhile."""
        if self._failure is not None:
            raise self._failure
        if self._publish is None or self._store is None:
            raise SourceUnavailable(f"the store {self.path} is not open yet", hint="try again")
        task = asyncio.ensure_future(self._commit(self._publish, self._store, work))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        # Retrieve the exception: asyncio warns about unretrieved ones, and the caller may be gone.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)

    async def _commit(
        self, publish: Publish, store: Store, work: Callable[[Store], Observation]
    ) -> None:
        changes = await self._in_thread(lambda: work(store))
        if not changes.has_records:
            return
        for network in (*changes.networks, *changes.networks_removed):
            store.problems.pop(("networks", network), None)
        for instance in (*changes.instances, *changes.instances_removed):
            store.problems.pop(("instances", instance), None)
        await self._report(publish, changes)
        self._committed += 1
        mine = self._committed
        async with self._syncing:
            if self._synced < mine:
                committed = self._committed
                await asyncio.to_thread(store.sync)
                self._synced = committed

    async def _report(self, publish: Publish, changes: Observation) -> None:
        stored, failure = {} if self._store is None else self._store.problems, self._failure
        problems = [problem for key in sorted(stored) for problem in stored[key]]
        if failure is not None:
            problems = [Problem("store", failure.message, failure.hint, str(self.path))]
        observation = self._reports.next(
            changes, lambda: changes, in_sync=failure is None, problems=tuple(problems)
        )
        if observation is not None:
            # Publish in the order of the commits: the last piece of one write must not undo the next write.
            async with self._publishing:
                await publish_in_pieces(publish, observation)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
