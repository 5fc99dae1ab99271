"""Planner for fleet writes: etcd transactions and refusals. Pure.

Each instance claims its addresses: its record and an absent `layout.address_claim` are written in one transaction. A
claim changes its owner only in a write that finds the owner's record unchanged. So two hubs never give an address to
two instances.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from imdsproxy.errors import (
    AccessDenied,
    AlreadyExists,
    NotFound,
    Problem,
    RecordConflict,
    RequestRefused,
    RestoreSuspected,
    RevisionOutdated,
    SourceCorrupt,
    SourceRefused,
)
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import (
    HostId,
    HostState,
    Meta,
    StoredInstance,
    StoredNetwork,
    StoredPassword,
    Suspicion,
    UserData,
    View,
    host_key,
    is_cleared,
    parse_grant,
    parse_policy,
    read_host,
    render_password,
)
from imdsproxy.fleet.restores import EPOCHS, MOST_AHEAD, read_suspicion
from imdsproxy.hub.store.etcd_messages import Compare, absent, none_below, unchanged
from imdsproxy.hub.store.scopes import Scope, new_ports, read_grant, read_scope
from imdsproxy.model.claims import claim_places, taken_address, taken_id
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records import (
    PlacedInstance,
    Refused,
    parse_instance,
    parse_network,
    render_record,
)
from imdsproxy.model.records.grant import EVERY_HOST, GRANT, NO_GRANT, Grant
from imdsproxy.model.records.schema import Path, render_path

MOST_OPERATIONS: Final = 128
"""Maximum per transaction (etcd's `--max-txn-ops`)."""

MOST_BYTES: Final = 1024 * 1024
"""Maximum size of one transaction's values; etcd accepts requests of 1.5 MiB (`--max-request-bytes`)."""

_SHOWN: Final = 5
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Transaction:
    """Transaction that etcd commits if all comparisons hold.

    Attributes:
        revision: Newest revision of the records that need no change.
        hosts: Hosts of the records, before and after the write.
        scope: See `Terms.scope`.
    """

    compares: tuple[Compare, ...] = ()
    puts: Mapping[str, bytes] = field(default_factory=dict)
    deletes: tuple[str, ...] = ()
    revision: int = 0
    hosts: frozenset[HostId] = frozenset()
    scope: str | None = None

    @property
    def fits(self) -> bool:
        """Return whether the transaction is within etcd's limits."""
        most = max(len(self.compares), len(self.puts) + len(self.deletes))
        return most <= MOST_OPERATIONS and sum(map(len, self.puts.values())) <= MOST_BYTES


@dataclass(frozen=True, slots=True)
class InstancePut:
    """Instance to store.

    Attributes:
        record: Record to store, without its user data. If it names no host, the stored hosts stay.
        user_data: Reference to the user data, whose chunks etcd has already.
        chunk_revision: Revision of the first chunk. While it is unchanged, no hub has swept the chunks.
        path: Path of the record in its document.
    """

    record: PlacedInstance
    user_data: UserData | None = None
    chunk_revision: int = 0
    path: Path = ()


@dataclass(frozen=True, slots=True)
class Terms:
    """Conditions of a write.

    Attributes:
        request: Id of the write.
        now: Unix time.
        create: Refuse ids that exist.
        revision: Required revision of the stored record; `None` for any.
        scope: Project that the operator is limited to; `None` for all.
    """

    request: str
    now: int
    create: bool = False
    revision: int | None = None
    scope: str | None = None


@dataclass(slots=True)
class _Draft:
    """Transaction while it is planned."""

    view: View
    terms: Terms
    compares: dict[Compare, None] = field(default_factory=dict)
    puts: dict[str, bytes] = field(default_factory=dict)
    deletes: dict[str, None] = field(default_factory=dict)
    hosts: set[HostId] = field(default_factory=set)
    revision: int = 0
    freed: dict[str, InstanceId] = field(default_factory=dict)
    taken: dict[str, InstanceId] = field(default_factory=dict)

    def finish(self) -> Transaction:
        """Return the transaction; it compares nothing if it writes nothing."""
        if not (self.puts or self.deletes):
            hosts = frozenset(self.hosts)
            return Transaction(revision=self.revision, hosts=hosts, scope=self.terms.scope)
        if self.terms.scope is not None:
            # The project's grant must not shrink between plan and commit.
            self.hold(layout.grant_key(self.terms.scope))
        return Transaction(
            (refuse_suspect(self.view), *self.compares),
            self.puts,
            # An address may move from one record of this write to another one.
            tuple(key for key in self.deletes if key not in self.puts),
            self.revision,
            frozenset(self.hosts),
            self.terms.scope,
        )

    def hold(self, key: str) -> None:
        """Require that the key still has the revision in the view."""
        found = self.view(key)
        self.compares[unchanged(key, 0 if found is None else found[1])] = None


def read_instance(view: View, instance: InstanceId) -> tuple[StoredInstance, int] | None:
    """Return a stored instance and its revision; `None` if it does not exist or was removed."""
    found = view(layout.instance_key(instance))
    if found is None:
        return None
    stored = _readable(layout.parse_instance, found[0], f"instance {instance}")
    return None if stored.removed_at is not None else (stored, found[1])


def read_network(view: View, network: NetworkId) -> tuple[StoredNetwork, int] | None:
    """Return a stored network and its revision; `None` if it does not exist or was removed."""
    found = view(layout.network_key(network))
    if found is None:
        return None
    stored = _readable(layout.parse_network, found[0], f"network {network}")
    return None if stored.removed_at is not None else (stored, found[1])


def record_of(stored: StoredInstance) -> Instance:
    """Return the record without its user data; raise `SourceCorrupt` if another program wrote it."""
    parsed = parse_instance(stored.record)
    if isinstance(parsed, Refused):
        raise SourceCorrupt(
            "the fleet has an instance that another program has written", problems=parsed.problems
        )
    return parsed


def in_scope(record: Mapping[str, object], scope: str | None) -> bool:
    """Return whether a record belongs to the project that an operator is limited to."""
    return scope is None or record.get("project") == scope


def claims_of(instance: Instance) -> dict[str, AddressKey | None]:
    """Return the keys that an instance claims, with their addresses; `None` for a port without an address."""
    claims: dict[str, AddressKey | None] = {
        layout.address_claim(*key): key for key, _ in claim_places(instance)
    }
    for port in instance.ports:
        if port.mac is None and not port.addresses:
            claims[layout.port_claim(port.network, instance.id)] = None
    return claims


def next_epoch(epoch: int, incarnation: int) -> int:
    """Return an epoch that no host has seen, even if a restored backup lost revocations that hosts remember."""
    return max(epoch, (incarnation - 1) * EPOCHS) + 1


def refuse_suspect(view: View) -> Compare:
    """Return a comparison that fails if another claim of a restore was written meanwhile.

    Raises:
        RestoreSuspected: A hub, or two hosts, claim that etcd was restored.
    """
    suspicion = _suspicion(view)
    if suspicion is not None and suspicion.refuses:
        raise RestoreSuspected(
            f"etcd seems to be restored from a backup, and nothing is written: {suspicion.why}",
            hint="look at `imdsproxy fleet status`, then `imdsproxy fleet accept-restore`",
        )
    found = view(layout.SUSPECT)
    return absent(layout.SUSPECT) if found is None else unchanged(layout.SUSPECT, found[1])


def _suspicion(view: View) -> Suspicion | None:
    """Return the suspicion in force; a value that another program wrote counts as none."""
    try:
        return read_suspicion(view)
    except codec.Unreadable:
        return None


def plan_put(
    view: View,
    networks: Sequence[Network],
    instances: Sequence[InstancePut],
    terms: Terms,
    *,
    at_once: bool = True,
) -> Transaction:
    """Store networks and instances, all or none.

    Args:
        view: Known keys of etcd.
        networks: Network records.
        instances: Instance records. If two share an id or an address, the second is refused.
        terms: Conditions of the write.
        at_once: Allow an address to move between these instances.

    Raises:
        AccessDenied: A record belongs to another project, or the project may not use a listener.
        AlreadyExists: An id exists although `terms.create` is set, or belongs to another project.
        RestoreSuspected: etcd may be restored from a backup.
        RevisionOutdated: The stored record does not have `terms.revision`.
        RecordConflict: An address is taken, or an id occurs twice (`problems` has the fields).
        SourceRefused: A network is unknown, or a host is not enrolled.
    """
    refuse_suspect(view)
    draft, scope = _Draft(view, terms), read_scope(view, terms.scope)
    for one in instances:
        _refuse_other_project("instance", one.record.id, render_record(one.record), terms)
    for network in networks:
        _put_network(draft, network, scope)
    coming = {one.id for one in networks}
    known = {one.record.id: _owned_or_unread(view, one.record.id, terms) for one in instances}
    writing = [one for one in instances if not _is_done(draft, one, known[one.record.id], terms)]
    problems: list[Problem] = []
    for one in writing:
        before = known[one.record.id]
        hosts = () if before is None else before[0].hosts
        problems += _port_problems(draft, one, before, coming, scope)
        problems += _unknown_hosts(view, one.record.hosts, hosts, (*one.path, "hosts"), scope)
    if scope is not None:
        # Operators learn that an id or address is taken only if their project could use it.
        _refuse(problems)
    for one in writing:
        key = layout.instance_key(one.record.id)
        if known[one.record.id] is None:
            _refuse_taken(one.record.id, _last_record(view, key, layout.parse_instance), terms)
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
    refuse_suspect(view)
    view = _only_own(view, terms.scope)
    draft = _Draft(view, terms)
    key, known = layout.instance_key(instance), _owned_or_unread(view, instance, terms)
    project: dict[str, Any] = {}
    left: tuple[HostId, ...] = (layout.ANYWHERE,)
    if known is not None:
        stored, revision = known
        _refuse_other_revision("instance", instance, revision, terms)
        project, left = _project_alone(stored.record), stored.leaves(())
        draft.deletes |= dict.fromkeys(claims_of(record_of(stored)))
        draft.hosts.update(stored.hosts)
    elif terms.scope is not None or not is_unread(view, key, layout.parse_instance):
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
    """Remove a network.

    Args:
        view: Known keys of etcd.
        network: Network to remove.
        terms: Conditions of the write.
        users: Some of the instances with a port in the network; empty if none is known.

    Raises:
        RecordConflict: Instances have ports in the network.
        NotFound: The network does not exist.
        RevisionOutdated: See `plan_put`, also for other errors.
    """
    refuse_suspect(view)
    view = _only_own(view, terms.scope)
    draft = _Draft(view, terms)
    key, known = layout.network_key(network), _owned_network(view, network, terms)
    project: dict[str, Any] = {}
    if known is not None:
        _refuse_other_revision("network", network, known[1], terms)
        project = _project_alone(known[0].record)
    elif terms.scope is not None or not is_unread(view, key, layout.parse_network):
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


def plan_hosts(
    view: View,
    instance: InstanceId,
    choose: Callable[[tuple[HostId, ...]], tuple[HostId, ...]],
    terms: Terms,
) -> Transaction:
    """Place an instance on other hosts without changing its record.

    Args:
        view: Known keys of etcd.
        instance: Instance to place.
        choose: Function from the current hosts to the new hosts; it may raise.
        terms: Conditions of the write.

    Raises:
        ImdsproxyError: Errors of `plan_put` and of `choose`.
    """
    refuse_suspect(view)
    view = _only_own(view, terms.scope)
    known = read_owned(view, instance, terms.scope)
    if known is None:
        raise no_such("instance", instance)
    stored, revision = known
    hosts = choose(stored.hosts)
    draft = _Draft(view, terms, hosts={*stored.hosts, *hosts}, revision=revision)
    if hosts == stored.hosts:
        return draft.finish()
    _refuse_other_revision("instance", instance, revision, terms)
    scope = read_scope(view, terms.scope)
    if problems := _unknown_hosts(view, hosts, stored.hosts, ("hosts",), scope):
        raise SourceRefused("the fleet refuses the hosts", problems=problems)
    key = layout.instance_key(instance)
    draft.hold(key)
    moved = replace(stored, hosts=hosts, request=terms.request, left=stored.leaves(hosts))
    draft.puts[key] = layout.render_instance(moved)
    return draft.finish()


def plan_override(
    view: View,
    instance: InstanceId,
    change: Callable[[OperatorOverride], OperatorOverride],
    terms: Terms,
) -> tuple[Transaction, int]:
    """Change the operator override of an instance; also return its new epoch.

    A removed instance keeps its override, so that a new instance with the same id does not accept its tokens.

    Raises:
        ImdsproxyError: `NotFound`, and the errors of `plan_put`.
    """
    refuse_suspect(view)
    view = _only_own(view, terms.scope)
    key, known = layout.override_key(instance), _owned_or_unread(view, instance, terms)
    found, there = view(key), layout.instance_key(instance)
    gone = _last_record(view, there, layout.parse_instance) or {}
    unread = is_unread(view, there, layout.parse_instance)
    if known is None and ((found is None and not unread) or not in_scope(gone, terms.scope)):
        raise no_such("instance", instance)
    new = change(_read_override(view, key))
    draft = _Draft(view, terms, hosts=set() if known is None else set(known[0].hosts))
    draft.hold(key)
    draft.puts[key] = layout.render_override(new)
    return draft.finish(), new.epoch


def read_policy(view: View, place: str) -> tuple[Mapping[str, Any], int]:
    """Return the rules of a scope and their revision; no rules and revision 0 if it never had any."""
    found = view(layout.POLICIES + place)
    if found is None:
        return {}, 0
    hint = f"`imdsproxy policy clear {place.replace('/', ' ')}` clears it"
    return _readable(parse_policy, found[0], f"the policy of {place}", hint).rules, found[1]


def plan_policy(
    view: View,
    place: str,
    change: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    terms: Terms,
) -> Transaction:
    """Change the rules of a scope; see `Writes.put_policy`."""
    refuse_suspect(view)
    scope, _, subject = place.partition("/")
    if terms.scope is not None and (scope, subject) != ("project", terms.scope):
        raise AccessDenied(f"the policy of {place} is not of project {terms.scope}")
    if scope == "host" and (problems := _unknown_hosts(view, [subject], (), ("host",), None)):
        raise SourceRefused("the fleet refuses the policy", problems=problems)
    unread = is_unread(view, layout.POLICIES + place, parse_policy) and not change({})
    # Unreadable rules can only be cleared: a change of one rule must not lose the others.
    old, revision = ({}, 0) if unread else read_policy(view, place)
    new = {} if unread else change(old)
    draft = _Draft(view, terms, revision=revision)
    _refuse_other_revision("policy", place, revision, terms)
    if new != old or unread:
        draft.hold(layout.POLICIES + place)
        draft.puts[layout.POLICIES + place] = codec.encode(dict(new))
    return draft.finish()


def plan_grant(
    view: View, project: str, change: Callable[[Grant], Grant], terms: Terms
) -> Transaction:
    """Change what a project's operators may use.

    Raises:
        ImdsproxyError: Errors of `plan_put` and of `change`.
    """
    refuse_suspect(view)
    key = layout.grant_key(project)
    # An unreadable grant allows nothing, and the write replaces it.
    unread = is_unread(view, key, parse_grant)
    old, revision = (NO_GRANT, 0) if unread else read_grant(view, project)
    _refuse_other_revision("grant", project, revision, terms)
    new, draft = change(old), _Draft(view, terms, revision=revision)
    hosts = [one for one in new.hosts if one != EVERY_HOST]
    problems = _unknown_hosts(view, hosts, old.hosts, ("hosts",), None) if hosts else []
    for number, one in enumerate(new.addresses):
        known = None if one in old.addresses else read_network(view, one.network)
        if one not in old.addresses and (known is None or known[0].record.get("project")):
            why = f"there is no shared network {one.network}"
            field = render_path(("addresses", number, "network"))
            problems.append(Problem(field, why, "a shared network has no project"))
    if problems:
        raise SourceRefused("the fleet refuses the grant", problems=problems)
    if new != old or unread:
        draft.hold(key)
        draft.puts[key] = codec.encode(GRANT.render(new))
    return draft.finish()


def plan_acceptance(view: View, known: Meta) -> Transaction:
    """Accept the restored contents of etcd: raise the incarnation and remove the suspicion.

    The new incarnation is above that of every hub and host that claims a restore. A backup may be older than several
    acceptances, and hosts refuse an incarnation below their own.

    Args:
        view: Keys of etcd.
        known: This hub's copy of the fleet's metadata, written again if etcd lost it.

    Raises:
        RequestRefused: No restore is suspected.
    """
    meta, found, suspicion = view(layout.META), view(layout.SUSPECT), _suspicion(view)
    if found is None or suspicion is None:
        raise RequestRefused(
            "no restored backup is suspected", hint="`imdsproxy fleet status` shows a suspicion"
        )
    now = known if meta is None else _readable(layout.parse_meta, meta[0], "the fleet")
    if now.fleet != known.fleet:
        raise SourceRefused(
            f"etcd has another fleet, {now.fleet}", hint=f"restore a backup of fleet {known.fleet}"
        )
    newest = max(now.incarnation, known.incarnation)
    # No honest host has seen a higher incarnation.
    newest = max(newest, min(suspicion.incarnation, newest + MOST_AHEAD))
    after = replace(now, incarnation=newest + 1)
    return Transaction(
        (
            unchanged(layout.META, 0 if meta is None else meta[1]),
            unchanged(layout.SUSPECT, found[1]),
        ),
        {layout.META: layout.render_meta(after)},
        (layout.SUSPECT,),
    )


def choose_move(
    instance: InstanceId, to: HostId | None, *, finish: bool, cancel: bool
) -> Callable[[tuple[HostId, ...]], tuple[HostId, ...]]:
    """Return a function from an instance's hosts to its hosts after one step of a move.

    Args:
        instance: Instance that moves.
        to: Target host. It may be omitted to finish or cancel, when the instance is on two hosts.
        finish: The guest has arrived: the source host no longer serves it.
        cancel: The guest stays on the source host.

    A finished move may be finished again, and a canceled move canceled again: the first answer may have been lost.
    """

    def choose(hosts: tuple[HostId, ...]) -> tuple[HostId, ...]:
        moving = len(hosts) > 1
        target = to if to is not None or not moving else hosts[-1]
        if target is None and (finish or cancel):
            return hosts
        if target is None:
            raise RequestRefused(
                f"instance {instance} is not on its way to another host",
                hint=f"imdsproxy instance move {instance} --to HOST",
            )
        if cancel:
            stays = tuple(one for one in hosts if one != target)
            if not stays:
                raise RecordConflict(
                    f"instance {instance} is on host {target} alone: its move there is finished",
                    hint=f"to move it back: imdsproxy instance move {instance} --to HOST",
                )
            return stays
        if finish:
            if target not in hosts:
                raise RecordConflict(
                    f"instance {instance} is not on host {target} yet",
                    hint=f"first `imdsproxy instance move {instance} --to {target}`",
                )
            return (target,)
        if target in hosts:
            return hosts
        if moving:
            raise RecordConflict(
                f"instance {instance} is on its way from {hosts[0]} to {hosts[-1]}",
                hint="finish that move, or cancel it",
            )
        return (*hosts, target)

    return choose


def choose_departure(
    instance: InstanceId, host: HostId, *, cancel: bool
) -> Callable[[tuple[HostId, ...]], tuple[HostId, ...]]:
    """Return a function from an instance's hosts to its hosts after a host reports the end of a migration.

    A host can remove only itself, and only if another host serves the instance. So the report of a captured host
    changes nothing for guests of other hosts.

    Args:
        instance: Instance that was migrated.
        host: Reporting host. If the instance is not on it, the error is the same as for an unknown instance.
        cancel: The migration to this host has failed; otherwise the guest has left this host.
    """

    def choose(hosts: tuple[HostId, ...]) -> tuple[HostId, ...]:
        if host not in hosts:
            raise no_such("instance", instance)
        others = tuple(one for one in hosts if one != host)
        stays = cancel and hosts[-1] != host
        return hosts if stays or not others else others

    return choose


# Parts of a write


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise SourceRefused("the fleet refuses the records", problems=problems)


def _put_network(draft: _Draft, network: Network, scope: Scope | None) -> None:
    terms, key, view = draft.terms, layout.network_key(network.id), draft.view
    known, record = _owned_network(view, network.id, terms), render_record(network)
    _refuse_other_project("network", network.id, record, terms)
    if known is None:
        if terms.revision is not None:
            raise no_such("network", network.id)
        if scope is not None:
            scope.refuse_listener(network)
        _refuse_taken(network.id, _last_record(view, key, layout.parse_network), terms)
    else:
        stored, revision = known
        draft.revision = max(draft.revision, revision)
        if stored.request == terms.request:
            return
        _refuse_other_revision("network", network.id, revision, terms)
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
    draft.hold(key)
    draft.puts[key] = layout.render_network(StoredNetwork(record, terms.request))


def _is_done(
    draft: _Draft, put: InstancePut, known: tuple[StoredInstance, int] | None, terms: Terms
) -> bool:
    """Return whether the record needs no change; raise if it may not be written."""
    identity = put.record.id
    if known is None:
        if terms.revision is not None:
            raise no_such("instance", identity)
        return False
    stored, revision = known
    if stored.request != terms.request:
        _refuse_other_revision("instance", identity, revision, terms)
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
    draft: _Draft, put: InstancePut, known: tuple[StoredInstance, int] | None, terms: Terms
) -> None:
    key, stored = layout.instance_key(put.record.id), _stored(put, known, terms)
    if known is None and (removed := draft.view(key)) is not None:
        # An instance that was removed had this id.
        left: tuple[HostId, ...] = (layout.ANYWHERE,)
        with suppress(codec.Unreadable):
            left = layout.parse_instance(removed[0]).leaves(stored.hosts)
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


