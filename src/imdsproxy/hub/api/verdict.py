"""Verdict on a fleet from its status: reasons that stop changes, and reasons for a degraded state. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from imdsproxy.api.answers import Readiness
from imdsproxy.hub.store.etcd_messages import MemberSilent, MemberStatus

if TYPE_CHECKING:
    from imdsproxy.hub.api.operations import FleetStatus


def judge_fleet(
    status: FleetStatus, members: Sequence[MemberStatus | MemberSilent], hub: Iterable[str]
) -> Readiness:
    """Judge whether changes can be made and come into force.

    Args:
        hub: Reasons why the reporting hub serves no host, or does not follow etcd.
    """
    reasons = (*hub, *_stopped(status, members))
    return Readiness(not reasons, reasons, tuple(_degraded(status)))


def _stopped(status: FleetStatus, members: Sequence[MemberStatus | MemberSilent]) -> Iterator[str]:
    silent = sum(isinstance(one, MemberSilent) for one in members)
    if (lost := status.problems.get("etcd")) is not None:
        yield f"etcd has {lost}"
    elif members and 2 * silent >= len(members):
        yield f"etcd has no quorum: {silent} of {len(members)} members do not answer"
    if any(isinstance(one, MemberStatus) and one.full for one in members):
        yield "etcd is full: nothing can be written"
    if status.writes_stopped:
        yield f"a restore is suspected: {status.suspect}"


def _degraded(status: FleetStatus) -> Iterator[str]:
    for hub in status.hubs:
        if hub["absent"]:
            yield f"hub {hub['name']} is absent"
        elif not hub["answers"]:
            yield f"hub {hub['name']} does not answer"
    for member in status.etcd:
        yield from (f"{member['url']} {problem}" for problem in member["problems"])
    if status.absent:
        yield f"{len(status.absent)} of {status.hosts} hosts are absent"
    if status.behind:
        yield f"not everything is in force on {len(status.behind)} hosts"
    if status.renewing:
        yield f"{len(status.renewing)} hosts do not know all CAs of the fleet"
    if status.token_keys is not None:
        yield f"the newest token keys cannot be read: {status.token_keys}"
    if status.suspect is not None and not status.writes_stopped:
        yield f"a restore is suspected: {status.suspect}"
    yield from (f"{key}: {why}" for key, why in status.problems.items() if key != "etcd")
