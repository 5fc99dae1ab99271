"""Plans for moves, overrides, policies and grants, and for the acceptance of a restore. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from imdsproxy.errors import (
    AccessDenied,
    Problem,
    RecordConflict,
    RequestRefused,
    SourceRefused,
)
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import attempt
from imdsproxy.fleet.layout import (
    HostId,
    Meta,
    View,
    parse_policy,
)
from imdsproxy.fleet.restores import MOST_AHEAD, read_suspicion
from imdsproxy.hub.store.etcd_messages import unchanged
from imdsproxy.hub.store.scopes import (
    in_scope,
    only_own,
    owned_or_unread,
    read_grant,
    read_owned,
    read_scope,
    unknown_hosts,
)
from imdsproxy.hub.store.transactions import (
    Draft,
    Terms,
    Transaction,
    is_unread,
    last_record,
    no_such,
    read_network,
    read_override,
    readable,
    refuse_other_revision,
)
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records.grant import EVERY_HOST, GRANT, NO_GRANT, Grant
from imdsproxy.model.records.schema import render_path


def plan_hosts(
    view: View,
    instance: InstanceId,
    choose: Callable[[tuple[HostId, ...]], tuple[HostId, ...]],
    terms: Terms,
) -> Transaction:
    """Place an instance on other hosts without changing its record.

    `choose` returns the new hosts for the present ones. Raises its errors, and the errors of `plan_put`.
    """
    view = only_own(view, terms.scope)
    draft = Draft(view, terms)
    known = read_owned(view, instance, terms.scope)
    if known is None:
        raise no_such("instance", instance)
    stored, revision = known
    hosts = choose(stored.hosts)
    draft.hosts, draft.revision = {*stored.hosts, *hosts}, revision
    if hosts == stored.hosts:
        return draft.finish()
    refuse_other_revision("instance", instance, revision, terms)
    scope = read_scope(view, terms.scope)
    if problems := unknown_hosts(view, hosts, stored.hosts, ("hosts",), scope):
        raise SourceRefused("the fleet refuses the hosts", problems=problems)
    key = layout.instance_key(instance)
    draft.hold(key)
    moved = replace(stored, hosts=hosts, request=terms.request, left=stored.leaves(hosts))
    draft.puts[key] = layout.render_instance(moved)
    return draft.finish()


def choose_move(
    instance: InstanceId, to: HostId | None, *, finish: bool, cancel: bool
) -> Callable[[tuple[HostId, ...]], tuple[HostId, ...]]:
    """Return a function from an instance's hosts to its hosts after one step of a move.

    Without `finish` or `cancel` the instance comes to the host `to`. To finish (the guest has arrived) or to cancel
    (the guest stays), `to` may be omitted while the instance is on two hosts. A step may be repeated: the first answer
    may have been lost.
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
                    hint=f"to move the instance back: imdsproxy instance move {instance} --to HOST",
                )
            return stays
        if finish:
            if target not in hosts:
                raise RecordConflict(
                    f"instance {instance} is not on host {target} yet",
                    hint=f"run `imdsproxy instance move {instance} --to {target}`",
                )
            return (target,)
        if target in hosts:
            return hosts
        if moving:
            raise RecordConflict(
                f"instance {instance} is on its way from {hosts[0]} to {hosts[-1]}",
                hint="finish or cancel that move",
            )
        return (*hosts, target)

    return choose


def choose_departure(
    instance: InstanceId, host: HostId, *, cancel: bool
) -> Callable[[tuple[HostId, ...]], tuple[HostId, ...]]:
    """Return a function from an instance's hosts to its hosts after a host reports the end of a migration.

    With `cancel` the migration to this host has failed, otherwise the guest has left this host. A host can remove only
    itself, and only if another host serves the instance. So the report of a captured host changes nothing for guests of
    other hosts, and the error for an instance of others is that for an unknown instance.
    """

    def choose(hosts: tuple[HostId, ...]) -> tuple[HostId, ...]:
        if host not in hosts:
            raise no_such("instance", instance)
        others = tuple(one for one in hosts if one != host)
        stays = cancel and hosts[-1] != host
        return hosts if stays or not others else others

    return choose