def _end_tokens(draft: _Draft, instance: InstanceId) -> None:
    """Revoke the tokens of the removed instance that had this id."""
    key = layout.override_key(instance)
    override = _read_override(draft.view, key)
    epoch = next_epoch(override.epoch, _incarnation(draft.view))
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
    draft: _Draft,
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
    for number, port in enumerate(record.ports):
        if port.network in coming:
            continue
        if scope is None and is_unread(
            draft.view, layout.network_key(port.network), layout.parse_network
        ):
            where = render_path((*put.path, "ports", number, "network"))
            reason = f"network {port.network} is not readable in etcd"
            problems.append(Problem(where, reason, "write the whole network again"))
            continue
        found = _owned_or_shared(draft.view, port.network)
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


def _unknown_hosts(
    view: View, hosts: Sequence[str], before: Sequence[str], path: Path, scope: Scope | None
) -> list[Problem]:
    """Return problems of hosts that are not enrolled, or not granted to the project.

    The operator does not learn whether a host that is not granted exists.
    """
    where = render_path(path)
    if not hosts and not before:
        return [Problem(where, "it is on no host", "name one: --host HOST, or `hosts: [HOST]`")]
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


def _freed(
    writing: Sequence[InstancePut], known: Mapping[InstanceId, tuple[StoredInstance, int] | None]
) -> dict[str, InstanceId]:
    """Return the claims that this write releases, with their owners."""
    freed: dict[str, InstanceId] = {}
    for one in writing:
        before = known[one.record.id]
        if before is not None:
            mine = claims_of(one.record)
            gone = (key for key in claims_of(record_of(before[0])) if key not in mine)
            freed |= dict.fromkeys(gone, one.record.id)
    return freed


