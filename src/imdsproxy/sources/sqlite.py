"""The embedded source: records in one SQLite file, written through the admin API."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from imdsproxy.core.observation import Observation
from imdsproxy.core.progress import Progress
from imdsproxy.errors import Problem, SourceError, SourceUnavailable
from imdsproxy.sources.api import Origin, Tally, Written
from imdsproxy.sources.pieces import publish_in_pieces
from imdsproxy.sources.sqlite_store import Contents, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Iterable
    from pathlib import Path

    from imdsproxy.core.model import Instance, InstanceId, Network, NetworkId
    from imdsproxy.sources.api import Publish

__all__ = ["SqliteSource"]

_T = TypeVar("_T")


class SqliteSource:
    """The store at `path`; see `api.WritableSource` for what its methods promise.

    SQLite works in a thread of its own. A write is published as soon as it is committed, so that
    guests do not wait for the disk, and acknowledged when the disk has it; writes at the same time
    share one wait.

    Args:
        path: The file; made when it is not there.
        name: The source's name.
        retry_s: How long to wait before a store that cannot be used is tried again.
        now: Unix time, for when instances came.
        progress: Where long writes say how far they are.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str = "sqlite",
        retry_s: float = 1.0,
        now: Callable[[], float] = time.time,
        progress: Progress | None = None,
    ) -> None:
        self._path = path
        self._progress = progress or Progress()
        self._name = name
        self._now = now
        self._retry_s = retry_s
        self._running: _Running | None = None
        self._failure: SourceError | None = None

    @property
    def name(self) -> str:
        """The source's name."""
        return self._name

    def origin_of_port(self, instance: InstanceId, number: int) -> Origin | None:
        """The record's own field: nobody reads the store's file."""
        return Origin(f"instances.{instance}.ports[{number}].network")

    async def run(self, publish: Publish) -> None:
        """Report everything in the store, and every write, until cancelled.

        While the store cannot be used the source is out of sync, and writes raise the reason.
        """
        running = _Running(self._name, self._path, publish, self._now, self._progress)
        told = ""
        try:
            while True:
                try:
                    await running.open()
                except SourceError as error:
                    self._failure = error
                    if told != str(error):
                        told = str(error)
                        publish(self._unusable(error))
                    await asyncio.sleep(self._retry_s)
                    continue
                self._failure = None
                self._running = running
                await asyncio.Event().wait()
        finally:
            self._running = None
            await running.close()

    def _unusable(self, error: SourceError) -> Observation:
        problem = Problem("store", error.message, error.hint, str(self._path))
        return Observation(self._name, in_sync=False, problems=(problem,))

    async def put_network(self, network: Network) -> Written:
        """Add a network, or change the one with its id."""
        return _one(await self._usable().put([network], [], bulk=False))

    async def put_instance(self, instance: Instance) -> Written:
        """Add an instance, or change the one with its id."""
        return _one(await self._usable().put([], [instance], bulk=False))

    async def put_records(
        self, networks: Iterable[Network], instances: Collection[Instance]
    ) -> Tally:
        """Add or change many at once; all or none."""
        return await self._usable().put(networks, instances, bulk=True)

    async def remove_network(self, network: NetworkId, *, force: bool = False) -> bool:
        """Remove a network; `False` when there is none of that id."""
        return await self._usable().remove_network(network, force=force)

    async def remove_instance(self, instance: InstanceId) -> bool:
        """Remove an instance; `False` when there is none of that id."""
        return await self._usable().remove_instance(instance)

    def _usable(self) -> _Running:
        if self._running is not None:
            return self._running
        if self._failure is not None:
            raise self._failure
        raise SourceUnavailable(f"the store {self._path} is not open yet", hint="try again")


