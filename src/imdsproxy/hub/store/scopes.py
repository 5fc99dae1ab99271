"""Rules for operators limited to a project: permissions and visible records. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from imdsproxy.errors import (
    AccessDenied,
    AlreadyExists,
    Problem,
)
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import (
    HostId,
    HostState,
    StoredInstance,
    StoredNetwork,
    View,
    host_key,
    parse_grant,
    read_host,
)
from imdsproxy.hub.store.transactions import (
    Terms,
    is_unread,
    read_instance,
    read_network,
    readable,
)
from imdsproxy.model.claims import claim_places
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId, Port
from imdsproxy.model.policy import PolicyRules
from imdsproxy.model.records.grant import NO_GRANT, Grant, spell_listener
from imdsproxy.model.records.schema import Path, render_path


@dataclass(frozen=True, slots=True)
class Scope:
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
                f"project {self.project} may not create a network with the listener {kind} {name}",
                hint="an operator of all projects may allow it: imdsproxy grant add "
                f"{self.project} --listener {kind}={name}",
            )

    def refuse_projects(self, ports: Mapping[int, Port]) -> None:
        """Raise `AccessDenied` if a port belongs to another project, for which Nova would answer."""
        for number, port in ports.items():
            if port.project not in {None, self.project}:
                raise AccessDenied(
                    f"ports[{number}] does not belong to project {self.project}, to which this certificate is limited",
                    hint="omit the port's project: it is the instance's",
                )

    def refuse_identity(self, kind: str, policy: PolicyRules, before: PolicyRules) -> None:
        """Raise `AccessDenied` if a record's policy changes the identity tokens of guests.

        The project would choose claims and audiences that verifiers trust because the cloud's operators chose them.
        """
        rules, had = (
            (one.audiences, one.identity_tags, one.identity_document) for one in (policy, before)
        )
        if rules != had:
            raise AccessDenied(
                f"project {self.project} may not change audiences, identity_tags and identity_document of its {kind}s",
                hint=f"an operator of all projects may: imdsproxy policy set project/{self.project} --audience …",
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


def read_grant(view: View, project: str) -> tuple[Grant, int]:
    """Return the grant of a project and its revision, 0 if the grant was never written; raise `SourceCorrupt`."""
    found = view(layout.grant_key(project))
    if found is None:
        return NO_GRANT, 0
    return readable(parse_grant, found[0], f"the grant of project {project}"), found[1]


def read_scope(view: View, project: str | None) -> Scope | None:
    """Return the scope of an operator, `None` for all projects; raise the errors of `read_grant`."""
    return None if project is None else Scope(project, read_grant(view, project)[0])


def new_ports(instance: Instance, before: Instance | None) -> Iterator[tuple[int, Port]]:
    """Yield the ports that the earlier record does not have, with their indexes."""
    had = () if before is None else before.ports
    for number, port in enumerate(instance.ports):
        if port not in had:
            yield number, port


def in_scope(record: Mapping[str, object], scope: str | None) -> bool:
    """Return whether a record belongs to the project that an operator is limited to."""
    return scope is None or record.get("project") == scope


def read_owned(
    view: View, instance: InstanceId, project: str | None
) -> tuple[StoredInstance, int] | None:
    """Return a stored instance and its revision; `None` also if it does not belong to the operator's project.

    The project of an unreadable record is unknown, so only operators of all projects get `SourceCorrupt`.
    """
    view = only_own(view, project)
    if project is not None and is_unread(view, layout.instance_key(instance)):
        return None
    known = read_instance(view, instance)
    return known if known is not None and in_scope(known[0].record, project) else None


def owned_or_unread(
    view: View, instance: InstanceId, terms: Terms
) -> tuple[StoredInstance, int] | None:
    """Call `read_owned`; return `None` for an unreadable record, which an operator of all projects replaces."""
    if is_unread(view, layout.instance_key(instance)):
        return None
    return read_owned(view, instance, terms.scope)


def owned_network(view: View, network: NetworkId, terms: Terms) -> tuple[StoredNetwork, int] | None:
    """Return a network and its revision; `None` if unreadable, or not of the operator's project."""
    known = owned_or_shared(view, network)
    return known if known is not None and in_scope(known[0].record, terms.scope) else None


def owned_or_shared(view: View, network: NetworkId) -> tuple[StoredNetwork, int] | None:
    """Call `read_network`; return `None` also for an unreadable record."""
    unread = is_unread(view, layout.network_key(network))
    return None if unread else read_network(view, network)


def only_own(view: View, project: str | None) -> View:
    """Return a view without records of other projects.

    Records of other projects are not parsed: the time for a large record would reveal that it exists.
    """
    if project is None:
        return view
    word = codec.encode({"project": project})[1:-1]

    def look(key: str) -> tuple[bytes, int] | None:
        found = view(key)
        is_record = key.startswith((layout.INSTANCES, layout.NETWORKS))
        return None if found is not None and is_record and word not in found[0] else found

    return look


def unknown_hosts(
    view: View, hosts: Sequence[str], before: Sequence[str], path: Path, scope: Scope | None
) -> list[Problem]:
    """Return problems of hosts that are not enrolled, or not granted to the project.

    The operator does not learn whether a host that is not granted exists.
    """
    where = render_path(path)
    if not hosts and not before:
        return [
            Problem(
                where, "the instance has no host", "name a host: --host HOST, or `hosts: [HOST]`"
            )
        ]
    problems: list[Problem] = []
    # An instance may stay on its current hosts, even if one of them was revoked meanwhile.
    for host in (one for one in hosts if one not in before):
        if scope is not None and not scope.grant.has_host(host):
            hint = f"imdsproxy --fleet URL grant show {scope.project}"
            problems.append(Problem(where, f"project {scope.project} has no host {host}", hint))
            continue
        found = view(host_key(HostId(host)))
        state = None if found is None else read_host(*found).state
        if state is not HostState.ENROLLED:
            why = f"the fleet has no host {host}" if state is None else f"host {host} is {state}"
            problems.append(Problem(where, why, "imdsproxy fleet hosts"))
    return problems


def refuse_taken(subject: str, last: Mapping[str, object] | None, terms: Terms) -> None:
    if last is not None and not in_scope(last, terms.scope):
        raise AlreadyExists(f"the id {subject} is taken", hint="use another id")


def refuse_other_project(
    kind: str, subject: str, record: Mapping[str, object], terms: Terms
) -> None:
    """Refuse a new record of another project; the stored record does not matter here."""
    if not in_scope(record, terms.scope):
        raise AccessDenied(
            f"{kind} {subject} does not belong to project {terms.scope}, to which this certificate is limited",
            hint=f"add the project: --project {terms.scope}",
        )