def _claim(
    draft: _Draft,
    put: InstancePut,
    known: tuple[StoredInstance, int] | None,
) -> list[Problem]:
    """Claim the record's new addresses; return a problem for each address that is taken."""
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
                reason = f"who has {key} is not readable in etcd: {error}"
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
    unread = is_unread(view, layout.instance_key(holder), layout.parse_instance)
    known = None if unread else read_instance(view, holder)
    if terms.scope is not None and (known is None or not in_scope(known[0].record, terms.scope)):
        problem = taken_address(put.record, address, holder, path=put.path)
        return replace(problem, reason=f"{address[1]} in network {address[0]} is taken")
    hosts = () if known is None else known[0].hosts
    place = f"on {', '.join(hosts)}" if hosts else ""
    return taken_address(put.record, address, holder, path=put.path, place=place)


def read_owned(
    view: View, instance: InstanceId, project: str | None
) -> tuple[StoredInstance, int] | None:
    """Return a stored instance and its revision; `None` also if it does not belong to the operator's project.

    Raises:
        SourceCorrupt: The record cannot be read. Its project is unknown, so only operators of all projects get this
            error.
    """
    view = _only_own(view, project)
    if project is not None and is_unread(
        view, layout.instance_key(instance), layout.parse_instance
    ):
        return None
    known = read_instance(view, instance)
    return known if known is not None and in_scope(known[0].record, project) else None


