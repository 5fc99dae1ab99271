"""A directory of record files, read again and again: what has changed in force."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

from imdsproxy.core.model import Instance, Network
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.packed import PackedInstance
from imdsproxy.core.records import Path as PathInFile
from imdsproxy.core.records import parse_instance, parse_network, render_record
from imdsproxy.core.timing import Progress
from imdsproxy.errors import Problem
from imdsproxy.host.inotify import Place, place_of
from imdsproxy.sources.api import Origin
from imdsproxy.sources.file.contents import (
    FileContents,
    Signature,
    read_contents,
    signature_of,
)
from imdsproxy.sources.file.record_file import SUFFIXES
from imdsproxy.sources.in_force import Entry, InForce, Record, claim_places
from imdsproxy.sources.sqlite_file import SideCache

_GONE_S: Final = 0.05
"""Some editors move the old file away before they write the new one."""

_EMPTY_S: Final = 0.5
"""A writer that does not rename truncates the file first."""

_SCHEMA: Final = """
CREATE TABLE last_good (
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    file TEXT NOT NULL,
    record TEXT NOT NULL,
    user_data BLOB,
    PRIMARY KEY (kind, id)
) STRICT
"""

_InForce: TypeAlias = "Entry[Network] | Entry[PackedInstance]"

LastGood: TypeAlias = "SideCache[tuple[str, str], _InForce]"
"""By kind (`networks` or `instances`) and id. Of an entry in force, the file and the record are kept."""

_SETTLING: Final = "comparing the addresses of records"
_NOTED: Final = 1000


@dataclass(frozen=True, slots=True)
class Reading:
    """What has changed in force, and how to learn of the next change.

    Attributes:
        networks: New records, `None` for those that are gone.
        instances: The same.
        moved: An address goes from one of `instances` to another.
        whole: Nothing was in force before: these are all records.
        problems: Everything wrong in the directory now.
        readable: The directory could be listed; if not, all stays as it was.
        places: The directories to watch.
        relevant: The paths in them that matter, beside everything in the directory itself.
        again_s: Look again after so many seconds, even without an event.
    """

    networks: Mapping[str, Network | None]
    instances: Mapping[str, PackedInstance | None]
    moved: bool
    whole: bool
    problems: tuple[Problem, ...]
    readable: bool
    places: frozenset[Place]
    relevant: frozenset[Path]
    again_s: float | None

    def without_changes(self) -> Reading:
        """The same once its changes are reported."""
        return replace(self, networks={}, instances={}, whole=False)


@dataclass(slots=True)
class _File:
    """What is known of a record file.

    Attributes:
        signature: Its state when it was last read.
        payloads: The files that its records name, with their state when they were read.
        problems: What is wrong with it as a whole, or with records whose id cannot be read.
        doubtful_since: When it was first seen gone or empty, until that is believed.
    """

    signature: Signature = None
    payloads: dict[Path, Signature] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    doubtful_since: float | None = None


class Directory:
    """A directory of `*.yaml`, `*.yml` and `*.json` (hidden ones are not looked at).

    Args:
        path: The directory; it need not exist.
        clock: Monotonic seconds.
        last_good: Keeps what is in force over a restart; `None` to do without.
        progress: Where reading a large file says how far it is.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float],
        last_good: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._path = path
        self._progress = progress or Progress()
        self._clock = clock
        self._files: dict[str, _File] = {}
        self._networks: InForce[Network] = InForce(
            lambda _network: (), partial(self._where, "networks")
        )
        self._instances: InForce[PackedInstance] = InForce(
            self._claims, partial(self._where, "instances")
        )
        self._opened = 0
        self._last_good: LastGood | None = None
        if last_good is not None:
            lost = "records in force are not kept"
            self._last_good = SideCache(last_good, _SCHEMA, _write, "last-good", lost)
        self._begun = False

    @property
    def networks(self) -> dict[str, Network]:
        """All in force."""
        return self._networks.records

    @property
    def instances(self) -> dict[str, PackedInstance]:
        """All in force."""
        return self._instances.records

    def origin_of_port(self, instance: str, number: int) -> Origin | None:
        """Where a port of a record in force was written; the line is that of the port's first claim."""
        entry = self._instances.entry_of(instance)
        if entry is None or entry.record is None:
            return None
        record = entry.record.open()
        if number >= len(record.ports):
            return None
        field = f"instances[{entry.position}].ports[{number}].network"
        line = entry.line
        for index, (_, part) in enumerate(claim_places(record)):
            if part[1] == number and index < len(entry.lines):
                line = entry.lines[index]
                break
        return Origin(field, str(self._path / entry.file), line)

    def read(self, changed: Collection[Path] = ()) -> Reading:
        """Read what has changed since the last time; blocks for as long as that takes.

        Args:
            changed: Files that are read again though they look the same: two writes within one tick of
                the file system's clock do.
        """
        if not self._begun:
            self._begun = True
            self._begin()
        try:
            found = dict(self._list())
        except OSError as error:
            return self._reading(self._unreadable(error))
        for name in sorted(self._files.keys() | found.keys()):
            self._look(name, found.get(name), changed)
        return self._reading(None)

    def keep(self) -> Problem | None:
        """Keep what is in force for after a restart; why that cannot be, if so. Blocks."""
        if self._last_good is None:
            return None
        self._last_good.save()
        return self._last_good.problem

    def _begin(self) -> None:
        if self._last_good is None:
            return
        for file, record in self._last_good.load(lambda stored: tuple(_read(stored))) or ():
            if isinstance(record, Network):
                self._networks.prime(Entry(record.id, file, 0, record=record))
            else:
                self._instances.prime(Entry(record.id, file, 0, record=record))
            # So that it is looked for, and what is from it goes if it is not there.
            self._files.setdefault(file, _File())

    def _list(self) -> Iterator[tuple[str, Path]]:
        with os.scandir(self._path) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIXES) and not entry.name.startswith("."):
                    yield entry.name, Path(entry.path)

    def _look(self, name: str, path: Path | None, changed: Collection[Path]) -> None:
        file = self._files.setdefault(name, _File())
        signature = None if path is None else signature_of(path)
        if path is None or signature is None:
            if self._believe(file, _GONE_S):
                del self._files[name]
                self._replace(name, FileContents())
            return
        if (
            signature == file.signature
            and path not in changed
            and not file.payloads.keys() & set(changed)
            and all(signature_of(each) == state for each, state in file.payloads.items())
        ):
            file.doubtful_since = None
            return
        if signature[1] == 0 and file.signature and not self._believe(file, _EMPTY_S):
            return
        file.doubtful_since = None
        file.signature = signature
        self._read_file(name, path, file)

    def _believe(self, file: _File, after_s: float) -> bool:
        """Whether a file that had records has been gone or empty for long enough."""
        if file.signature is None:
            return True
        if file.doubtful_since is None:
            file.doubtful_since = self._clock()
        return self._clock() - file.doubtful_since >= after_s

    def _read_file(self, name: str, path: Path, file: _File) -> None:
        contents = read_contents(path, self._progress)
        if contents.blank and (self._networks.has(name) or self._instances.has(name)):
            # A write that failed, most likely: to remove all records, people remove the file.
            reason = "is blank: the records that it had stay in force"
            hint = "restore it, write `instances: []`, or remove it"
            file.problems = (Problem("file", reason, hint, str(path)),)
            return
        if contents.payloads or not contents.problems:
            file.payloads = contents.payloads
        file.problems = contents.problems
        if not contents.problems:
            file.problems = self._replace(name, contents)

    def _replace(self, name: str, contents: FileContents) -> tuple[Problem, ...]:
        """Hand on what a file holds now; gives the problems of records without a readable id."""
        networks, instances = contents.nameless["networks"], contents.nameless["instances"]
        self._networks.replace_file(name, contents.networks, unclear=bool(networks))
        self._instances.replace_file(name, contents.instances, unclear=bool(instances))
        return (*networks, *instances)

    def _reading(self, unreadable: Problem | None) -> Reading:
        networks_before, before = len(self._networks), len(self._instances)
        networks = self._networks.settle()
        instances = self._instances.settle()
        self._progress.end(_SETTLING)
        if self._last_good is not None:
            entry = self._networks.entry_of
            self._last_good.keep({("networks", key): entry(key) for key in networks})
            entry_of = self._instances.entry_of
            self._last_good.keep({("instances", key): entry_of(key) for key in instances})
        problems = [] if unreadable is None else [unreadable]
        for name in sorted(self._files):
            problems += self._files[name].problems
        problems += self._networks.problems()
        problems += self._instances.problems()
        payloads = {path for file in self._files.values() for path in file.payloads}
        doubtful = any(file.doubtful_since is not None for file in self._files.values())
        return Reading(
            networks,
            instances,
            moved=self._instances.moved,
            whole=not (networks_before or before),
            problems=tuple(problems),
            readable=unreadable is None,
            places=self._places(payloads),
            relevant=_with_parents({self._path, *payloads}),
            again_s=_GONE_S if doubtful else None,
        )

    def _claims(self, instance: PackedInstance) -> list[AddressKey]:
        # A start waits for the records as long as it sees progress, and this takes seconds for very many of them.
        self._opened += 1
        if self._opened % _NOTED == 0:
            self._progress.note(_SETTLING, self._opened, 0)
        return [address for address, _part in claim_places(instance.open())]

    def _places(self, payloads: set[Path]) -> frozenset[Place]:
        # In the parent it shows when the directory itself is made, removed or replaced.
        wanted = {self._path, self._path.parent, *(path.parent for path in payloads)}
        for name in self._files:
            path = self._path / name
            if path.is_symlink():
                wanted.add(path.resolve().parent)
        return frozenset(place_of(path) for path in wanted)

    def _unreadable(self, error: OSError) -> Problem:
        return Problem(
            "directory",
            f"cannot be listed: {error.strerror}",
            "make it, or correct the setting; it is read as soon as it is there",
            str(self._path),
        )

    def _where(self, kind: str, entry: Entry[Record]) -> tuple[PathInFile, str]:
        return (kind, entry.position), str(self._path / entry.file)


