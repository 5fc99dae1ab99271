"""Parse a whole document: a record file, or the body of a bulk request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from imdsproxy.core.records.fields import LineOf, Path, Refused, root
from imdsproxy.core.records.instance import parse_instance
from imdsproxy.core.records.network import parse_network

if TYPE_CHECKING:
    from imdsproxy.core.model import Instance, Network
    from imdsproxy.core.records.payload import ReadFile
    from imdsproxy.errors import Problem

__all__ = ["Records", "parse_records"]

_KEYS: Final = ("networks", "instances")


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
) -> Records:
    """Every record of a document `{networks: [...], instances: [...]}`; an empty one is fine.

    Ids and addresses that stand twice are not looked for: what is in force is the caller's to know.
    """
    if document is None:
        return Records()
    field, findings = root(document, file=file, line_of=line_of, path=())
    entries = field.mapping(_KEYS)
    if entries is None:
        return Records(problems=tuple(findings.problems))
    networks: list[tuple[Path, Network]] = []
    instances: list[tuple[Path, Instance]] = []
    refused_networks: list[Refused] = []
    refused_instances: list[Refused] = []
    for item in entries["networks"].items() if "networks" in entries else ():
        network = parse_network(item.value, file=file, line_of=line_of, path=item.path)
        if isinstance(network, Refused):
            refused_networks.append(network)
        else:
            networks.append((item.path, network))
    for item in entries["instances"].items() if "instances" in entries else ():
        instance = parse_instance(
            item.value, read_file=read_file, file=file, line_of=line_of, path=item.path
        )
        if isinstance(instance, Refused):
            refused_instances.append(instance)
        else:
            instances.append((item.path, instance))
    return Records(
        tuple(networks),
        tuple(instances),
        tuple(refused_networks),
        tuple(refused_instances),
        tuple(findings.problems),
    )
