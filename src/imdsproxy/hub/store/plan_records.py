"""Plans for writes of networks and instances. Pure.

Each instance claims its addresses: its record and an absent `layout.address_claim` are written in one transaction. A
claim changes its owner only in a write that finds the owner's record unchanged. So two hubs never give an address to
two instances.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from imdsproxy.errors import (
    AlreadyExists,
    Problem,
    RecordConflict,
    RequestRefused,
    SourceRefused,
    quoted,
)
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import attempt
from imdsproxy.fleet.layout import (
    HostId,
    StoredInstance,
    StoredNetwork,
    StoredPassword,
    UserData,
    View,
    is_cleared,
    render_password,
)
from imdsproxy.hub.store.etcd_messages import absent, none_below, unchanged
from imdsproxy.hub.store.scopes import (
    Scope,
    in_scope,
    new_ports,
    only_own,
    owned_network,
    owned_or_shared,
    owned_or_unread,
    read_scope,
    refuse_other_project,
    refuse_taken,
    unknown_hosts,
)
from imdsproxy.hub.store.transactions import (
    Draft,
    Terms,
    Transaction,
    incarnation_in,
    is_unread,
    last_record,
    next_epoch,
    no_such,
    read_instance,
    read_override,
    record_of,
    refuse_other_revision,
)
from imdsproxy.model.claims import claim_places, taken_address, taken_id
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.policy import NO_RULES
from imdsproxy.model.records import (
    PlacedInstance,
    Refused,
    parse_instance,
    parse_network,
    render_record,
)
from imdsproxy.model.records.schema import Path, render_path
from imdsproxy.model.records.values import ID_WANTED

_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class InstancePut:
    """Instance to store, without its user data. If the record names no host, the stored hosts stay.

    Attributes:
        user_data: Reference to the user data, whose chunks etcd has already.
        chunk_revision: Revision of the first chunk. While it is unchanged, no hub has swept the chunks.
    """

    record: PlacedInstance
    user_data: UserData | None = None
    chunk_revision: int = 0
    path: Path = ()


def plan_put(
    view: View,
    networks: Sequence[Network],
    instances: Sequence[InstancePut],
    terms: Terms,
    *,
    at_once: bool = True,
) -> Transaction:
    """Store networks and instances, all or none. With `at_once`, an address may move between these instances.

    Raises:
        AccessDenied: A record belongs to another project, or the project may not use a listener.
        AlreadyExists: An id exists although `terms.create` is set, or belongs to another project.
        RequestRefused: A project is no id.
        RestoreSuspected: etcd may be restored from a backup.
        RevisionOutdated: The stored record does not have `terms.revision`.
        RecordConflict: An address is taken, or an id occurs twice (`problems` has the fields).
        SourceRefused: A network is unknown, or a host is not enrolled.
    """
    draft, scope = Draft(view, terms), read_scope(view, terms.scope)
    _refuse_projects(networks, instances)
    for one in instances:
        refuse_other_project("instance", one.record.id, render_record(one.record), terms)
    for network in networks:
        _put_network(draft, network, scope)
    coming = {one.id for one in networks}
    known = {one.record.id: owned_or_unread(view, one.record.id, terms) for one in instances}
    writing = [one for one in instances if not _is_done(draft, one, known[one.record.id], terms)]
    problems: list[Problem] = []
    for one in writing:
        before = known[one.record.id]
        hosts = () if before is None else before[0].hosts
        problems += _port_problems(draft, one, before, coming, scope)
        problems += unknown_hosts(view, one.record.hosts, hosts, (*one.path, "hosts"), scope)
    if scope is not None:
        # Operators learn that an id or address is taken only if their project could use it.
        _refuse(problems)
    for one in writing:
        key = layout.instance_key(one.record.id)
        if known[one.record.id] is None:
            refuse_taken(one.record.id, last_record(view, key), terms)
    draft.freed = _freed(writing, known) if at_once else {}
    taken = [*_repeated(writing)]
    for one in writing:
        taken += _claim(draft, one, known[one.record.id])
        _put_instance(draft, one, known[one.record.id], terms)
    if taken:
        raise RecordConflict("the fleet refuses the records", problems=[*problems, *taken])
    _refuse(problems)
    draft.deletes |= dict.fromkeys(key for key in draft.freed if key not in draft.taken)
    return draft.finish()


def plan_removal(view: View, instance: InstanceId, terms: Terms) -> Transaction:
    """Remove an instance and free its addresses; raise `NotFound`, and the errors of `plan_put`."""
    view = only_own(view, terms.scope)
    draft = Draft(view, terms)
    key, known = layout.instance_key(instance), owned_or_unread(view, instance, terms)
    project: dict[str, Any] = {}
    left: tuple[HostId, ...] = (layout.ANYWHERE,)
    if known is not None:
        stored, revision = known
        refuse_other_revision("instance", instance, revision, terms)
        project, left = _project_alone(stored.record), stored.leaves(())
        draft.deletes |= dict.fromkeys(claims_of(record_of(stored)))
        draft.hosts.update(stored.hosts)
    elif terms.scope is not None or not is_unread(view, key):
        done = _removed_by(view, key, terms)
        if done is not None:
            return Transaction(revision=done)
        raise no_such("instance", instance)
    draft.hold(key)
    draft.puts[key] = layout.render_instance(
        StoredInstance((), project, request=terms.request, removed_at=terms.now, left=left)
    )
    password = layout.password_key(instance)
    # Compare the password even if it is absent: a host may write one at the same moment.
    draft.hold(password)
    if (posted := view(password)) is not None and not is_cleared(posted[0]):
        draft.puts[password] = render_password(StoredPassword(None, terms.request, terms.now))
    return draft.finish()


def plan_network_removal(
    view: View, network: NetworkId, terms: Terms, users: Sequence[str]
) -> Transaction:
    """Remove a network; `users` are some of the instances with a port in the network, if any are known.

    Raises `RecordConflict` if instances have ports in the network, `NotFound`, and the errors of `plan_put`.
    """
    view = only_own(view, terms.scope)
    draft = Draft(view, terms)
    key, known = layout.network_key(network), owned_network(view, network, terms)
    project: dict[str, Any] = {}
    if known is not None:
        refuse_other_revision("network", network, known[1], terms)
        project = _project_alone(known[0].record)
    elif terms.scope is not None or not is_unread(view, key):
        done = _removed_by(view, key, terms)
        if done is not None:
            return Transaction(revision=done)
        raise no_such("network", network)
    if users:
        shown = ", ".join(users[:_SHOWN]) + (" and others" if len(users) > _SHOWN else "")
        if terms.scope is not None:
            # The users may be instances of other projects.
            shown = f"imdsproxy --fleet URL instance list --network {network}"
        raise RecordConflict(
            f"instances have ports in network {network}: {shown}",
            hint="remove or change these first",
            problems=[Problem("id", f"instance {shown}: a port is in {network}")],
        )
    draft.hold(key)
    draft.compares[none_below(layout.claims_in(network))] = None
    draft.puts[key] = layout.render_network(
        StoredNetwork(project, request=terms.request, removed_at=terms.now)
    )
    return draft.finish()


def claims_of(instance: Instance) -> dict[str, AddressKey | None]:
    """Return the keys that an instance claims, with their addresses; `None` for a port without an address."""
    claims: dict[str, AddressKey | None] = {
        layout.address_claim(*key): key for key, _ in claim_places(instance)
    }
    for port in instance.ports:
        if port.mac is None and not port.addresses:
            claims[layout.port_claim(port.network, instance.id)] = None
    return claims


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise SourceRefused("the fleet refuses the records", problems=problems)


def _refuse_projects(networks: Sequence[Network], instances: Sequence[InstancePut]) -> None:
    """Raise `RequestRefused` for projects that are no ids: a fleet has keys of projects, a single host has none."""
    records: list[tuple[Path, str, str | None]] = [((), one.id, one.project) for one in networks]
    records += [(one.path, one.record.id, one.record.project) for one in instances]
    problems = [
        Problem(
            render_path((*path, "project")), f"{quoted(project)} of {identity} is no id", ID_WANTED
        )
        for path, identity, project in records
        if project is not None and not codec.is_id(project)
    ]
    if problems:
        raise RequestRefused("a fleet cannot have the projects", problems=problems)


def _put_network(draft: Draft, network: Network, scope: Scope | None) -> None:
    terms, key, view = draft.terms, layout.network_key(network.id), draft.view
    known, record = owned_network(view, network.id, terms), render_record(network)
    refuse_other_project("network", network.id, record, terms)
    if known is None:
        if terms.revision is not None:
            raise no_such("network", network.id)
        if scope is not None:
            scope.refuse_listener(network)
            scope.refuse_identity("network", network.policy, NO_RULES)
        refuse_taken(network.id, last_record(view, key), terms)
    else:
        stored, revision = known
        draft.revision = max(draft.revision, revision)
        if stored.request == terms.request:
            return
        refuse_other_revision("network", network.id, revision, terms)
        if terms.create:
            raise AlreadyExists(
                f"there is a network {network.id} already", hint="use set to change it"
            )
        if stored.record == record:
            return
        before = parse_network(stored.record)
        has_listener = isinstance(before, Network) and before.listener == network.listener
        if scope is not None and not has_listener:
            scope.refuse_listener(network)
        if scope is not None:
            had = before.policy if isinstance(before, Network) else NO_RULES
            scope.refuse_identity("network", network.policy, had)
    draft.hold(key)
    draft.puts[key] = layout.render_network(StoredNetwork(record, terms.request))


def _is_done(
    draft: Draft, put: InstancePut, known: tuple[StoredInstance, int] | None, terms: Terms
) -> bool:
    """Return whether the record needs no change; raise if it may not be written."""
    identity = put.record.id
    if known is None:
        if terms.revision is not None:
            raise no_such("instance", identity)
        return False
    stored, revision = known
    if stored.request != terms.request:
        refuse_other_revision("instance", identity, revision, terms)
        if terms.create:
            raise AlreadyExists(
                f"there is an instance {identity} already", hint="use set to change it"
            )
        wanted = _stored(put, known, terms)
        if replace(wanted, request=stored.request) != stored:
            return False
    draft.revision = max(draft.revision, revision)
    draft.hosts.update(stored.hosts)
    return True


def _put_instance(
    draft: Draft, put: InstancePut, known: tuple[StoredInstance, int] | None, terms: Terms
) -> None:
    key, stored = layout.instance_key(put.record.id), _stored(put, known, terms)
    if known is None and (removed := draft.view(key)) is not None:
        # An instance that was removed had this id.
        before = attempt(layout.parse_instance, removed[0])
        left = (layout.ANYWHERE,) if before is None else before.leaves(stored.hosts)
        stored = replace(stored, left=left)
        _end_tokens(draft, put.record.id)
    draft.hold(key)
    if put.user_data is not None and put.chunk_revision:
        chunk = layout.blob_key(put.user_data.sha256, 0)
        draft.compares[unchanged(chunk, put.chunk_revision)] = None
        draft.puts[layout.blob_use_key(put.user_data.sha256)] = b"{}"
    draft.puts[key] = layout.render_instance(stored)
    draft.hosts.update(stored.hosts)
    if known is not None:
        draft.hosts.update(known[0].hosts)


def _end_tokens(draft: Draft, instance: InstanceId) -> None:
    key = layout.override_key(instance)
    override = read_override(draft.view, key)
    epoch = next_epoch(override.epoch, incarnation_in(draft.view))
    draft.hold(key)
    draft.puts[key] = layout.render_override(replace(override, epoch=epoch))


def _stored(
    put: InstancePut, known: tuple[StoredInstance, int] | None, terms: Terms
) -> StoredInstance:
    """Return the value to store; only a new record gets the current time as its creation time."""
    created_at, hosts = put.record.created_at, tuple(HostId(one) for one in put.record.hosts)
    if known is None:
        created_at = terms.now if created_at is None else created_at
    else:
        created_at = record_of(known[0]).created_at if created_at is None else created_at
        hosts = hosts or known[0].hosts
    record = render_record(replace(put.record, created_at=created_at, user_data=None))
    left = () if known is None else known[0].leaves(hosts)
    return StoredInstance(hosts, record, put.user_data, terms.request, left=left)


def _repeated(puts: Sequence[InstancePut]) -> Iterator[Problem]:
    first: dict[InstanceId, Path] = {}
    for one in puts:
        if one.record.id in first:
            place = ".".join(map(str, first[one.record.id]))
            yield taken_id(one.record.id, path=one.path, place=place)
        first.setdefault(one.record.id, one.path)


def _port_problems(
    draft: Draft,
    put: InstancePut,
    known: tuple[StoredInstance, int] | None,
    coming: Collection[str],
    scope: Scope | None,
) -> list[Problem]:
    """Return problems of unknown networks, and of addresses that the operator's project may not use."""
    problems: list[Problem] = []
    record, before = put.record, None if known is None else record_of(known[0])
    new = dict(new_ports(record, before))
    if scope is not None:
        scope.refuse_projects(new)
        had = NO_RULES if before is None else before.policy
        scope.refuse_identity("instance", record.policy, had)
    for number, port in enumerate(record.ports):
        if port.network in coming:
            continue
        if scope is None and is_unread(draft.view, layout.network_key(port.network)):
            where = render_path((*put.path, "ports", number, "network"))
            reason = f"network {port.network} is not readable in etcd"
            problems.append(Problem(where, reason, "write the whole network again"))
            continue
        found = owned_or_shared(draft.view, port.network)
        # Old ports are not limited: an operator of all projects may have added them beyond the grant.
        limit = scope if number in new else None
        if found is None or (limit is not None and not limit.knows_network(found[0].record)):
            where = render_path((*put.path, "ports", number, "network"))
            reason = f"there is no network {port.network}"
            problems.append(Problem(where, reason, "imdsproxy --fleet URL network list"))
            continue
        if limit is not None and found[0].record.get("project") is None:
            problems += limit.address_problems(record, number, put.path)
        # The network must not be removed meanwhile.
        draft.hold(layout.network_key(port.network))
    return problems