def _with_parents(paths: set[Path]) -> frozenset[Path]:
    return frozenset(each for path in paths for each in (path, *path.parents))


def _read(connection: sqlite3.Connection) -> Iterator[tuple[str, Network | PackedInstance]]:
    rows = connection.execute("SELECT kind, file, record, user_data FROM last_good")
    for kind, file, text, user_data in rows:
        try:
            mapping = json.loads(text)
        except ValueError:
            continue
        record = parse_network(mapping) if kind == "networks" else parse_instance(mapping)
        if isinstance(record, Network):
            yield file, record
        elif isinstance(record, Instance):
            yield file, PackedInstance.of(replace(record, user_data=user_data))


def _write(connection: sqlite3.Connection, key: tuple[str, str], kept: _InForce | None) -> None:
    if kept is None or kept.record is None:
        connection.execute("DELETE FROM last_good WHERE kind = ? AND id = ?", key)
        return
    record: Network | Instance
    if isinstance(kept.record, PackedInstance):
        instance = kept.record.open()
        record, user_data = replace(instance, user_data=None), instance.user_data
    else:
        record, user_data = kept.record, None
    connection.execute(
        "INSERT OR REPLACE INTO last_good (kind, id, file, record, user_data)"
        " VALUES (?, ?, ?, ?, ?)",
        (*key, kept.file, json.dumps(render_record(record)), user_data),
    )