class _Running:
    """The store while its source runs: its threads, and what it has refused."""

    def __init__(
        self,
        name: str,
        path: Path,
        publish: Publish,
        now: Callable[[], float],
        progress: Progress,
    ) -> None:
        self._progress = progress
        self._name = name
        self._path = path
        self._now = now
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="imdsproxy-store")
        self._sync_thread = ThreadPoolExecutor(1, thread_name_prefix="imdsproxy-store-sync")
        self._publish = publish
        self._store: Store | None = None
        self._committed = 0
        self._synced = 0
        self._syncing: asyncio.Task[None] | None = None
        self._problems: dict[tuple[str, str], tuple[Problem, ...]] = {}
        self._writes: set[asyncio.Task[object]] = set()

    async def open(self) -> None:
        """Open the store, read all of it, and publish that."""
        contents = await self._in_thread(self._open)
        self._problems = contents.problems
        observation = Observation(
            self._name, full=True, networks=contents.networks, problems=self._all_problems()
        )
        await publish_in_pieces(self._publish, observation, contents.instances)

    async def close(self) -> None:
        """Wait for what is being written, and close the store."""
        if self._writes:
            await asyncio.wait(self._writes)
        # After whatever the thread still does: it works in order.
        await self._in_thread(self._close)
        self._thread.shutdown(wait=False)
        self._sync_thread.shutdown(wait=False)

    async def ask(self, question: Callable[[Store], _T]) -> _T:
        """Read from the store."""
        store = self._store
        if store is None:
            raise SourceUnavailable(f"the store {self._path} is closed")
        return await self._in_thread(lambda: question(store))

    async def put(
        self, networks: Iterable[Network], instances: Collection[Instance], *, bulk: bool
    ) -> Tally:
        """See `Store.put`."""

        async def write() -> Tally:
            written = await self.ask(
                lambda store: store.put(networks, instances, bulk=bulk, progress=self._progress)
            )
            for kind, records in (("networks", written.networks), ("instances", written.instances)):
                for key in records:
                    self._problems.pop((kind, key), None)
            if written.networks or written.instances:
                observation = Observation(
                    self._name, networks=written.networks, problems=self._all_problems()
                )
                if written.tally.changed:
                    # Addresses may move among the records: nobody sees that half done.
                    self._publish(replace(observation, instances=written.instances))
                else:
                    await publish_in_pieces(self._publish, observation, written.instances)
                await self._on_disk()
            return written.tally

        return await self._finish(write())

    async def remove_network(self, network: NetworkId, *, force: bool) -> bool:
        """See `Store.remove_network`."""

        async def write() -> bool:
            found = await self.ask(lambda store: store.remove_network(network, force=force))
            self._problems.pop(("networks", network), None)
            if found:
                problems = self._all_problems()
                self._publish(
                    Observation(self._name, networks_removed=(network,), problems=problems)
                )
                await self._on_disk()
            return found

        return await self._finish(write())

    async def remove_instance(self, instance: InstanceId) -> bool:
        """See `Store.remove_instance`."""

        async def write() -> bool:
            found = await self.ask(lambda store: store.remove_instance(instance))
            self._problems.pop(("instances", instance), None)
            if found:
                problems = self._all_problems()
                self._publish(
                    Observation(self._name, instances_removed=(instance,), problems=problems)
                )
                await self._on_disk()
            return found

        return await self._finish(write())

    async def _finish(self, write: Coroutine[object, object, _T]) -> _T:
        """Do a write and publish it even if whoever asked for it goes away meanwhile."""
        task = asyncio.ensure_future(write)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        # Looked at here too, for nobody may be left to: a task complains of an exception unseen.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def _on_disk(self) -> None:
        """Wait until the disk has what is committed."""
        self._committed += 1
        mine = self._committed
        while self._synced < mine:
            if self._syncing is None:
                self._syncing = asyncio.ensure_future(self._sync(self._committed))
            await asyncio.shield(self._syncing)

    async def _sync(self, committed: int) -> None:
        store = self._store
        try:
            if store is not None:
                await asyncio.get_running_loop().run_in_executor(self._sync_thread, store.sync)
            self._synced = committed
        finally:
            self._syncing = None

    def _all_problems(self) -> tuple[Problem, ...]:
        return tuple(problem for key in sorted(self._problems) for problem in self._problems[key])

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _open(self) -> Contents:
        store = Store(self._path, now=self._now)
        try:
            contents = store.load()
        except BaseException:
            store.close()
            raise
        self._store = store
        return contents

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None


def _one(tally: Tally) -> Written:
    if tally.added:
        return Written.ADDED
    return Written.CHANGED if tally.changed else Written.UNCHANGED
