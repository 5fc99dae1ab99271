"""The file source: a directory of YAML and JSON records, in force as soon as they are written."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.observation import Observation
from imdsproxy.core.packed import PackedInstances
from imdsproxy.errors import Problem
from imdsproxy.sources.directory import Directory, Reading
from imdsproxy.sources.last_good import LastGood
from imdsproxy.sources.pieces import publish_in_pieces
from imdsproxy.sources.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from imdsproxy.core.progress import Progress
    from imdsproxy.sources.api import Origin, Publish

__all__ = ["FileSource"]

_UNWATCHED_S: Final = 1.0
"""How often to look where the kernel does not tell."""


class FileSource:
    """A directory of record files, watched. Bad records are refused one by one; see `in_force`.

    Args:
        directory: Where the files are; it need not exist yet.
        last_good: A file of ours that keeps what is in force over a restart, for the case that a record
            file is broken then; `None` to do without.
        name: The source's name.
        clock: Monotonic seconds.
        progress: Where reading a large file says how far it is.
    """

    def __init__(
        self,
        directory: Path,
        *,
        last_good: Path | None = None,
        name: str = "file",
        clock: Callable[[], float] = time.monotonic,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress
        self._path = directory.absolute()
        self._last_good = last_good
        self._name = name
        self._clock = clock
        self._directory: Directory | None = None

    @property
    def name(self) -> str:
        """The source's name."""
        return self._name

    def origin_of_port(self, instance: InstanceId, number: int) -> Origin | None:
        """Where an instance's port was written."""
        return None if self._directory is None else self._directory.origin_of_port(instance, number)

    async def run(self, publish: Publish) -> None:
        """Report the directory's records, and every change of them, until cancelled.

        While the directory cannot be listed the source is out of sync, and what it told stays.
        """
        last_good = None if self._last_good is None else LastGood(self._last_good)
        directory = Directory(
            self._path, clock=self._clock, last_good=last_good, progress=self._progress
        )
        self._directory = directory
        reporter = _Reporter(self._name, directory, publish)
        watch: Watch | None = None
        changed: frozenset[Path] = frozenset()
        try:
            while True:
                # In a thread: ten thousand records take seconds, and guests are waiting.
                reading = await asyncio.to_thread(directory.read, changed)
                unwatched = None
                if watch is None or watch.places != reading.places:
                    if watch is not None:
                        watch.close()
                    watch, unwatched = _watch(reading)
                    await reporter.report(reading, unwatched)
                    if watch is not None:
                        # What changed before it began to watch is seen now.
                        changed = frozenset()
                        continue
                else:
                    await reporter.report(reading, None)
                # Afterwards: guests do not wait for what only a restart needs.
                reporter.unkept = await asyncio.to_thread(directory.keep)
                await reporter.report(reading.without_changes(), unwatched)
                changed = await self._wait(watch, reading)
        finally:
            if watch is not None:
                watch.close()

    async def _wait(self, watch: Watch | None, reading: Reading) -> frozenset[Path]:
        if watch is None:
            await asyncio.sleep(_UNWATCHED_S if reading.again_s is None else reading.again_s)
            return frozenset()
        while True:
            changed = await watch.changes(reading.again_s)
            if not changed or any(
                path.parent == self._path or path in reading.relevant for path in changed
            ):
                return changed


class _Reporter:
    """Publishes what differs from what was published."""

    def __init__(self, name: str, directory: Directory, publish: Publish) -> None:
        self._name = name
        self._directory = directory
        self._publish = publish
        self._told: tuple[bool, tuple[Problem, ...]] | None = None
        self._complete = False
        self.unkept: Problem | None = None

    async def report(self, reading: Reading, unwatched: Problem | None) -> None:
        own = tuple(problem for problem in (unwatched, self.unkept) if problem is not None)
        problems = (*own, *reading.problems)
        told = (reading.readable, problems)
        full = reading.readable and not self._complete
        if not full and not reading.networks and not reading.instances and told == self._told:
            return
        # The first time also what was in force before a restart, though the directory be gone.
        everything = full or self._told is None
        self._told = told
        self._complete = self._complete or full
        networks = self._directory.networks if everything else reading.networks
        instances = self._directory.instances if everything else reading.instances
        observation = Observation(
            source=self._name,
            full=full,
            networks={NetworkId(key): value for key, value in networks.items() if value},
            networks_removed=[NetworkId(key) for key, value in networks.items() if not value],
            instances_removed=[InstanceId(key) for key, value in instances.items() if not value],
            in_sync=reading.readable,
            problems=problems,
        )
        there = PackedInstances()
        for instance in instances.values():
            if instance is not None:
                there.put(instance)
        if everything or reading.all_new:
            await publish_in_pieces(self._publish, observation, there)
        else:
            # Addresses may move among the records: nobody sees that half done.
            self._publish(replace(observation, instances=there))


def _watch(reading: Reading) -> tuple[Watch | None, Problem | None]:
    try:
        return Watch(reading.places), None
    except OSError as error:
        return None, Problem(
            "directory",
            f"cannot be watched ({error}); it is looked at every {_UNWATCHED_S:.0f} s",
            "raise fs.inotify.max_user_watches and fs.inotify.max_user_instances",
        )
