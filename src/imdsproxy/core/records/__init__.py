"""Records as people write them: mappings in, networks and instances out, and the reverse.

A record is a mapping as YAML or JSON gives it. `parse_records` reads a whole document (`networks:`
and `instances:` lists), `parse_network` and `parse_instance` one record each; all are strict and
report every problem of a record at once. `render_record` gives the mapping back, fit for JSON.

What keys there are, and what each takes, is in the tables `NETWORK`, `INSTANCE` and `POLICY`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypedDict, TypeVar, Unpack

from imdsproxy.core.model import ID_PATTERN, Instance, Network
from imdsproxy.core.records.fields import (
    MAX_PAYLOAD,
    Fault,
    Field,
    Findings,
    LineOf,
    Path,
    ReadFile,
    Refused,
    Unreadable,
    render_path,
)
from imdsproxy.core.records.instance import INSTANCE
from imdsproxy.core.records.network import NETWORK, POLICY
from imdsproxy.core.records.schema import Json, Table
from imdsproxy.errors import Problem

_TABLES: Final[Mapping[str, Table[Any]]] = {"networks": NETWORK, "instances": INSTANCE}
LISTS: Final = tuple(_TABLES)

_NOTED: Final = 500
Note: TypeAlias = Callable[[int, int], None]
"""Takes how much is done, of how much."""

_Record = TypeVar("_Record", bound="Network | Instance")


@dataclass(frozen=True, slots=True)
class Records:
    """What a document holds.

    Attributes:
        found: Each record in its list's order, networks first, with its path, as `("instances", 3)`.
        problems: What is wrong with the document itself; then it has no records.
    """

    found: tuple[tuple[Path, Network | Instance | Refused], ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def networks(self) -> tuple[tuple[Path, Network], ...]:
        """The good ones."""
        return tuple((path, one) for path, one in self.found if isinstance(one, Network))

    @property
    def instances(self) -> tuple[tuple[Path, Instance], ...]:
        """The good ones."""
        return tuple((path, one) for path, one in self.found if isinstance(one, Instance))

    @property
    def all_problems(self) -> tuple[Problem, ...]:
        """Those of the document and of every record."""
        refused = (one for _, one in self.found if isinstance(one, Refused))
        return (*self.problems, *(problem for one in refused for problem in one.problems))

    def with_listed(self, listed: Sequence[tuple[Path, Network | Instance | Refused]]) -> Records:
        """With those of `parse_listed` before its own, unless the document itself has problems."""
        if self.problems or not listed:
            return self
        # Stable, and `networks` comes after `instances` in the alphabet.
        found = sorted((*listed, *self.found), key=lambda one: str(one[0][0]), reverse=True)
        return Records(tuple(found))


class Reading(TypedDict, total=False):
    """How records are read, as `Findings` has it.

    Attributes:
        file: The file they come from, for the problems.
        line_of: Where their parts stand in that file.
        read_file: Reads what `user_data_file` names; without it the key is refused.
    """

    file: str | None
    line_of: LineOf | None
    read_file: ReadFile | None


def parse_network(
    record: object, *, path: Path = (), **reading: Unpack[Reading]
) -> Network | Refused:
    """A network, or everything that is wrong with its record.

    Args:
        record: The mapping, as YAML or JSON gives it.
        path: Where the record stands in its document, as `("networks", 3)`.
        reading: See `Reading`.
    """
    return _parse(NETWORK, record, path, Findings(**reading))


def parse_instance(
    record: object, *, path: Path = (), **reading: Unpack[Reading]
) -> Instance | Refused:
    """An instance, or everything that is wrong with its record; arguments as of `parse_network`."""
    return _parse(INSTANCE, record, path, Findings(**reading))


def parse_listed(
    path: Path, value: object, *, faults: Sequence[Fault] = (), **reading: Unpack[Reading]
) -> Network | Instance | Refused:
    """One record of a document, as `parse_records` parses each.

    Args:
        path: Its list and its place there.
        value: The mapping.
        faults: Those inside this record.
        reading: See `Reading`.
    """
    record: Network | Instance | Refused
    record = _parse(_TABLES[str(path[0])], value, path, Findings(**reading), faults)
    return record


def _parse(
    table: Table[_Record],
    record: object,
    path: Path,
    findings: Findings,
    faults: Sequence[Fault] = (),
) -> _Record | Refused:
    for fault in faults:
        findings.add(fault)
    parsed = Field(record, path, findings).read(table.parse)
    if parsed is None or findings.problems:
        named = record.get("id") if isinstance(record, Mapping) else None
        known = isinstance(named, str) and re.fullmatch(ID_PATTERN, named)
        return Refused(tuple(findings.problems), named if known else None)
    return parsed


def render_record(record: Network | Instance) -> dict[str, Json]:
    """The mapping of either, fit for JSON, which `parse_network` and `parse_instance` take back unchanged.

    What has its default is not in it. User data that is no UTF-8 becomes `{"base64": …}`.
    """
    return NETWORK.render(record) if isinstance(record, Network) else INSTANCE.render(record)


def parse_records(
    document: object,
    *,
    faults: Iterable[Fault] = (),
    note: Note | None = None,
    **reading: Unpack[Reading],
) -> Records:
    """Every record of a document `{networks: [...], instances: [...]}`; an empty one is fine.

    Duplicate ids and addresses are not looked for: what is in force is the caller's to know.

    Args:
        document: The mapping, as YAML or JSON gives it; `None` for an empty file.
        faults: What the decoder found; one inside a record refuses that record, another the
            document.
        note: Given now and then how many records of a list were checked, of how many.
        reading: See `Reading`.
    """
    findings = Findings(**reading)
    by_record: dict[Path, list[Fault]] = {}
    for fault in faults:
        by_record.setdefault(fault.path[:2], []).append(fault)
    root = Field({} if document is None else document, (), findings)
    lists = root.read(lambda field: field.mapping(LISTS)) or {}
    found: list[tuple[Path, Any]] = []
    for name in LISTS:
        items = (lists[name].read(Field.items) if name in lists else None) or []
        for done, item in enumerate(items, 1):
            if note is not None and done % _NOTED == 0:
                note(done, len(items))
            own = by_record.pop(item.path, ())
            record = _parse(_TABLES[name], item.value, item.path, Findings(**reading), own)
            found.append((item.path, record))
    for fault in (fault for left in by_record.values() for fault in left):
        findings.add(fault)
    if findings.problems:
        return Records(problems=tuple(findings.problems))
    return Records(tuple(found))
