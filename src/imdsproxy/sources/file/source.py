"""The file source: a directory of YAML and JSON records, in force as soon as they are written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from imdsproxy.core.model import InstanceId, Network, NetworkId
from imdsproxy.core.observation import RecordSet
from imdsproxy.core.packed import PackedInstance, PackedInstances
from imdsproxy.core.timing import Progress
from imdsproxy.errors import Problem
from imdsproxy.host.inotify import Watch
from imdsproxy.sources.api import Origin, Publish, Reports, publish_in_pieces
from imdsproxy.sources.file.directory import Directory, Reading

_UNWATCHED_S: Final = 1.0
"""How often to look where inotify cannot be used."""


class FileSource:
    """A directory of record files, watched. Bad records are refused one by one; see `in_force`.

    Args:
        directory: Where the files are; it need not exist yet.
        last_good: A file of ours that keeps what is in force over a restart, for the case that a record
            file is broken then; `None` to do without.
        clock: Monotonic seconds.
        progress: Where reading a large file says how far it is.
    """

    name: Final = "file"

    def __init__(
        self,
        directory: Path,
        *,
        last_good: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        progress: Progress | None = None,
    ) -> None:
        self._path = directory.absolute()
        self._directory = Directory(
            self._path,
            clock=clock,
            last_good=last_good,
            progress=progress,
        )
        self._reports = Reports(self.name)

    def origin_of_port(self, instance: InstanceId, number: int) -> Origin | None:
        """Where an instance's port was written."""
        return self._directory.origin_of_port(instance, number)

    async def run(self, publish: Publish) -> None:
        """Report the directory's records, and every change of them, until cancelled.

        While the directory cannot be listed the source is out of sync, and what it reported stays.
        """
        watch: Watch | None = None
        changed: frozenset[Path] = frozenset()
        unkept: Problem | None = None
        try:
            while True:
                # In a thread: ten thousand records take seconds, and guests are waiting.
                reading = await asyncio.to_thread(self._directory.read, changed)
                unwatched = None
                if watch is None or watch.places != reading.places:
                    if watch is not None:
                        watch.close()
                    watch, unwatched = _watch(reading)
                    await self._report(publish, reading, unwatched, unkept)
                    if watch is not None:
                        # What changed before it began to watch is seen now.
                        changed = frozenset()
                        continue
                else:
                    await self._report(publish, reading, unkept)
                # Afterwards: guests do not wait for what only a restart needs.
                unkept = await asyncio.to_thread(self._directory.keep)
                await self._report(publish, reading.without_changes(), unwatched, unkept)
                # What it has changed is not needed any more, and may be all there is.
                reading = reading.without_changes()
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

    async def _report(self, publish: Publish, reading: Reading, *own: Problem | None) -> None:
        directory, changes = self._directory, _records(reading.networks, reading.instances)
        observation = self._reports.next(
            changes,
            lambda: changes if reading.whole else _records(directory.networks, directory.instances),
            in_sync=reading.readable,
            problems=(*(problem for problem in own if problem is not None), *reading.problems),
        )
        if observation is None:
            return
        if observation.full or not reading.moved:
            await publish_in_pieces(publish, observation)
        else:
            # An address moves among the records: that is published at once.
            publish(observation)


def _records(
    networks: Mapping[str, Network | None], instances: Mapping[str, PackedInstance | None]
) -> RecordSet:
    packed = PackedInstances()
    for instance in instances.values():
        if instance is not None:
            packed.put(instance)
    return RecordSet(
        {NetworkId(key): value for key, value in networks.items() if value is not None},
        packed,
        [NetworkId(key) for key, value in networks.items() if value is None],
        [InstanceId(key) for key, value in instances.items() if value is None],
    )


def _watch(reading: Reading) -> tuple[Watch | None, Problem | None]:
    try:
        return Watch(reading.places), None
    except OSError as error:
        return None, Problem(
            "directory",
            f"cannot be watched ({error}); it is looked at every {_UNWATCHED_S:.0f} s",
            "raise fs.inotify.max_user_watches and fs.inotify.max_user_instances",
        )
