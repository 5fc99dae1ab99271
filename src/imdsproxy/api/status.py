"""State of the controller and its processes: readiness, and the whole report of `status`."""

import os
from dataclasses import dataclass, field
from typing import Any, Final

from imdsproxy import __version__
from imdsproxy.api.answers import NotServed, Readiness
from imdsproxy.controller.audit import AuditReport
from imdsproxy.controller.companion import DocumentsReport
from imdsproxy.controller.macs import MacsReport
from imdsproxy.controller.parts import Parts
from imdsproxy.controller.sources import SourceReport
from imdsproxy.controller.subjects import IdentityReport
from imdsproxy.controller.watchdog import HaproxyReport
from imdsproxy.errors import Problem
from imdsproxy.fleet.guests import FleetReport
from imdsproxy.haproxy.rules import limits
from imdsproxy.haproxy.unix_listener.listener import UnixListenerReport
from imdsproxy.model.observation import Conflict
from imdsproxy.network.listeners.loop import PlanReport
from imdsproxy.nova.upstream import NovaEndpointReport
from imdsproxy.reconcile.part import Impact, list_problems
from imdsproxy.reconcile.progress import Step

_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class StatusReport:
    """State of the daemon at one moment.

    Attributes:
        started_at: Unix time of the controller's start, in seconds.
        problems: Problems that belong to no source, network or instance.
        warnings: Names in records that documents change or lack; twenty at most, then how many more.
        foreign: Other programs that listen at a network's address and get no request; twenty at most, then how many
            more. Programs that get requests are in `not_served`.
        unmatched_policies: Policy settings for a network, project or instance that no source reports.
        busiest: Instances that are limited now, then the busiest others; ten at most.
        audit: `None` if there is no audit log.
        fleet: `None` if this host belongs to no fleet.
        identity: `None` if this host gives no identity tokens.
    """

    version: str
    controller: int
    started_at: float
    uptime_s: float
    readiness: Readiness
    networks: int
    serving: int
    instances: int
    addresses: int
    not_served: tuple[NotServed, ...] = ()
    sources: tuple[SourceReport, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    problems: tuple[Problem, ...] = ()
    haproxy: HaproxyReport = field(default_factory=HaproxyReport)
    documents: DocumentsReport = field(default_factory=DocumentsReport)
    last_plan: PlanReport | None = None
    nova: tuple[NovaEndpointReport, ...] = ()
    unix_listener: UnixListenerReport | None = None
    macs: MacsReport = field(default_factory=MacsReport)
    warnings: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    unmatched_policies: tuple[str, ...] = ()
    busiest: tuple[limits.Asker, ...] = ()
    audit: AuditReport | None = None
    fleet: FleetReport | None = None
    identity: IdentityReport | None = None
    progress: tuple[Step, ...] = ()


def report_readiness(parts: Parts) -> Readiness:
    """Return whether sources are in sync, the last plan is applied, HAProxy answers and all networks are served."""
    reports = parts.inventory.reports.items()
    reasons = [f"source {name} is not in sync" for name, one in reports if not one.in_sync]
    if parts.haproxy.processes is None:
        reasons.append("HAProxy does not run")
    elif not parts.watchdog.answering:
        reasons.append("HAProxy does not answer a probe")
    reasons += map(str, list_problems(parts.all(), Impact.DELAYS, Impact.HARMS))
    unnoticed = list_problems(parts.all(), Impact.UNNOTICED)
    degraded = (*_list_degraded(parts), *map(str, unnoticed))
    if parts.holder.settings.metrics.degraded == "not-ready":
        reasons += degraded
    return Readiness(not reasons, tuple(reasons), degraded)


def _list_degraded(parts: Parts) -> list[str]:
    """Return a line for each of the first twenty networks that are not served, and the number of the others."""
    found = [NotServed.of(one) for one in parts.listeners.degraded()]
    lines = [
        f"network {one.network}: {one.reason} ({one.code})" + (f"; {one.hint}" if one.hint else "")
        for one in found[:_SHOWN]
    ]
    more = len({one.network for one in found[_SHOWN:]})
    return [*lines, f"and {more} more networks: imdsproxy status"] if more else lines


async def report_status(parts: Parts) -> StatusReport:
    sections: dict[str, Any] = {}
    for part in parts.all():
        sections |= await part.report()
    return StatusReport(
        version=__version__,
        controller=os.getpid(),
        started_at=parts.started_at,
        uptime_s=parts.clock.monotonic() - parts.started,
        readiness=report_readiness(parts),
        not_served=tuple(map(NotServed.of, parts.listeners.degraded())),
        problems=list_problems(parts.all()),
        **sections,
    )
