"""Rules for operators limited to a project: permissions and visible records. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from imdsproxy.errors import AccessDenied, Problem, SourceCorrupt
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import parse_grant
from imdsproxy.model.claims import claim_places
from imdsproxy.model.entities import Instance, Network, Port
from imdsproxy.model.records.grant import NO_GRANT, Grant, spell_listener
from imdsproxy.model.records.schema import Path, render_path

_View: TypeAlias = Callable[[str], tuple[bytes, int] | None]


@dataclass(frozen=True, slots=True)
class Scope:
    """Project with its grant."""

    project: str
    grant: Grant

    def knows_network(self, record: Mapping[str, object]) -> bool:
        """Return whether a network belongs to the project, or is shared and has addresses for the project."""
        project = record.get("project")
        if project is None:
            return self.grant.has_network(str(record.get("id")))
        return project == self.project

    def refuse_listener(self, network: Network) -> None:
        """Raise `AccessDenied` unless the project may use the listener of a network."""
        if not self.grant.has_listener(network.listener):
            kind, _, name = spell_listener(network.listener).partition(" ")
            raise AccessDenied(
                f"project {self.project} may make no network with the listener {kind} {name}",
                hint="an operator of all projects may allow it: imdsproxy grant add "
                f"{self.project} --listener {kind}={name}",
            )

    def refuse_projects(self, ports: Mapping[int, Port]) -> None:
        """Raise `AccessDenied` if a port belongs to another project, for which Nova would answer."""
        for number, port in ports.items():
            if port.project not in {None, self.project}:
                raise AccessDenied(
                    f"ports[{number}] is not of project {self.project}, to which this certificate is limited",
                    hint="omit the port's project: it is the instance's",
                )

    def address_problems(self, instance: Instance, number: int, path: Path) -> Iterator[Problem]:
        """Yield problems of a port's addresses and MAC that are not granted in a shared network."""
        for (network, address), part in claim_places(instance):
            if part[1] == number and not self.grant.has_address(network, address):
                shown = instance.ports[number].mac if part[-1] == "mac" else address
                yield Problem(
                    render_path((*path, *part)),
                    f"project {self.project} may not use {shown} in the shared network {network}",
                    f"imdsproxy --fleet URL grant show {self.project}",
                )


def read_grant(view: _View, project: str) -> tuple[Grant, int]:
    """Return the grant of a project and its revision; revision 0 if the grant was never written.

    Raises:
        SourceCorrupt: Another program wrote the grant.
    """
    found = view(layout.grant_key(project))
    if found is None:
        return NO_GRANT, 0
    try:
        grant = parse_grant(found[0])
    except codec.Unreadable as error:
        raise SourceCorrupt(f"the grant of project {project} is not readable: {error}") from error
    return grant, found[1]


def read_scope(view: _View, project: str | None) -> Scope | None:
    """Return the scope of an operator, `None` for all projects; raise the errors of `read_grant`."""
    return None if project is None else Scope(project, read_grant(view, project)[0])


def new_ports(instance: Instance, before: Instance | None) -> Iterator[tuple[int, Port]]:
    """Yield the ports that the earlier record does not have, with their indexes."""
    had = () if before is None else before.ports
    for number, port in enumerate(instance.ports):
        if port not in had:
            yield number, port