def _freed(
    writing: Sequence[InstancePut], known: Mapping[InstanceId, tuple[StoredInstance, int] | None]
) -> dict[str, InstanceId]:
    freed: dict[str, InstanceId] = {}
    for one in writing:
        before = known[one.record.id]
        if before is not None:
            mine = claims_of(one.record)
            gone = (key for key in claims_of(record_of(before[0])) if key not in mine)
            freed |= dict.fromkeys(gone, one.record.id)
    return freed


def _claim(
    draft: Draft,
    put: InstancePut,
    known: tuple[StoredInstance, int] | None,
) -> list[Problem]:
    instance = put.record
    before = {} if known is None else claims_of(record_of(known[0]))
    problems: list[Problem] = []
    for key, address in claims_of(instance).items():
        found = draft.view(key)
        holder = draft.taken.setdefault(key, instance.id)
        if holder == instance.id and (key in before or key in draft.freed):
            # The write compares the claim's present owner: this record, or the record that releases it.
            if key in draft.freed:
                draft.puts[key] = instance.id.encode()
            continue
        if holder == instance.id and found is not None:
            try:
                holder = layout.parse_claim(found[0])
            except codec.Unreadable as error:
                where = render_path(put.path)
                reason = f"the owner of {key} is not readable in etcd: {error}"
                problems.append(Problem(where, reason, f"etcdctl del {key}, if no instance has it"))
                continue
            if holder != instance.id and _is_void(draft.view, key, holder):
                # Such a claim is left when an unreadable record is replaced. The holder must not regain the address.
                draft.hold(layout.instance_key(holder))
                holder = instance.id
        if holder != instance.id and address is not None:
            problems.append(_taken(draft.view, put, address, holder, draft.terms))
            continue
        draft.compares[absent(key) if found is None else unchanged(key, found[1])] = None
        draft.puts[key] = instance.id.encode()
    return problems


