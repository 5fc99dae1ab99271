"""Records in force while their files appear, change, break and disappear, and reasons for refused records.

Valid records stay in force: a record whose new version is invalid keeps the old version, and a record that claims an id
or address in force is refused, whatever the order of the files. If nothing is in force yet (a fresh start), the order
of the files' names and of the records in them decides.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeAlias, TypeVar

from imdsproxy.errors import Problem
from imdsproxy.model.claims import Claims, taken_address, taken_id
from imdsproxy.model.entities import Instance, InstanceId, Network
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.packed import PackedInstance
from imdsproxy.model.records.schema import Path

Record = TypeVar("Record", bound=Network | Instance | PackedInstance)


@dataclass(frozen=True, slots=True)
class Entry(Generic[Record]):
    """Record in a file.

    Attributes:
        position: Position among the file's records.
        offsets: Lines of the claims, relative to `line`, in the order of `claim_places`. Many entries share one tuple.
    """

    id: str
    file: str
    position: int
    line: int | None = None
    record: Record | None = None
    problems: tuple[Problem, ...] = ()
    offsets: tuple[int | None, ...] = ()

    @property
    def lines(self) -> tuple[int | None, ...]:
        first = self.line
        if first is None:
            return (None,) * len(self.offsets)
        return tuple(None if one is None else first + one for one in self.offsets)

    @property
    def order(self) -> tuple[str, int]:
        return self.file, self.position


@dataclass(frozen=True, slots=True)
class Clash(Generic[Record]):
    """Conflict between two entries, of which one is refused.

    Attributes:
        other: The entry that it would displace.
        addresses: Addresses that both claim; empty if they share the id.
    """

    entry: Entry[Record]
    other: Entry[Record]
    addresses: tuple[AddressKey, ...] = ()


_Each: TypeAlias = Mapping[str, Entry[Record] | None]
"""Entry in force by id; `None` for an id without one."""


@dataclass(slots=True)
class InForce(Generic[Record]):
    """All entries of one kind in all files, and the entries in force.

    `replace_file` sets the content of a file, and `settle` computes the changes. The time of both depends on the
    number of changes, not on the number of entries.

    Args:
        claims: Returns the addresses that a record claims; no two records in force share an address.
        where: Returns the place of an entry for problems: its path in the document, and the document.

    `moved`: whether an address moved from one record to another in the last `settle`.
    """

    claims: Callable[[Record], Iterable[AddressKey]]
    where: Callable[[Entry[Record]], tuple[Path, str | None]]
    moved: bool = False
    _files: dict[str, tuple[Entry[Record], ...]] = field(default_factory=dict)
    _entries: dict[str, tuple[Entry[Record], ...]] = field(default_factory=dict)
    _held: dict[str, Entry[Record]] = field(default_factory=dict)
    _held_by_file: dict[str, set[str]] = field(default_factory=dict)
    _holders: Claims = field(default_factory=Claims)
    _freed: dict[AddressKey, str] = field(default_factory=dict)
    _touched: set[str] = field(default_factory=set)
    _clashes: dict[str, tuple[Clash[Record], ...]] = field(default_factory=dict)
    _unclear: set[str] = field(default_factory=set)

    @property
    def records(self) -> dict[Any, Record]:
        return {key: held.record for key, held in self._held.items() if held.record is not None}

    def prime(self, entry: Entry[Record]) -> None:
        """Put an entry of an earlier process in force until `replace_file` is called for its file."""
        if entry.id not in self._held and self._clash(entry, self._claimed(entry), {}) is None:
            self._hold(entry)

    def has(self, file: str) -> bool:
        return file in self._held_by_file

    def entry_of(self, key: str) -> Entry[Record] | None:
        return self._held.get(key)

    def replace_file(
        self, file: str, entries: Sequence[Entry[Record]], *, unclear: bool = False
    ) -> None:
        """Set the content of a file; no entries for a deleted file.

        `unclear`: whether the file also has records whose id cannot be read. They may be any of the earlier records, so
        all earlier ones stay in force.
        """
        before = {entry.id for entry in self._files.get(file, ())}
        for key in before:
            self._put(key, [entry for entry in self._entries[key] if entry.file != file])
        for entry in entries:
            self._put(entry.id, [*self._entries.get(entry.id, ()), entry])
        (self._unclear.add if unclear else self._unclear.discard)(file)
        self._touched |= before
        self._touched.update(entry.id for entry in entries)
        # Also entries that stayed in force without an entry in the file, because it was unclear.
        self._touched |= self._held_by_file.get(file, set())
        _store(self._files, file, tuple(entries))

    def settle(self) -> dict[Any, Record | None]:
        """Return the changes since the last call, by id: the new record, or `None` for a removed one."""
        before = {key: self._held.get(key) for key in self._touched | self._clashes.keys()}
        self._touched.clear()
        self.moved = False
        self._decide(before)
        while self._give_second_chance():
            pass
        self._freed.clear()
        changes: dict[Any, Record | None] = {}
        for key, old in before.items():
            new = self._held.get(key)
            record = None if new is None else new.record
            if record != (None if old is None else old.record):
                changes[key] = record
        return changes

    def problems(self) -> Iterator[Problem]:
        for file in sorted(self._files):
            for entry in self._files[file]:
                for problem in entry.problems:
                    yield self._noted(problem, entry)
        for key in sorted(self._clashes):
            for clash in self._clashes[key]:
                for problem in self._explain(clash):
                    yield self._noted(problem, clash.entry)

    def _explain(self, clash: Clash[Record]) -> Iterator[Problem]:
        entry, other = clash.entry, clash.other
        path, file = self.where(entry)
        _, place = self.where(other)
        place = place or ""
        if place and other.line is not None:
            place = f"{place}:{other.line}"
        record = entry.record
        instance = record.open() if isinstance(record, PackedInstance) else record
        if not isinstance(instance, Instance) or not clash.addresses:
            yield taken_id(entry.id, path=path, place=place, file=file, line=entry.line)
            return
        for address in clash.addresses:
            yield taken_address(
                instance, address, other.id, path=path, place=place, file=file, lines=entry.lines
            )

    def _noted(self, problem: Problem, entry: Entry[Record]) -> Problem:
        held = self._held.get(entry.id)
        problem = replace(problem, record=entry.id)
        if held is None or held.file != entry.file:
            return problem
        note = "the version before it stays in force"
        return replace(problem, hint=f"{problem.hint}; {note}" if problem.hint else note)

    def _put(self, key: str, entries: list[Entry[Record]]) -> None:
        _store(self._entries, key, tuple(sorted(entries, key=lambda entry: entry.order)))

    def _wish(self, key: str) -> tuple[Entry[Record] | None, list[Clash[Record]]]:
        """Return an id's entry to put in force unless an address conflicts, and clashes of entries with the same id."""
        entries, held = self._entries.get(key, ()), self._held.get(key)
        good = [entry for entry in entries if entry.record is not None]
        own = [entry for entry in entries if held is not None and entry.file == held.file]
        same = next((one for one in own if held is not None and one.record == held.record), None)
        chosen = same or next((one for one in own or good if one.record is not None), None)
        rivals = [entry for entry in good if entry is not chosen]
        if held is not None and same is not None:
            # Keep the same record object, not an equal one: others refer to it.
            chosen = replace(same, record=held.record)
        elif held is not None and chosen is None and (entries or held.file in self._unclear):
            chosen = held
        return chosen, [] if chosen is None else [Clash(rival, chosen) for rival in rivals]

    def _decide(self, before: _Each[Record]) -> None:
        """Put the wished entries in force together, as far as addresses allow."""
        wishes = {key: self._wish(key) for key in before}
        for key in before:
            self._release(key)
        fallen: dict[str, Clash[Record]] = {}
        while True:
            settled = {key: before[key] if key in fallen else wishes[key][0] for key in before}
            clashes = self._contest(before, settled)
            # An id that falls back claims its old addresses again. Another may have taken them in this round.
            fall = {key: clash for key, clash in clashes.items() if before[key] is not None}
            if not fall:
                break
            fallen.update(fall)
        for key, entry in settled.items():
            if entry is not None and key not in clashes:
                self._hold(entry)
            refused = clashes.get(key) or fallen.get(key)
            found = wishes[key][1] if refused is None else [refused, *wishes[key][1]]
            _store(self._clashes, key, tuple(found))

    def _contest(self, before: _Each[Record], after: _Each[Record]) -> dict[str, Clash[Record]]:
        """Return the changed entries that lose an address, deciding by their order."""
        taken: dict[AddressKey, Entry[Record]] = {}
        changed: list[Entry[Record]] = []
        for key, entry in after.items():
            if entry is None:
                continue
            held = before[key]
            if held is None:
                changed.append(entry)
                continue
            kept = self._claimed(entry)
            if entry.record is not held.record:
                changed.append(entry)
                kept = set(kept).intersection(self._claimed(held))
            taken.update(dict.fromkeys(kept, entry))
        clashes: dict[str, Clash[Record]] = {}
        for entry in sorted(changed, key=lambda each: each.order):
            claimed = tuple(self._claimed(entry))
            clash = self._clash(entry, claimed, taken)
            if clash is None:
                taken.update(dict.fromkeys(claimed, entry))
            else:
                clashes[entry.id] = clash
        return clashes

    def _clash(
        self,
        entry: Entry[Record],
        claimed: Iterable[AddressKey],
        taken: Mapping[AddressKey, Entry[Record]],
    ) -> Clash[Record] | None:
        first: Entry[Record] | None = None
        addresses: list[AddressKey] = []
        for address in claimed:
            holder = self._holders.owner(address)
            other = taken.get(address) or (self._held[holder] if isinstance(holder, str) else None)
            if other is None or other.id == entry.id:
                continue
            first = first or other
            if other.id == first.id:
                addresses.append(address)
        return None if first is None else Clash(entry, first, tuple(addresses))

    def _give_second_chance(self) -> bool:
        """Put in force entries that were refused for an entry that fell back itself. Return whether there were any."""
        clashes = (clash for each in self._clashes.values() for clash in each if clash.addresses)
        moved = False
        for entry in sorted((clash.entry for clash in clashes), key=lambda each: each.order):
            if self._clash(entry, self._claimed(entry), {}) is None:
                self._release(entry.id)
                self._hold(entry)
                _store(self._clashes, entry.id, tuple(self._wish(entry.id)[1]))
                moved = True
        return moved

    def _claimed(self, entry: Entry[Record]) -> Iterable[AddressKey]:
        return () if entry.record is None else self.claims(entry.record)

    def _release(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is None:
            return
        beside = self._held_by_file[held.file]
        beside.discard(key)
        if not beside:
            del self._held_by_file[held.file]
        addresses = frozenset(self._claimed(held))
        for address in addresses:
            self._holders.remove(InstanceId(key), address)
        self._freed.update(dict.fromkeys(addresses, key))

    def _hold(self, entry: Entry[Record]) -> None:
        key = entry.id
        self._held[key] = entry
        self._held_by_file.setdefault(entry.file, set()).add(key)
        addresses = frozenset(self._claimed(entry))
        for address in addresses:
            self._holders.add(InstanceId(key), address)
        self.moved = self.moved or any(self._freed.get(each, key) != key for each in addresses)


_Key = TypeVar("_Key")
_Item = TypeVar("_Item")


def _store(mapping: dict[_Key, tuple[_Item, ...]], key: _Key, items: tuple[_Item, ...]) -> None:
    if items:
        mapping[key] = items
    else:
        mapping.pop(key, None)
