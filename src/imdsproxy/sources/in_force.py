"""Which records are in force while what holds them comes, changes, breaks and goes, and why others are refused.

What was good stays in force: a record whose new version is bad keeps the old one, and a record that
claims an id or an address in force is refused, wherever its file stands in the order. Where nothing is
in force yet (a fresh start), the order of the files' names and of the records in them decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from imdsproxy.core.addresses import link_local_of, to_number
from imdsproxy.core.model import Instance, Network, NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.packed import PackedInstance
from imdsproxy.core.records import Path, render_path
from imdsproxy.errors import Problem

Record = TypeVar("Record", bound=Network | Instance | PackedInstance)


@dataclass(frozen=True, slots=True)
class Entry(Generic[Record]):
    """A record as it stands in a file.

    Attributes:
        id: Its id.
        file: The file's name.
        position: Its place among the file's records.
        line: Where it begins, 1-based.
        record: `None` when it was refused.
        problems: Why.
        offsets: Where its claims stand, in lines after `line`, in the order of `claim_places`. Many entries share one
            tuple.
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
        """Where its claims stand, in the order of `claim_places`."""
        first = self.line
        if first is None:
            return (None,) * len(self.offsets)
        return tuple(None if one is None else first + one for one in self.offsets)

    @property
    def order(self) -> tuple[str, int]:
        """What decides where nothing is in force yet."""
        return self.file, self.position


@dataclass(frozen=True, slots=True)
class Clash(Generic[Record]):
    """An entry that is refused for the sake of another.

    Attributes:
        entry: The refused one.
        other: The one that it would displace.
        addresses: What both claim; none when it is the id.
    """

    entry: Entry[Record]
    other: Entry[Record]
    addresses: tuple[AddressKey, ...] = ()


@dataclass(frozen=True, slots=True)
class _Wish(Generic[Record]):
    """What an id has in force if no address stands against it, and the entries that repeat the id."""

    entry: Entry[Record]
    rivals: tuple[Entry[Record], ...] = ()


