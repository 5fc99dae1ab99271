"""The source `file`: a directory of YAML and JSON records, in force as soon as they are written."""

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

from imdsproxy.errors import Problem
from imdsproxy.host.inotify import Place, Watch, place_of
from imdsproxy.host.sqlite_file import SideCache
from imdsproxy.model.claims import claim_places
from imdsproxy.model.entities import Instance
from imdsproxy.model.observation import AddressKey, Observation, StrandedPort
from imdsproxy.model.packed import PackedInstance
from imdsproxy.model.records import Path as PathInFile
from imdsproxy.model.records import Refused, parse_listed, render_record
from imdsproxy.reconcile.progress import Progress
from imdsproxy.sources.api import Publish, Reports, publish_in_pieces
from imdsproxy.sources.file.contents import FileContents, Signature, read_contents, signature_of
from imdsproxy.sources.file.record_file import SUFFIXES
from imdsproxy.sources.in_force import Entry, InForce, Record

_UNWATCHED_S: Final = 1.0
"""Seconds between two readings if inotify cannot be used."""

_GONE_S: Final = 0.05
"""Seconds for which a missing file keeps its records: some editors move the old file away before they write the new."""

_EMPTY_S: Final = 0.5
"""Seconds for which an empty file keeps its records: a writer that does not rename truncates the file first."""

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

_Key: TypeAlias = tuple[str, str]
"""Kind (`networks` or `instances`) and id."""

_SETTLING: Final = "comparing the addresses of records"
_NOTED: Final = 1000


@dataclass(slots=True)
class _File:
    """State of a record file.

    Attributes:
        payloads: Files that its records name, with their signatures when read.
        doubtful_since: Time at which the file was first seen missing or empty, until that is believed.
    """

    signature: Signature = None
    payloads: dict[Path, Signature] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    doubtful_since: float | None = None


