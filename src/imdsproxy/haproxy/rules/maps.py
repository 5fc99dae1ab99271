"""Records in HAProxy's maps: a large base map, and a small overlay that HAProxy looks up first.

A change must be on disk before it is acknowledged, because a worker that starts by itself reads the files. No single
change may rewrite tens of megabytes. Therefore changes go to the overlay (with a tombstone for removed keys), and a
grown overlay is merged into a new base. Both maps have a generation, which shows whether a worker's base belongs to our
overlay.
"""

import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import merge
from io import StringIO
from itertools import islice
from typing import Final

from imdsproxy.model.wire import MAP_TOMBSTONE

COMPACT_ABOVE: Final = 1024
"""Entries of the overlay above which it is merged into the base."""

GENERATION_KEY: Final = "@generation"
"""No network id begins with `@`, so no record can have this key."""


_BLOCK: Final = 256


class PackedMap(Mapping[str, str]):
    """Map entries in a tenth of the memory: ordered by key, in compressed blocks.

    The last used block stays open, so that iteration in key order is fast.
    """

    __slots__ = ("_blocks", "_count", "_firsts", "_open")

    def __init__(self, entries: Iterable[tuple[str, str]] = ()) -> None:
        self._firsts: list[str] = []
        self._blocks: list[bytes] = []
        self._count = 0
        self._open: tuple[int, dict[str, str]] = (-1, {})
        self.extend(entries)

    def extend(self, entries: Iterable[tuple[str, str]]) -> None:
        """Add entries that are in key order and follow all present entries."""
        rest = iter(entries)
        while block := list(islice(rest, _BLOCK)):
            text = "\n".join(f"{key} {value}" for key, value in block)
            # A copy: the key itself would keep alive the memory that was allocated along with it.
            self._firsts.append(text[: text.index(" ")])
            self._blocks.append(zlib.compress(text.encode(), 1))
            self._count += len(block)

    def __getitem__(self, key: str) -> str:
        index = bisect_right(self._firsts, key) - 1
        if index < 0:
            raise KeyError(key)
        return self._block(index)[key]

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self._blocks)):
            yield from self._block(index)

    def __len__(self) -> int:
        return self._count

    def _block(self, index: int) -> dict[str, str]:
        number, block = self._open
        if number != index:
            lines = zlib.decompress(self._blocks[index]).decode().split("\n")
            entries = (line.partition(" ") for line in lines)
            block = {key: value for key, _, value in entries}
            # Assigned in one step, because another thread may open another block meanwhile.
            self._open = index, block
        return block


@dataclass(frozen=True, slots=True)
class MapChanges:
    """Changes of a map's entries, in the order of their application; `changed` may add tombstones.

    Removals and changes come before additions: while an address moves, for a moment no instance has it, and never do
    two.
    """

    changed: tuple[tuple[str, str], ...] = ()
    removed: tuple[str, ...] = ()
    added: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.changed) + len(self.removed) + len(self.added)


@dataclass(slots=True)
class MapState:
    """Content of the two maps on disk; every worker has a copy."""

    generation: str = "0"
    base: Mapping[str, str] = field(default_factory=dict)
    overlay: dict[str, str] = field(default_factory=dict)

    def lookup(self, key: str) -> str | None:
        """Return the value that a request with this key gets; `None` for no entry or a tombstone."""
        value = self.overlay.get(key)
        if value is None:
            value = self.base.get(key)
        return None if value == MAP_TOMBSTONE else value

    def entries(self) -> Iterator[tuple[str, str]]:
        """Yield base and overlay merged, without tombstones, in key order."""
        base = (entry for entry in self.base.items() if entry[0] not in self.overlay)
        overlay = sorted(entry for entry in self.overlay.items() if entry[1] != MAP_TOMBSTONE)
        return merge(base if isinstance(self.base, PackedMap) else sorted(base), overlay)

    def effective(self) -> dict[str, str]:
        return dict(self.entries())

    def differing(self, wanted: Mapping[str, str | None]) -> dict[str, str | None]:
        """Return the entries of `wanted` whose lookup gives another value."""
        return {key: wanted[key] for key in sorted(wanted) if self.lookup(key) != wanted[key]}

    def overlay_changes(self, wanted: Mapping[str, str | None]) -> MapChanges:
        """Return the overlay's changes that give each key of `wanted` its value (`None`: removed)."""
        target = self.differing(wanted)
        for key, value in target.items():
            if value is None and key in self.base:
                # Only a key in the base needs a tombstone; otherwise the overlay's entry is deleted.
                target[key] = MAP_TOMBSTONE
        return plan_changes(self.overlay, target)


def plan_changes(present: Mapping[str, str], wanted: Mapping[str, str | None]) -> MapChanges:
    """Return the changes after which `present` agrees with `wanted` on `wanted`'s keys."""
    changed: list[tuple[str, str]] = []
    tombstones: list[tuple[str, str]] = []
    removed: list[str] = []
    added: list[tuple[str, str]] = []
    for key in sorted(wanted):
        before, value = present.get(key), wanted[key]
        if before == value:
            continue
        if value is None:
            removed.append(key)
        elif before is not None:
            changed.append((key, value))
        else:
            (tombstones if value == MAP_TOMBSTONE else added).append((key, value))
    return MapChanges((*changed, *tombstones), tuple(removed), tuple(added))


def plan_table_changes(before: dict[str, str], after: Mapping[str, str]) -> MapChanges:
    """Return the changes of a table whose entries refer to earlier ones: apply `added`, then `changed`, then `removed`.

    Thus an entry is present before others refer to it, and is removed after them.
    """
    changed = tuple((key, one) for key, one in after.items() if before.get(key, one) != one)
    removed = tuple(key for key in reversed(before) if key not in after)
    added = tuple((key, one) for key, one in after.items() if key not in before)
    return MapChanges(changed, removed, added)


def render_map(entries: Mapping[str, str], generation: str) -> str:
    """Render a map file: the generation first, then one `KEY VALUE` per line, in the given order."""
    # Written entry by entry: a list of hundreds of thousands of entries would take three times the memory.
    text = StringIO()
    text.write(f"{GENERATION_KEY} {generation}\n")
    text.writelines(f"{key} {value}\n" for key, value in entries.items())
    return text.getvalue()


def parse_map(text: str) -> tuple[str | None, dict[str, str]]:
    """Return the generation (`None` if the file has none) and the entries; lines without a value are skipped."""
    entries: dict[str, str] = {}
    for key, value in _entries(text.splitlines()):
        entries.setdefault(key, value)
    return entries.pop(GENERATION_KEY, None), entries


def parse_base_map(lines: Iterable[str]) -> tuple[str | None, PackedMap]:
    """Parse a map file without duplicates that may have hundreds of thousands of entries."""
    # A blank sorts before every character of a key, so sorted lines have sorted keys.
    ordered = sorted(lines)
    generation = next((value for key, value in _entries(ordered) if key == GENERATION_KEY), None)
    return generation, PackedMap(one for one in _entries(ordered) if one[0] != GENERATION_KEY)


def _entries(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        key, separator, value = line.rstrip("\n").partition(" ")
        if separator and not line.startswith("#"):
            yield key, value


def split_payload(entries: Iterable[tuple[str, str]], limit: int) -> list[str]:
    """Split entries into Runtime API payloads of at most `limit` bytes; an entry is never split."""
    payloads: list[str] = []
    payload = ""
    for key, value in entries:
        line = f"{key} {value}\n"
        if payload and len(payload) + len(line) > limit:
            payloads.append(payload)
            payload = ""
        payload += line
    return [*payloads, payload] if payload else payloads
