"""Records in the form that people write: mappings parsed into networks and instances, and rendered back.

A record is a mapping from the YAML or JSON decoder. `parse_records` reads a whole document (`networks:` and
`instances:` lists), `parse_network` and `parse_instance` one record each. All are strict and report every problem of a
record at once. `render_record` returns the mapping again, fit for JSON.

The tables `NETWORK`, `INSTANCE` and `POLICY` define the keys and their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from imdsproxy.errors import Problem
from imdsproxy.model.entities import Instance, Network
from imdsproxy.model.records.instance import INSTANCE, PLACED, PlacedInstance
from imdsproxy.model.records.network import NETWORK
from imdsproxy.model.records.schema import Fault, Field, Findings, Json, Path, Refused, Table

Tables: TypeAlias = Mapping[str, Table[Network] | Table[Instance] | Table[PlacedInstance]]
"""Tables of a document's lists, by the lists' names."""

TABLES: Final[Tables] = {"networks": NETWORK, "instances": INSTANCE}
PLACED_TABLES: Final[Tables] = {"networks": NETWORK, "instances": PLACED}
"""Tables of a fleet's records."""

LISTS: Final = tuple(TABLES)


@dataclass(frozen=True, slots=True)
class Records:
    """Records of a document in the order of their lists, networks first, with paths as `("instances", 3)`.

    A document that itself has problems has no records.
    """

    found: tuple[tuple[Path, Network | Instance | Refused], ...] = ()
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(
        cls, found: Iterable[tuple[Path, Network | Instance | Refused]], problems: Sequence[Problem]
    ) -> Records:
        if problems:
            return cls(problems=tuple(problems))
        # Stable, and `networks` comes after `instances` in the alphabet.
        return cls(tuple(sorted(found, key=lambda one: str(one[0][0]), reverse=True)))

    @property
    def networks(self) -> list[Network]:
        return [one for _, one in self.found if isinstance(one, Network)]

    @property
    def instances(self) -> list[Instance]:
        return [one for _, one in self.found if isinstance(one, Instance)]

    @property
    def all_problems(self) -> tuple[Problem, ...]:
        refused = (one for _, one in self.found if isinstance(one, Refused))
        return (*self.problems, *(problem for one in refused for problem in one.problems))


parse_network: Final = NETWORK.read
parse_instance: Final = INSTANCE.read
parse_placed: Final = PLACED.read


def parse_listed(
    path: Path,
    record: object,
    findings: Findings | None = None,
    faults: Iterable[Fault] = (),
    tables: Tables = TABLES,
) -> Network | Instance | Refused:
    """Parse one record of a document by `Table.read`; `path` is its list and its index, `("networks", 3)`."""
    return tables[str(path[0])].read(record, path, findings, faults)


def render_record(record: Network | Instance) -> dict[str, Json]:
    """Render a network or instance as a mapping for JSON; `parse_network` and `parse_instance` parse it back unchanged.

    The mapping omits defaults. User data that is not UTF-8 becomes `{"base64": …}`.
    """
    return NETWORK.render(record) if isinstance(record, Network) else INSTANCE.render(record)


def parse_each(
    document: object, findings: Findings, faults: Iterable[Fault] = (), tables: Tables = TABLES
) -> Iterator[tuple[Path, Network | Instance | Refused, float]]:
    """Yield each record of a document `{networks: [...], instances: [...]}`, and the parsed share of its list.

    Duplicate ids and addresses are not checked: only the caller knows which records are in force.

    Args:
        document: Mapping from the YAML or JSON decoder; `None` for an empty file.
        findings: Receives problems of the document itself. With such a problem, none of its records counts.
        faults: Faults of the decoder; a fault inside a record refuses that record, any other fault the document.
    """
    by_record: dict[Path, list[Fault]] = {}
    for fault in faults:
        by_record.setdefault(fault.path[:2], []).append(fault)
    root = Field({} if document is None else document, (), findings)
    lists = root.read(lambda field: field.mapping(LISTS)) or {}
    for name in LISTS:
        items = (lists[name].read(Field.items) if name in lists else None) or []
        for done, item in enumerate(items, 1):
            own = by_record.pop(item.path, ())
            reading = Findings(findings.file, findings.line_of, findings.read_file)
            yield (
                item.path,
                parse_listed(item.path, item.value, reading, own, tables),
                done / len(items),
            )
    for fault in (fault for left in by_record.values() for fault in left):
        findings.add(fault)


def parse_records(
    document: object,
    findings: Findings | None = None,
    faults: Iterable[Fault] = (),
    tables: Tables = TABLES,
) -> Records:
    """Parse all records of a document; arguments as of `parse_each`."""
    findings = findings or Findings()
    found = [(path, record) for path, record, _ in parse_each(document, findings, faults, tables)]
    return Records.of(found, findings.problems)