@dataclass(slots=True)
class FileSource:
    """Source that watches a directory of record files. Invalid records are refused one by one; see `in_force`.

    The files are `*.yaml`, `*.yml` and `*.json`; hidden files are ignored.

    `kept`: our file that keeps the records in force over a restart, in case a record file is invalid then.

    Attributes:
        problems: All problems in the directory at the last reading.
        readable: Whether the directory could be listed then; if not, all records stay unchanged.
        again_s: Seconds until the next reading, even without an event; `None` to wait for an event.
        last_good: Entries in force, kept over a restart with file and record.
    """

    name: ClassVar = "file"
    directory: Path
    kept: InitVar[Path]
    clock: Callable[[], float] = time.monotonic
    progress: Progress = field(default_factory=Progress)
    problems: tuple[Problem, ...] = ()
    readable: bool = False
    again_s: float | None = None
    last_good: SideCache[_Key, Entry[Any]] = field(init=False)
    _reports: Reports = field(default_factory=partial(Reports, name))
    _files: dict[str, _File] = field(default_factory=dict)
    _kinds: dict[str, InForce[Any]] = field(init=False)
    _opened: int = 0
    _begun: bool = False
    _watch: Watch | None = None
    _unwatched: Problem | None = None
    _places: frozenset[Place] = frozenset()
    _relevant: frozenset[Path] = frozenset()

    def __post_init__(self, kept: Path) -> None:
        self.directory = self.directory.absolute()
        self._kinds = {
            "networks": InForce(lambda _network: (), partial(self._where, "networks")),
            "instances": InForce(self._claims, partial(self._where, "instances")),
        }
        lost = "records in force are not kept"
        self.last_good = SideCache(kept, _SCHEMA, _read, _write, "last-good", lost)

    def everything(self) -> Observation:
        return Observation.of_changes(*(one.records for one in self._kinds.values()))

    def explain_stranded(self, port: StrandedPort) -> Problem:
        """Describe the problem with the port's place in its file and the line of the port's first claim."""
        entry = self._kinds["instances"].entry_of(port.instance)
        record = None if entry is None or entry.record is None else entry.record.open()
        if entry is None or record is None or port.number >= len(record.ports):
            return port.problem()
        field = f"instances[{entry.position}].ports[{port.number}].network"
        claims = zip(claim_places(record), entry.lines, strict=False)
        line = next((line for (_, part), line in claims if part[1] == port.number), entry.line)
        return port.problem(field=field, file=str(self.directory / entry.file), line=line)

    async def run(self, publish: Publish) -> None:
        """Report the directory's records, and every change, until cancelled.

        While the directory cannot be listed, the source is out of sync, and its reported records stay.
        """
        changed: frozenset[Path] = frozenset()
        try:
            while True:
                # Read in a thread: ten thousand records take seconds, and guests are waiting.
                changes = await asyncio.to_thread(self.read, changed)
                begins = self._follow()
                await self._report(publish, changes)
                # The changes may be all records: release their memory.
                del changes
                changed = frozenset()
                if begins:
                    # Read again: changes from before the watch began had no event.
                    continue
                # Save last: guests must not wait for data that only a restart needs.
                await asyncio.to_thread(self.last_good.save)
                await self._report(publish, Observation())
                changed = await self._wait()
        finally:
            self._unfollow()

    def _follow(self) -> bool:
        """Watch the current places. Return whether a new watch began."""
        if self._watch is not None and self._watch.places == self._places:
            return False
        self._unfollow()
        try:
            self._watch, self._unwatched = Watch(self._places), None
        except OSError as error:
            reason = f"cannot be watched ({error}); imdsproxy reads it every {_UNWATCHED_S:.0f} s"
            hint = "raise fs.inotify.max_user_watches and fs.inotify.max_user_instances"
            self._unwatched = Problem("directory", reason, hint)
        return self._watch is not None

    def _unfollow(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    async def _wait(self) -> frozenset[Path]:
        if self._watch is None:
            await asyncio.sleep(_UNWATCHED_S if self.again_s is None else self.again_s)
            return frozenset()
        while True:
            changed = await self._watch.changes(self.again_s)
            if not changed or any(
                path.parent == self.directory or path in self._relevant for path in changed
            ):
                return changed

    async def _report(self, publish: Publish, changes: Observation) -> None:
        own = (self._unwatched, self.last_good.problem)
        observation = self._reports.next(
            changes,
            self.everything,
            in_sync=self.readable,
            problems=(*(problem for problem in own if problem is not None), *self.problems),
        )
        if observation is not None:
            await publish_in_pieces(publish, observation)

    def read(self, changed: Collection[Path] = ()) -> Observation:
        """Read changed files and return the changes of the records in force. Blocks.

        `changed`: files to read again even if their signature is the same: two writes within one tick of the file
        system's clock give the same signature.
        """
        if not self._begun:
            self._begun = True
            self._prime()
        unreadable: list[Problem] = []
        try:
            found = dict(self._list())
        except OSError as error:
            reason = f"cannot be listed: {error.strerror}"
            hint = "create it, or correct the setting; imdsproxy reads it as soon as it exists"
            unreadable.append(Problem("directory", reason, hint, str(self.directory)))
        else:
            for name in sorted(self._files.keys() | found.keys()):
                self._look(name, found.get(name), changed)
        self.readable = not unreadable
        return self._settle(unreadable)

    def _prime(self) -> None:
        for (kind, _), entry in self.last_good.load():
            self._kinds[kind].prime(entry)
            # If the file is missing, `read` then removes its records.
            self._files.setdefault(entry.file, _File())

    def _list(self) -> Iterator[tuple[str, Path]]:
        with os.scandir(self.directory) as entries:
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
        """Return whether a file has been missing or empty for long enough, or never had records."""
        if file.signature is None:
            return True
        if file.doubtful_since is None:
            file.doubtful_since = self.clock()
        return self.clock() - file.doubtful_since >= after_s

    def _read_file(self, name: str, path: Path, file: _File) -> None:
        contents = read_contents(path, self.progress)
        if contents.blank and any(one.has(name) for one in self._kinds.values()):
            # This is most likely a failed write: an operator who removes all records removes the file.
            reason = "is blank: its former records stay in force"
            hint = "restore it, write `instances: []`, or remove it"
            file.problems = (Problem("file", reason, hint, str(path)),)
            return
        if contents.payloads or not contents.problems:
            file.payloads = contents.payloads
        file.problems = contents.problems
        if not contents.problems:
            file.problems = self._replace(name, contents)

    def _replace(self, name: str, contents: FileContents) -> tuple[Problem, ...]:
        """Pass on the content of a file. Return the problems of records without a readable id."""
        for kind, in_force in self._kinds.items():
            unclear = bool(contents.nameless[kind])
            in_force.replace_file(name, contents.entries[kind], unclear=unclear)
        return tuple(problem for each in contents.nameless.values() for problem in each)

    def _settle(self, unreadable: Sequence[Problem]) -> Observation:
        changes = {kind: in_force.settle() for kind, in_force in self._kinds.items()}
        self.progress.end(_SETTLING)
        for kind, changed in changes.items():
            entry_of = self._kinds[kind].entry_of
            self.last_good.keep({(kind, key): entry_of(key) for key in changed})
        files = [self._files[name] for name in sorted(self._files)]
        self.problems = (
            *unreadable,
            *(problem for file in files for problem in file.problems),
            *(one for in_force in self._kinds.values() for one in in_force.problems()),
        )
        doubtful = any(file.doubtful_since is not None for file in files)
        self.again_s = _GONE_S if doubtful else None
        self._find_places({path for file in files for path in file.payloads})
        return Observation.of_changes(**changes, moves=self._kinds["instances"].moved)

    def _find_places(self, payloads: Iterable[Path]) -> None:
        files = [self.directory / name for name in self._files]
        named = {*payloads, *(path.resolve() for path in files if path.is_symlink())}
        # The parent has events for the directory itself: created, removed or replaced.
        wanted = {self.directory, self.directory.parent, *(path.parent for path in named)}
        self._places = frozenset(place_of(path) for path in wanted)
        self._relevant = frozenset(
            each for path in (self.directory, *named) for each in (path, *path.parents)
        )

    def _claims(self, instance: PackedInstance) -> list[AddressKey]:
        # This takes seconds for very many records, and a start waits for them only while it sees progress.
        self._opened += 1
        if self._opened % _NOTED == 0:
            self.progress.note(_SETTLING, self._opened, 0)
        return [address for address, _part in claim_places(instance.open())]

    def _where(self, kind: str, entry: Entry[Record]) -> tuple[PathInFile, str]:
        return (kind, entry.position), str(self.directory / entry.file)


def _read(connection: sqlite3.Connection) -> Iterator[tuple[_Key, Entry[Any]]]:
    rows = connection.execute("SELECT kind, file, record, user_data FROM last_good")
    for kind, file, text, user_data in rows:
        # Apply the same rules as for files, because other programs may have written to the cache.
        try:
            record: Any = parse_listed((kind,), json.loads(text))
        except (ValueError, KeyError, RecursionError):
            continue
        if isinstance(record, Instance):
            record = PackedInstance.of(replace(record, user_data=user_data))
        if not isinstance(record, Refused):
            yield (kind, record.id), Entry(record.id, file, 0, record=record)


def _write(connection: sqlite3.Connection, key: _Key, kept: Entry[Any] | None) -> None:
    if kept is None or kept.record is None:
        connection.execute("DELETE FROM last_good WHERE kind = ? AND id = ?", key)
        return
    record, user_data = kept.record, None
    if isinstance(record, PackedInstance):
        instance = record.open()
        record, user_data = replace(instance, user_data=None), instance.user_data
    connection.execute(
        "INSERT OR REPLACE INTO last_good VALUES (?, ?, ?, ?, ?)",
        (*key, kept.file, json.dumps(render_record(record)), user_data),
    )