def plan_override(
    view: View,
    instance: InstanceId,
    change: Callable[[OperatorOverride], OperatorOverride],
    terms: Terms,
) -> tuple[Transaction, int]:
    """Change the operator override of an instance; also return its new epoch.

    A removed instance keeps its override, so that a new instance with the same id does not accept its tokens. Raises
    `NotFound`, and the errors of `plan_put`.
    """
    view = only_own(view, terms.scope)
    draft = Draft(view, terms)
    key, known = layout.override_key(instance), owned_or_unread(view, instance, terms)
    found, there = view(key), layout.instance_key(instance)
    gone = last_record(view, there) or {}
    unread = is_unread(view, there)
    if known is None and ((found is None and not unread) or not in_scope(gone, terms.scope)):
        raise no_such("instance", instance)
    new = change(read_override(view, key))
    if known is not None:
        draft.hosts.update(known[0].hosts)
    draft.hold(key)
    draft.puts[key] = layout.render_override(new)
    return draft.finish(), new.epoch


def read_policy(view: View, place: str) -> tuple[Mapping[str, Any], int]:
    """Return the rules of a scope and their revision; no rules and revision 0 if it never had any."""
    found = view(layout.POLICIES + place)
    if found is None:
        return {}, 0
    hint = f"`imdsproxy policy clear {place.replace('/', ' ')}` clears it"
    return readable(parse_policy, found[0], f"the policy of {place}", hint).rules, found[1]


def plan_policy(
    view: View,
    place: str,
    change: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    terms: Terms,
) -> Transaction:
    """Change the rules of a scope; see `Writes.put_policy`."""
    draft = Draft(view, terms)
    scope, _, subject = place.partition("/")
    if terms.scope is not None and (scope, subject) != ("project", terms.scope):
        raise AccessDenied(f"the policy of {place} does not belong to project {terms.scope}")
    if scope == "host" and (problems := unknown_hosts(view, [subject], (), ("host",), None)):
        raise SourceRefused("the fleet refuses the policy", problems=problems)
    unread = is_unread(view, layout.POLICIES + place) and not change({})
    # Unreadable rules can only be cleared: a change of one rule must not lose the others.
    old, revision = ({}, 0) if unread else read_policy(view, place)
    new = {} if unread else change(old)
    draft.revision = revision
    refuse_other_revision("policy", place, revision, terms)
    if new != old or unread:
        draft.hold(layout.POLICIES + place)
        draft.puts[layout.POLICIES + place] = codec.encode(dict(new))
    return draft.finish()


def plan_grant(
    view: View, project: str, change: Callable[[Grant], Grant], terms: Terms
) -> Transaction:
    """Change what a project's operators may use; raise the errors of `plan_put` and of `change`."""
    draft = Draft(view, terms)
    key = layout.grant_key(project)
    # An unreadable grant allows nothing, and the write replaces it.
    unread = is_unread(view, key)
    old, revision = (NO_GRANT, 0) if unread else read_grant(view, project)
    refuse_other_revision("grant", project, revision, terms)
    new, draft.revision = change(old), revision
    hosts = [one for one in new.hosts if one != EVERY_HOST]
    problems = unknown_hosts(view, hosts, old.hosts, ("hosts",), None) if hosts else []
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
    acceptances, and hosts refuse an incarnation below their own. The fleet's metadata are written as `known` if etcd
    lost them. Raises `RequestRefused` if no restore is suspected.
    """
    meta, found, suspicion = view(layout.META), view(layout.SUSPECT), attempt(read_suspicion, view)
    if found is None or suspicion is None:
        raise RequestRefused(
            "no restored backup is suspected", hint="`imdsproxy fleet status` shows a suspicion"
        )
    now = known if meta is None else readable(layout.parse_meta, meta[0], "the fleet")
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