def _taken(
    view: View, put: InstancePut, address: AddressKey, holder: InstanceId, terms: Terms
) -> Problem:
    unread = is_unread(view, layout.instance_key(holder))
    known = None if unread else read_instance(view, holder)
    if terms.scope is not None and (known is None or not in_scope(known[0].record, terms.scope)):
        problem = taken_address(put.record, address, holder, path=put.path)
        return replace(problem, reason=f"{address[1]} in network {address[0]} is taken")
    hosts = () if known is None else known[0].hosts
    place = f"on {', '.join(hosts)}" if hosts else ""
    return taken_address(put.record, address, holder, path=put.path, place=place)


def _is_void(view: View, key: str, holder: InstanceId) -> bool:
    """Return whether the holder of a claim does not exist, or does not have the address."""
    if is_unread(view, layout.instance_key(holder)):
        return False
    known = read_instance(view, holder)
    if known is None:
        return True
    parsed = parse_instance(known[0].record)
    return not isinstance(parsed, Refused) and key not in claims_of(parsed)


def _removed_by(view: View, key: str, terms: Terms) -> int | None:
    found = view(key)
    if found is None or not terms.request:
        return None
    if is_unread(view, key):
        return None
    stored = layout.parse_network(found[0])
    is_done = stored.request == terms.request and in_scope(stored.record, terms.scope)
    return found[1] if is_done else None


def _project_alone(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a record that stays after its removal, so that no other project reuses the id."""
    return {key: record[key] for key in ("project",) if key in record}