def _only_own(view: View, project: str | None) -> View:
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


def _owned_or_unread(
    view: View, instance: InstanceId, terms: Terms
) -> tuple[StoredInstance, int] | None:
    """Call `read_owned`; return `None` for an unreadable record, which an operator of all projects replaces."""
    if is_unread(view, layout.instance_key(instance), layout.parse_instance):
        return None
    return read_owned(view, instance, terms.scope)


def _owned_network(
    view: View, network: NetworkId, terms: Terms
) -> tuple[StoredNetwork, int] | None:
    """Return a network and its revision; `None` if unreadable, or not of the operator's project."""
    known = _owned_or_shared(view, network)
    return known if known is not None and in_scope(known[0].record, terms.scope) else None


def _owned_or_shared(view: View, network: NetworkId) -> tuple[StoredNetwork, int] | None:
    """Call `read_network`; return `None` also for an unreadable record."""
    unread = is_unread(view, layout.network_key(network), layout.parse_network)
    return None if unread else read_network(view, network)


def is_unread(view: View, key: str, parse: Callable[[bytes], object]) -> bool:
    """Return whether a key has an unreadable value."""
    found = view(key)
    if found is None:
        return False
    try:
        parse(found[0])
    except codec.Unreadable:
        return True
    return False


def _is_void(view: View, key: str, holder: InstanceId) -> bool:
    """Return whether the holder of a claim does not exist, or does not have the address."""
    if is_unread(view, layout.instance_key(holder), layout.parse_instance):
        return False
    known = read_instance(view, holder)
    if known is None:
        return True
    parsed = parse_instance(known[0].record)
    return not isinstance(parsed, Refused) and key not in claims_of(parsed)


