"""Parse a whole document: a record file, or the body of a bulk request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from imdsproxy.core.records.fields import Fault, Field, LineOf, Path, Refused, root
from imdsproxy.core.records.instance import parse_instance
from imdsproxy.core.records.network import parse_network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from imdsproxy.core.model import Instance, Network
    from imdsproxy.core.records.payload import ReadFile
    from imdsproxy.errors import Problem

__all__ = ["LISTS", "Note", "Records", "parse_listed", "parse_records"]

LISTS: Final = ("networks", "instances")

_NOTED: Final = 500
Note: TypeAlias = "Callable[[int, int], None]"
"""Takes how much is done, of how much."""

_Record = TypeVar("_Record", bound="Network | Instance")


@dataclass(frozen=True, slots=True)
class Records:
    """What a document holds; each record with its path, as `("instances", 3)`.

    Attributes:
        networks: The good ones, in order.
        instances: The good ones, in order.
        refused_networks: The bad ones, in order.
        refused_instances: The bad ones, in order.
        problems: What is wrong with the document itself; then it has no records.
    """

    networks: tuple[tuple[Path, Network], ...] = ()
    instances: tuple[tuple[Path, Instance], ...] = ()
    refused_networks: tuple[Refused, ...] = ()
    refused_instances: tuple[Refused, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def all_problems(self) -> tuple[Problem, ...]:
        """Those of the document and of every record."""
        refused = (*self.refused_networks, *self.refused_instances)
        return (*self.problems, *(problem for each in refused for problem in each.problems))


def parse_records(
    document: object,
    *,
    read_file: ReadFile | None = None,
    file: str | None = None,
    line_of: LineOf | None = None,
    faults: Iterable[Fault] = (),
    note: Note | None = None,
) -> Records:
    """Every record of a document `{networks: [...], instances: [...]}`; an empty one is fine.

    Ids and addresses that stand twice are not looked for: what is in force is the caller's to know.

    Args:
        document: The mapping, as YAML or JSON gives it; `None` for an empty file.
        read_file: Reads what `user_data_file` names; without it the key is refused.
        file: The file it comes from, for the problems.
        line_of: Where its parts stand in that file.
        faults: What the decoder found; one inside a record refuses that record, another the
            document.
        note: Given now and then how many records of a list were checked, of how many.
    """
    field, findings = root(document, file=file, line_of=line_of, path=())
    by_record: dict[Path, list[Fault]] = {}
    for fault in faults:
        by_record.setdefault(fault.path[:2], []).append(fault)
    entries: dict[str, Field] = {}
    if document is not None:
        entries = field.mapping(LISTS) or {}
    networks, refused_networks = _sort(
        entries.get("networks"),
        by_record,
        lambda item: parse_network(item.value, file=file, line_of=line_of, path=item.path),
        note,
    )
    instances, refused_instances = _sort(
        entries.get("instances"),
        by_record,
        lambda item: parse_instance(
            item.value, read_file=read_file, file=file, line_of=line_of, path=item.path
        ),
        note,
    )
    for fault in (fault for left in by_record.values() for fault in left):
        findings.add(fault)
    if findings.problems:
        return Records(problems=tuple(findings.problems))
    return Records(networks, instances, refused_networks, refused_instances)


def _sort(
    listed: Field | None,
    faults: dict[Path, list[Fault]],
    parse: Callable[[Field], _Record | Refused],
    note: Note | None,
) -> tuple[tuple[tuple[Path, _Record], ...], tuple[Refused, ...]]:
    """The good and the bad records of a list; takes those of `faults` that lie inside a record."""
    good: list[tuple[Path, _Record]] = []
    bad: list[Refused] = []
    items = [] if listed is None else listed.items()
    for done, item in enumerate(items, 1):
        if note is not None and done % _NOTED == 0:
            note(done, len(items))
        record = _check_faults(item, parse(item), faults.pop(item.path, ()))
        if isinstance(record, Refused):
            bad.append(record)
        else:
            good.append((item.path, record))
    return tuple(good), tuple(bad)


def parse_listed(
    path: Path,
    value: object,
    *,
    read_file: ReadFile | None = None,
    file: str | None = None,
    line_of: LineOf | None = None,
    faults: Sequence[Fault] = (),
) -> Network | Instance | Refused:
    """One record of a document, as `parse_records` parses each.

    Args:
        path: Its list and its place there.
        value: The mapping.
        read_file: As of `parse_records`, like all that follows.
        file: The same.
        line_of: The same.
        faults: Those inside this record.
    """
    record: Network | Instance | Refused
    if path[0] == "networks":
        record = parse_network(value, file=file, line_of=line_of, path=path)
    else:
        record = parse_instance(value, read_file=read_file, file=file, line_of=line_of, path=path)
    field, _ = root(value, file=file, line_of=line_of, path=path)
    return _check_faults(field, record, faults)


def _check_faults(
    item: Field, record: _Record | Refused, faults: Sequence[Fault]
) -> _Record | Refused:
    if not faults:
        return record
    found = tuple(item.findings.describe(fault) for fault in faults)
    known = record.problems if isinstance(record, Refused) else ()
    return Refused((*found, *known), record.id)