class InForce(Generic[Record]):
    """The entries of all files of one kind, and those in force.

    `replace_file` says what a file holds now; `settle` works out what that changes. The time of both
    goes with what changed, not with what there is.

    Args:
        claims: The addresses that a record claims; no two records in force have one in common.
        where: Where an entry is, for problems: its path in the document, and the document.

    Attributes:
        moved: Whether an address went from one record to another in the last `settle`.
    """

    def __init__(
        self,
        claims: Callable[[Record], Iterable[AddressKey]],
        where: Callable[[Entry[Record]], tuple[Path, str | None]],
    ) -> None:
        self._claims = claims
        self._where = where
        self._files: dict[str, tuple[Entry[Record], ...]] = {}
        self._bad: dict[str, tuple[Entry[Record], ...]] = {}
        self._entries: dict[str, tuple[Entry[Record], ...]] = {}
        self._held: dict[str, Entry[Record]] = {}
        self._held_by_file: dict[str, set[str]] = {}
        # By number, which takes a third of the memory.
        self._holders: dict[NetworkId, dict[int, str]] = {}
        self._freed: dict[tuple[NetworkId, int], str] = {}
        self.moved = False
        self._touched: set[str] = set()
        self._clashes: dict[str, tuple[Clash[Record], ...]] = {}
        self._unclear: set[str] = set()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def records(self) -> dict[str, Record]:
        """Everything in force."""
        return {key: held.record for key, held in self._held.items() if held.record is not None}

    def prime(self, entry: Entry[Record]) -> None:
        """Take as in force what a process before had, until `replace_file` is called for its file."""
        if entry.id not in self._held and self._clash(entry, self._claimed(entry), {}, {}) is None:
            self._hold(entry.id, entry)

    def has(self, file: str) -> bool:
        """Whether records of this file are in force."""
        return file in self._held_by_file

    def entry_of(self, key: str) -> Entry[Record] | None:
        """The entry in force."""
        return self._held.get(key)

    def replace_file(
        self, file: str, entries: Sequence[Entry[Record]], *, unclear: bool = False
    ) -> None:
        """What the file holds now: nothing, when it is gone.

        Args:
            file: Its name.
            entries: All of them, in order.
            unclear: It also has records whose id cannot be read. They may be any of those that it had,
                so none of these goes.
        """
        before = {entry.id for entry in self._files.get(file, ())}
        for key in before:
            self._put(key, [entry for entry in self._entries[key] if entry.file != file])
        for entry in entries:
            self._put(entry.id, [*self._entries.get(entry.id, ()), entry])
        (self._unclear.add if unclear else self._unclear.discard)(file)
        self._touched |= before
        self._touched.update(entry.id for entry in entries)
        # Also those held without an entry, while it was unclear.
        self._touched |= self._held_by_file.get(file, set())
        _store(self._files, file, tuple(entries))
        _store(self._bad, file, tuple(entry for entry in entries if entry.problems))

    def settle(self) -> dict[str, Record | None]:
        """What has changed since the last time: the new record, or `None` for one that is gone."""
        before = {key: self._held.get(key) for key in self._touched | self._clashes.keys()}
        self._touched.clear()
        self.moved = False
        self._decide(set(before))
        while self._give_second_chance():
            pass
        self._freed.clear()
        changes: dict[str, Record | None] = {}
        for key, old in before.items():
            new = self._held.get(key)
            old_record = None if old is None else old.record
            new_record = None if new is None else new.record
            if old_record is not new_record and old_record != new_record:
                changes[key] = new_record
        return changes

    def problems(self) -> Iterator[Problem]:
        """Every entry that is refused, with the reasons."""
        for file in sorted(self._bad):
            for entry in self._bad[file]:
                for problem in entry.problems:
                    yield self._noted(problem, entry)
        for key in sorted(self._clashes):
            for clash in self._clashes[key]:
                for problem in self._explain(clash):
                    yield self._noted(problem, clash.entry)

    def _explain(self, clash: Clash[Record]) -> Iterator[Problem]:
        entry, other = clash.entry, clash.other
        path, file = self._where(entry)
        _, place = self._where(other)
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

    def _wish(self, key: str) -> _Wish[Record] | None:
        entries = self._entries.get(key, ())
        good = tuple(entry for entry in entries if entry.record is not None)
        held = self._held.get(key)
        if held is None:
            return _Wish(good[0], good[1:]) if good else None
        own = [entry for entry in entries if entry.file == held.file]
        if not own:
            if good:
                return _Wish(good[0], good[1:])
            return _Wish(held) if entries or held.file in self._unclear else None
        same = next((entry for entry in own if entry.record == held.record), None)
        chosen = same or next((entry for entry in own if entry.record is not None), None)
        rivals = tuple(entry for entry in good if entry is not chosen)
        if chosen is None:
            return _Wish(held, rivals)
        # The record in force is kept, not its equal: others have it already.
        return _Wish(replace(chosen, record=held.record) if same else chosen, rivals)

    def _decide(self, keys: set[str]) -> None:
        """Put in force what `keys` wish for, all together, as far as addresses allow."""
        wishes = {key: self._wish(key) for key in keys}
        fallen: dict[str, Clash[Record]] = {}
        while True:
            clashes = self._contest(wishes, fallen)
            # Who falls back claims its old addresses again, which another may have taken meanwhile.
            fall = {key: clash for key, clash in clashes.items() if key in self._held}
            if not fall:
                break
            fallen.update(fall)
        refused = {**clashes, **fallen}
        after: dict[str, Entry[Record]] = {}
        for key, wish in wishes.items():
            held = self._held.get(key)
            if key in refused:
                if held is not None:
                    after[key] = held
            elif wish is not None:
                after[key] = wish.entry
            self._note(key, wish, refused.get(key))
        for key in keys:
            self._release(key)
        for key, entry in after.items():
            self._hold(key, entry)

    def _contest(
        self, wishes: Mapping[str, _Wish[Record] | None], fallen: Mapping[str, Clash[Record]]
    ) -> dict[str, Clash[Record]]:
        """Who loses an address, going through the changed records by their order."""
        taken: dict[AddressKey, Entry[Record]] = {}
        changed: list[Entry[Record]] = []
        for key, wish in wishes.items():
            held = self._held.get(key)
            if key in fallen and held is not None:
                taken.update((address, held) for address in self._claimed(held))
            elif wish is not None and (held is None or wish.entry.record is not held.record):
                changed.append(wish.entry)
            elif wish is not None:
                taken.update((address, wish.entry) for address in self._claimed(wish.entry))
        for entry in changed:
            held = self._held.get(entry.id)
            if held is not None:
                kept = set(self._claimed(held)).intersection(self._claimed(entry))
                taken.update((address, entry) for address in kept)
        clashes: dict[str, Clash[Record]] = {}
        for entry in sorted(changed, key=lambda each: each.order):
            claimed = tuple(self._claimed(entry))
            clash = self._clash(entry, claimed, taken, wishes)
            if clash is None:
                taken.update((address, entry) for address in claimed)
            else:
                clashes[entry.id] = clash
        return clashes

    def _clash(
        self,
        entry: Entry[Record],
        claimed: Iterable[AddressKey],
        taken: Mapping[AddressKey, Entry[Record]],
        moving: Mapping[str, object],
    ) -> Clash[Record] | None:
        """What stands against an entry: `taken`, and what is held by those that are not `moving`."""
        against: dict[str, tuple[Entry[Record], list[AddressKey]]] = {}
        for address in claimed:
            other = taken.get(address)
            if other is None:
                holder = self._holders.get(address[0], {}).get(to_number(address[1]))
                if holder is not None and holder not in moving:
                    other = self._held[holder]
            if other is not None and other.id != entry.id:
                against.setdefault(other.id, (other, []))[1].append(address)
        first = next(iter(against.values()), None)
        return None if first is None else Clash(entry, first[0], tuple(first[1]))

    def _give_second_chance(self) -> bool:
        """Put in force who was refused for the sake of one that fell back itself; say if any."""
        waiting = [
            clash.entry
            for clashes in self._clashes.values()
            for clash in clashes
            if clash.addresses
        ]
        moved = False
        for entry in sorted(waiting, key=lambda each: each.order):
            if self._clash(entry, self._claimed(entry), {}, {}) is None:
                self._release(entry.id)
                self._hold(entry.id, entry)
                self._note(entry.id, self._wish(entry.id), None)
                moved = True
        return moved

    def _note(self, key: str, wish: _Wish[Record] | None, refused: Clash[Record] | None) -> None:
        found = [] if refused is None else [refused]
        if wish is not None:
            found += [Clash(rival, wish.entry) for rival in wish.rivals]
        _store(self._clashes, key, tuple(found))

    def _claimed(self, entry: Entry[Record]) -> Iterable[AddressKey]:
        return () if entry.record is None else self._claims(entry.record)

    def _release(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is None:
            return
        beside = self._held_by_file[held.file]
        beside.discard(key)
        if not beside:
            del self._held_by_file[held.file]
        for network, address in self._claimed(held):
            holders = self._holders.get(network, {})
            holders.pop(to_number(address), None)
            self._freed[network, to_number(address)] = key
            if not holders:
                self._holders.pop(network, None)

    def _hold(self, key: str, entry: Entry[Record]) -> None:
        self._held[key] = entry
        self._held_by_file.setdefault(entry.file, set()).add(key)
        for network, address in self._claimed(entry):
            number = to_number(address)
            self._holders.setdefault(network, {})[number] = key
            self.moved = self.moved or self._freed.get((network, number), key) != key


_Key = TypeVar("_Key")
_Item = TypeVar("_Item")


def _store(mapping: dict[_Key, tuple[_Item, ...]], key: _Key, items: tuple[_Item, ...]) -> None:
    if items:
        mapping[key] = items
    else:
        mapping.pop(key, None)


def claim_places(instance: Instance) -> Iterator[tuple[AddressKey, Path]]:
    """Each address that the record claims, and the part of the record that does so."""
    for number, port in enumerate(instance.ports):
        for index, address in enumerate(port.addresses):
            yield (port.network, address), ("ports", number, "addresses", index)
        if port.mac is not None:
            yield (port.network, link_local_of(port.mac)), ("ports", number, "mac")


def taken_address(
    instance: Instance,
    address: AddressKey,
    holder: str,
    *,
    path: Path = (),
    place: str = "",
    file: str | None = None,
    lines: tuple[int | None, ...] = (),
) -> Problem:
    """Why an instance is refused that claims an address of another.

    Args:
        instance: The refused one.
        address: What both claim.
        holder: The id of the instance that has it.
        path: Where the refused record is in its document.
        place: Where the other record is, if that is known.
        file: The file of the refused record.
        lines: The lines of its claims, in the order of `claim_places`.
    """
    network, shown = address
    part, line = _claim(instance, address, lines)
    what = f"{shown} in network {network}"
    if part and part[-1] == "mac":
        what = f"the MAC's link-local address {what}"
    where = f" ({place})" if place else ""
    return Problem(
        render_path((*path, *part)),
        f"{what} belongs to instance {holder}{where}",
        "give one of the two another, or remove one",
        file,
        line,
    )


def _claim(
    instance: Instance, address: AddressKey, lines: tuple[int | None, ...]
) -> tuple[Path, int | None]:
    for number, (claimed, part) in enumerate(claim_places(instance)):
        if claimed == address:
            return part, lines[number] if number < len(lines) else None
    return (), None


def taken_id(
    key: str, *, path: Path, place: str, file: str | None = None, line: int | None = None
) -> Problem:
    """Why a record is refused whose id another record has, at `place`."""
    return Problem(
        render_path((*path, "id")), f"{key} is also in {place}", "keep one of the two", file, line
    )