def _read_override(view: View, key: str) -> OperatorOverride:
    """Return an operator override; if it is unreadable, one that revokes all tokens."""
    found = view(key)
    if found is None:
        return OperatorOverride()
    try:
        return layout.parse_override(found[0])
    except codec.Unreadable:
        # Each revocation was a write, so there were fewer revocations than revisions.
        return OperatorOverride(next_epoch(0, _incarnation(view)) + found[1])


def _incarnation(view: View) -> int:
    meta = view(layout.META)
    return 1 if meta is None else _readable(layout.parse_meta, meta[0], "the fleet").incarnation


def _last_record(
    view: View, key: str, parse: Callable[[bytes], StoredInstance | StoredNetwork]
) -> Mapping[str, object] | None:
    """Return a record, or the project that a removed record left; empty if unreadable, `None` if absent."""
    found = view(key)
    if found is None:
        return None
    return {} if is_unread(view, key, parse) else parse(found[0]).record


def _project_alone(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a record that stays after its removal, so that no other project reuses the id."""
    return {key: record[key] for key in ("project",) if key in record}


def _refuse_taken(subject: str, last: Mapping[str, object] | None, terms: Terms) -> None:
    if last is not None and not in_scope(last, terms.scope):
        raise AlreadyExists(f"the id {subject} is taken", hint="use another id")


def _refuse_other_project(
    kind: str, subject: str, record: Mapping[str, object], terms: Terms
) -> None:
    """Refuse a new record of another project; the stored record does not matter here."""
    if not in_scope(record, terms.scope):
        raise AccessDenied(
            f"{kind} {subject} is not of project {terms.scope}, to which this certificate is limited",
            hint=f"give it that project: --project {terms.scope}",
        )


def _refuse_other_revision(kind: str, subject: str, revision: int, terms: Terms) -> None:
    if terms.revision not in {None, revision}:
        raise RevisionOutdated(
            f"{kind} {subject} has revision {revision}, not {terms.revision}",
            hint=f"read it again: imdsproxy --fleet URL {kind} show {subject}",
        )


def _removed_by(view: View, key: str, terms: Terms) -> int | None:
    """Return the revision of a removal that this request wrote."""
    found = view(key)
    if found is None or not terms.request:
        return None
    if is_unread(view, key, layout.parse_network):
        return None
    stored = layout.parse_network(found[0])
    is_done = stored.request == terms.request and in_scope(stored.record, terms.scope)
    return found[1] if is_done else None


def no_such(kind: str, subject: str) -> NotFound:
    """Return the error for an unknown network or instance."""
    return NotFound(f"the fleet has no {kind} {subject}", hint=f"imdsproxy --fleet URL {kind} list")


def _readable(
    parse: Callable[[bytes], _T], value: bytes, what: str, hint: str = "write all of it again"
) -> _T:
    try:
        return parse(value)
    except codec.Unreadable as error:
        raise SourceCorrupt(f"{what} is not readable in etcd: {error}", hint=hint) from error
