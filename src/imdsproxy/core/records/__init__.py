"""Records as people write them: mappings in, networks and instances out, and the reverse.

A record is a mapping as YAML or JSON gives it. `parse_records` reads a whole document (`networks:`
and `instances:` lists), `parse_network` and `parse_instance` one record each; all are strict and
report every problem of a record at once. `render_record` gives the mapping back, fit for JSON.

What keys there are, and what each takes, is in the tables `NETWORK`, `INSTANCE` and `POLICY`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from imdsproxy.core.model import Instance, Network
from imdsproxy.core.records.instance import INSTANCE, PLACED, PlacedInstance
from imdsproxy.core.records.network import NETWORK
from imdsproxy.core.records.schema import Fault, Field, Findings, Json, Path, Refused, Table
from imdsproxy.errors import Problem

Tables: TypeAlias = Mapping[str, Table[Network] | Table[Instance] | Table[PlacedInstance]]
"""Of a document's lists, by their names."""

TABLES: Final[Tables] = {"networks": NETWORK, "instances": INSTANCE}
PLACED_TABLES: Final[Tables] = {"networks": NETWORK, "instances": PLACED}
"""Of a fleet's records."""

LISTS: Final = tuple(TABLES)


@dataclass(frozen=True, slots=True)
class Records:
    """What a document holds.

    Attributes:
        found: Each record in its list's order, networks first, with its path, as `("instances", 3)`.
        problems: What is wrong with the document itself; then it has no records.
    """

    found: tuple[tuple[Path, Network | Instance | Refused], ...] = ()
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(
        cls, found: Iterable[tuple[Path, Network | Instance | Refused]], problems: Sequence[Problem]
    ) -> Records:
        """Records as they were read, unless there are problems of the document itself."""
        if problems:
            return cls(problems=tuple(problems))
        # Stable, and `networks` comes after `instances` in the alphabet.
        return cls(tuple(sorted(found, key=lambda one: str(one[0][0]), reverse=True)))

    @property
    def networks(self) -> list[Network]:
        """The good ones."""
        return [one for _, one in self.found if isinstance(one, Network)]

    @property
    def instances(self) -> list[Instance]:
        """The good ones."""
        return [one for _, one in self.found if isinstance(one, Instance)]

    @property
    def all_problems(self) -> tuple[Problem, ...]:
        """Those of the document and of every record."""
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
    """One record of a document, as `Table.read` gives it; `path` is its list and its place there: `("networks", 3)`."""
    return tables[str(path[0])].read(record, path, findings, faults)


def render_record(record: Network | Instance) -> dict[str, Json]:
    """The mapping of either, fit for JSON, which `parse_network` and `parse_instance` take back unchanged.

    What has its default is not in it. User data that is no UTF-8 becomes `{"base64": …}`.
    """
    return NETWORK.render(record) if isinstance(record, Network) else INSTANCE.render(record)


def parse_each(
    document: object, findings: Findings, faults: Iterable[Fault] = (), tables: Tables = TABLES
) -> Iterator[tuple[Path, Network | Instance | Refused, float]]:
    """Each record of a document `{networks: [...], instances: [...]}`, and the share of its list that is parsed.

    Duplicate ids and addresses are not looked for: what is in force is the caller's to know.

    Args:
        document: The mapping, as YAML or JSON gives it; `None` for an empty file.
        findings: Where problems of the document itself are noted. With one, none of its records counts.
        faults: What the decoder found; one inside a record refuses that record, another the
            document.
        tables: What the records may have.
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
    """Every record of a document; arguments as of `parse_each`."""
    findings = findings or Findings()
    found = [(path, record) for path, record, _ in parse_each(document, findings, faults, tables)]
    return Records.of(found, findings.problems)
