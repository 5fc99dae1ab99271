"""Writer of the data plane's records: first to disk, then to every worker, then acknowledged."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Final

import structlog

from imdsproxy.errors import DataplaneError, HostRefused
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.master import MasterClient, WorkerEnded
from imdsproxy.haproxy.rules import maps
from imdsproxy.haproxy.rules.runtime import Processes
from imdsproxy.host.files import ensure_directory, write_atomic

_STAMP: Final = "stamp"
_SWAP_ABOVE = 256
"""Number of changes beyond which replacing the overlay is cheaper than sending each change."""


@dataclass(slots=True)
class RecordApplier:
    """Writer that keeps the two map files, and the two maps in every worker, equal to the planned records.

    `lock` is held while records change and during reloads: no process writes the files while a new worker reads them,
    so no change can be lost between its files and its sockets.

    Attributes:
        known: Workers whose maps are known to equal the files.
        behind: Whether a change may be missing in some workers; the next change makes up for it.
        tables: Last tables of `apply_table`, by file; unknown workers get them as well.
        unconfirmed: Files of tables that some known workers may lack.
    """

    layout: Layout
    state: maps.MapState = field(default_factory=maps.MapState)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    known: set[int] = field(default_factory=set)
    compact_above: int = maps.COMPACT_ABOVE
    behind: bool = False
    tables: dict[Path, dict[str, str]] = field(default_factory=dict, repr=False)
    unconfirmed: set[Path] = field(default_factory=set)
    master: MasterClient = field(init=False)

    def __post_init__(self) -> None:
        self.master = MasterClient(self.layout.master_socket)

    def load(self) -> bool:
        """Read the files of an earlier controller; return whether a base and an overlay are present."""
        try:
            with self.layout.base_map.open() as file:
                generation, base = maps.parse_base_map(file)
            overlay_generation, overlay = maps.parse_map(self.layout.overlay_map.read_text())
        except FileNotFoundError:
            return False
        except (OSError, UnicodeDecodeError) as error:
            raise HostRefused(
                f"cannot read the record maps in {self.layout.runtime}: {error}"
            ) from error
        if generation is None:
            return False
        # An overlay of an earlier generation is already part of this base.
        known = overlay if overlay_generation == generation else {}
        self.state = maps.MapState(generation, base, known)
        return True

    def write_all(self, records: Mapping[str, str]) -> None:
        """Write both files anew. Call this only while no HAProxy runs, or under the lock before a swap.

        Raises `HostRefused` if a file cannot be written; the old files are unchanged.
        """
        generation = str(int(self.state.generation) + 1)
        write_atomic(self.layout.base_map, maps.render_map(records, generation).encode())
        write_atomic(self.layout.overlay_map, maps.render_map({}, generation).encode())
        packed = (
            records
            if isinstance(records, maps.PackedMap)
            else maps.PackedMap(sorted(records.items()))
        )
        self.state = maps.MapState(generation, packed, {})

    def _copies(self) -> dict[Path, Path]:
        layout = self.layout
        paths = (layout.base_map, layout.overlay_map, layout.path_rules_map)
        return {path: layout.kept_maps / path.name for path in paths}

    def save_copies(self, made_of: bytes) -> None:
        """Copy the maps for a start that would make the same ones, with a digest of the maps and their inputs.

        A failure only makes the next start slower: without copies it makes all records.
        """
        copies = self._copies()
        try:
            ensure_directory(self.layout.kept_maps, mode=0o700)
            texts = [path.read_bytes() for path in copies]
            for copy, text in zip(copies.values(), texts, strict=True):
                write_atomic(copy, text, mode=0o600)
            write_atomic(self.layout.kept_maps / _STAMP, _digest(made_of, texts), mode=0o600)
        except (OSError, DataplaneError) as error:
            structlog.get_logger().warning(
                "maps not copied: the next start makes all records", reason=str(error)
            )

    def restore_copies(self, made_of: Callable[[], bytes | None]) -> bool:
        """Restore the copies for HAProxy if their inputs are the same now; return whether that was done.

        The getter of the inputs, as `save_copies` got them, is called only if there are copies.
        """
        copies = self._copies()
        try:
            stamp = (self.layout.kept_maps / _STAMP).read_bytes()
            texts = [copy.read_bytes() for copy in copies.values()]
        except OSError:
            return False
        now = made_of()
        if now is None or stamp != _digest(now, texts):
            return False
        for path, text in zip(copies, texts, strict=True):
            write_atomic(path, text)
        return True

    async def apply_table(
        self, path: Path, entries: Mapping[str, str], *, secret: bool = False, single: bool = False
    ) -> None:
        """Replace a small map on disk (as `write_table`) and in every worker; raises as `apply`.

        With `single`, send only the differences (`maps.plan_table_changes`) if they are few; keys and values must then
        contain no semicolon. Otherwise the map is replaced at once.
        """
        async with self.lock:
            sure = single and path not in self.unconfirmed
            before = self.tables.get(path) if sure else None
            write_table(path, entries, secret=secret)
            self.tables[path] = dict(entries)
            self.unconfirmed.add(path)
            workers = (await self.master.read_processes()).workers
            changes = None if before is None else maps.plan_table_changes(before, entries)
            await self._each(workers, lambda worker: self._send_table(worker, path, changes))
            self.unconfirmed.discard(path)

    async def apply(self, wanted: Mapping[str, str | None]) -> int:
        """Set each key's value (`None` removes the key) on disk and in all workers; return the number of changes.

        Wait until every worker has confirmed or ended: from then on no guest gets an older answer. Raises
        `HostRefused` if the file cannot be written; then nothing has changed. Raises `RuntimeUnavailable` if
        HAProxy's master does not answer, and `CommandRefused` if a worker refused; then the file holds the new state.
        """
        async with self.lock:
            changes = self.state.overlay_changes(wanted)
            if not changes and not self.behind:
                return 0
            gone = set(changes.removed)
            overlay = {key: one for key, one in self.state.overlay.items() if key not in gone}
            overlay.update((*changes.changed, *changes.added))
            if self.behind:
                self.known.clear()
            # If a later step fails, some workers may hold entries that the files no longer have.
            self.behind = True
            if len(overlay) > self.compact_above:
                await self._compact(overlay)
            else:
                write_atomic(
                    self.layout.overlay_map,
                    maps.render_map(overlay, self.state.generation).encode(),
                )
                self.state.overlay = overlay
                await self._send_changes(changes)
            self.behind = False
            return len(changes)

    async def adopt(self) -> None:
        """Make the maps of every running worker equal to the files, whatever they hold."""
        async with self.lock:
            processes = await self.master.read_processes()
            self.known &= set(processes.workers)
            await self._greet(processes)

    def trust(self, processes: Processes) -> None:
        """Mark the accepting worker as known: it was started under our lock and has read the current files."""
        if processes.worker is not None:
            self.known.add(processes.worker)
        self.known &= set(processes.workers)

    async def _send_changes(self, changes: maps.MapChanges) -> None:
        processes = await self.master.read_processes()
        fresh = await self._greet(processes)
        workers = [pid for pid in processes.workers if pid in self.known and pid not in fresh]
        path = str(self.layout.overlay_map)
        if len(changes) > _SWAP_ABOVE:
            await self._each(workers, lambda worker: self._swap_overlay(worker, self.state))
            return
        # Changes and removals reach all workers before additions.
        await self._each(workers, lambda worker: self._send_going(worker, path, changes))
        added = list(changes.added)
        await self._each(workers, lambda worker: self.master.send_additions(worker, path, added))

    async def _send_going(self, worker: int, path: str, changes: maps.MapChanges) -> None:
        for key, value in changes.changed:
            await self.master.send_upsert(worker, path, key, value)
        for key in changes.removed:
            await self.master.send_removal(worker, path, key)

    async def _greet(self, processes: Processes) -> set[int]:
        """Bring unknown workers to the files' state, whichever controller started them."""
        fresh = set(processes.workers) - self.known
        await self._each(sorted(fresh), self._synchronise)
        return fresh

    async def _synchronise(self, worker: int) -> None:
        # Tables come first, because records refer to their entries.
        for path, table in self.tables.items():
            await self._swap(worker, path, table)
        base = str(self.layout.base_map)
        if await self.master.read_entry(worker, base, maps.GENERATION_KEY) != self.state.generation:
            await self._swap_base(worker)
        await self._swap_overlay(worker, self.state)
        self.known.add(worker)

    async def _send_table(self, worker: int, path: Path, changes: maps.MapChanges | None) -> None:
        if changes is None or worker not in self.known or len(changes) > _SWAP_ABOVE:
            await self._swap(worker, path, self.tables[path])
            return
        await self.master.send_additions(worker, str(path), list(changes.added))
        await self._send_going(worker, str(path), changes)

    async def _swap_base(self, worker: int) -> None:
        await self._swap(worker, self.layout.base_map, self.state.base, self.state.generation)

    async def _swap_overlay(self, worker: int, state: maps.MapState) -> None:
        await self._swap(worker, self.layout.overlay_map, state.overlay, state.generation)

    async def _swap(
        self, worker: int, path: Path, entries: Mapping[str, str], generation: str | None = None
    ) -> None:
        head = [] if generation is None else [(maps.GENERATION_KEY, generation)]
        # A list, because building a mapping from a packed map would unpack it twice.
        await self.master.send_swap(worker, str(path), [*head, *entries.items()])

    async def _compact(self, overlay: dict[str, str]) -> None:
        """Fold the overlay into a new base; guests see the old state or the new one, nothing between.

        In each worker the overlay is completed first, so that it hides the base during the base's changes, and emptied
        last.
        """
        full = maps.MapState(self.state.generation, self.state.base, overlay)
        # In a thread, like the write: hundreds of thousands of entries take seconds.
        merged = await asyncio.to_thread(lambda: maps.PackedMap(full.entries()))
        changes = maps.plan_changes(full.base, {key: full.lookup(key) for key in overlay})
        await asyncio.to_thread(self.write_all, merged)
        processes = await self.master.read_processes()
        known = [worker for worker in processes.workers if worker in self.known]
        await self._each(known, lambda worker: self._compact_worker(worker, full, changes))
        await self._greet(processes)

    async def _compact_worker(
        self, worker: int, full: maps.MapState, changes: maps.MapChanges
    ) -> None:
        base = str(self.layout.base_map)
        await self._swap_overlay(worker, full)
        if len(changes) > len(full.base) // 2:
            await self._swap_base(worker)
        else:
            await self._send_going(worker, base, changes)
            await self.master.send_additions(worker, base, list(changes.added))
            await self.master.send_upsert(worker, base, maps.GENERATION_KEY, self.state.generation)
        await self._swap_overlay(worker, self.state)

    async def _each(
        self, workers: Iterable[int], step: Callable[[int], Coroutine[object, object, None]]
    ) -> None:
        """Run a step for each worker in turn; skip a worker that ends meanwhile."""
        for worker in workers:
            try:
                await step(worker)
            except WorkerEnded:
                self.known.discard(worker)


def write_table(path: Path, entries: Mapping[str, str], *, secret: bool = False) -> None:
    """Write a small map to its file, from which HAProxy loads it; raise `HostRefused` if the file system refuses."""
    text = "".join(f"{key} {value}\n" for key, value in entries.items())
    write_atomic(path, text.encode(), mode=0o600 if secret else 0o640, durable=secret)


def _digest(made_of: bytes, texts: Iterable[bytes]) -> bytes:
    digest = blake2b(made_of)
    for text in texts:
        digest.update(b"%d:" % len(text))
        digest.update(text)
    return digest.hexdigest().encode()
