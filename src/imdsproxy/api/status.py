"""State of the controller and its processes: readiness, and the whole report of `status`."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from imdsproxy import __version__
from imdsproxy.api.answers import NotServed, Readiness
from imdsproxy.controller.audit import AuditReport
from imdsproxy.controller.controller import Controller
from imdsproxy.documents.dialects.ec2 import list_warnings
from imdsproxy.errors import DataplaneError, Problem
from imdsproxy.haproxy.master import WorkerEnded
from imdsproxy.haproxy.process import ReloadReport
from imdsproxy.haproxy.rules import limits
from imdsproxy.haproxy.rules.runtime import Processes
from imdsproxy.haproxy.unix_listener.listener import UnixListenerReport
from imdsproxy.host.state import Effect
from imdsproxy.model.inventory import Report
from imdsproxy.model.observation import Conflict, SourceName
from imdsproxy.network.endpoints import Foreign
from imdsproxy.network.listeners.endpoints import owners_of
from imdsproxy.nova.upstream import NovaEndpointReport
from imdsproxy.reconcile.progress import Step

_SHOWN: Final = 20
_WORTH_A_LOOK: Final = 10
"""An instance that uses less than this fraction (1/10) of its limit is not listed: most of 10,000 guests use less."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source of records.

    Attributes:
        in_sync: The source has reported all its records.
        stale_s: Seconds since the source stopped answering, 0 while it answers; its last records stay in force.
        problems: Every record that the source refuses now.
    """

    name: SourceName
    in_sync: bool
    networks: int = 0
    instances: int = 0
    stale_s: float = 0.0
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class HaproxyReport:
    """The data plane; `None` for values that are unknown (HAProxy is not started or does not answer)."""

    version: str | None = None
    master: int | None = None
    worker: int | None = None
    old_workers: tuple[int, ...] = ()
    reloads: int = 0
    last_reload: ReloadReport | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class DocumentsReport:
    """The document server's processes, the parent first.

    Attributes:
        needed: False if the settings disable the document server; then it does not run.
    """

    pids: tuple[int, ...] = ()
    problem: str = ""
    needed: bool = True


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The last plan: its operations, its reasons, and its failures (which are retried)."""

    at: float
    operations: int
    reasons: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MacsReport:
    """Guests' MACs and the filters that check them.

    Attributes:
        mac_filters: Networks with a MAC filter.
        refused: Networks that should have a MAC filter and cannot: guests with a MAC in their records get no answer.
        pairs: Addresses that a MAC filter lets through with one MAC, or with any.
        learned: Addresses under which guests are known by their MAC alone.
        mismatches: Requests from an instance's address with another MAC since the controller started, by network; the
            twenty networks with most.
        forged_claims: Packets of ARP and ND that claim a pair's address for another MAC since the network's filter was
            created, by network; the twenty networks with most. They harm no guest.
        claimed: Addresses claimed in the last ten minutes, and the MACs that claimed them; the first twenty.
    """

    mac_filters: int = 0
    refused: int = 0
    pairs: int = 0
    learned: int = 0
    mismatches: Mapping[str, int] = field(default_factory=dict)
    forged_claims: Mapping[str, int] = field(default_factory=dict)
    claimed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetReport:
    """State of the fleet on this host.

    Attributes:
        hub: URL of the hub that this host follows; empty for none.
        age_s: Seconds since a followed hub last knew the state of the fleet.
        revision: All items up to this revision are in force, except items in `failing`.
        items: Number of items in force.
        held: Items that are still served although the fleet's store lacks them or has an older version.
        failing: Items whose newest version is not in force, with reasons.
        skew_s: Seconds by which the hub's clock is ahead of this host's.
        certificate_end: Unix time when this host's certificate ends; `None` if another program renews the certificate.
        serves_for_s: Seconds for which instances are still served without a hub; 0 if guests get 503, `None` for no
            limit.
    """

    hub: str
    age_s: float
    revision: int
    items: int
    held: tuple[str, ...] = ()
    failing: Mapping[str, str] = field(default_factory=dict)
    skew_s: float = 0.0
    certificate_end: float | None = None
    serves_for_s: float | None = None


@dataclass(frozen=True, slots=True)
class StatusReport:
    """State of the daemon at one moment.

    Attributes:
        started_at: Unix time of the controller's start, in seconds.
        serving: Networks that are served as configured.
        problems: Problems that belong to no source, network or instance.
        unix_listener: `None` if the unix listener is disabled.
        warnings: Names in records that documents change or lack; twenty at most, then how many more.
        foreign: Other programs that listen at a network's address and get no request; twenty at most, then how many
            more. Programs that get requests are in `not_served`.
        unmatched_policies: Policy settings for a network, project or instance that no source reports.
        busiest: Instances that are limited now, then the busiest others; ten at most.
        audit: `None` if there is no audit log.
        fleet: `None` if this host belongs to no fleet.
        progress: Long work in progress.
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
    progress: tuple[Step, ...] = ()


def report_readiness(controller: Controller) -> Readiness:
    """Return whether sources are in sync, the last plan is applied, HAProxy answers and all networks are served."""
    reports = controller.inventory.reports.items()
    reasons = [f"source {name} is not in sync" for name, one in reports if not one.in_sync]
    if controller.haproxy.processes is None:
        reasons.append("HAProxy does not run")
    elif not controller.watchdog.answering:
        reasons.append("HAProxy does not answer a probe")
    reasons += map(str, controller.own_problems())
    degraded = (*_list_degraded(controller), *map(str, controller.unnoticed_problems()))
    if controller.holder.settings.metrics.degraded == "not-ready":
        reasons += degraded
    return Readiness(not reasons, tuple(reasons), degraded)


def _list_degraded(controller: Controller) -> list[str]:
    """Return a line for each of the first twenty networks that are not served, and the number of the others."""
    found = [NotServed.of(one) for one in controller.listeners.degraded()]
    lines = [
        f"network {one.network}: {one.reason} ({one.code})" + (f"; {one.hint}" if one.hint else "")
        for one in found[:_SHOWN]
    ]
    more = len({one.network for one in found[_SHOWN:]})
    return [*lines, f"and {more} more networks: imdsproxy status"] if more else lines


def _list_idle(foreign: Iterable[Foreign]) -> tuple[str, ...]:
    """Return a line for each program that listens beside HAProxy and gets no request."""
    found = dict.fromkeys(
        f"network {one.network}: {owners_of([one.socket])} listens on {one.socket.address} port {one.socket.port}"
        for one in foreign
        if one.effect is Effect.YIELDS
    )
    lines, more = list(found)[:_SHOWN], len(found) - _SHOWN
    return (*lines, f"and {more} more") if more > 0 else tuple(lines)


async def report_status(controller: Controller) -> StatusReport:
    inventory, listeners, records = controller.inventory, controller.listeners, controller.records
    companion, plan = controller.companion, listeners.report
    await controller.nova_watch.refresh()
    await controller.forged_claims.refresh()
    return StatusReport(
        version=__version__,
        controller=os.getpid(),
        started_at=controller.started_at,
        uptime_s=controller.clock.monotonic() - controller.started,
        readiness=report_readiness(controller),
        networks=len(inventory.networks) + len(inventory.contradictory),
        serving=listeners.serving,
        instances=len(inventory.instances),
        addresses=inventory.address_count,
        not_served=tuple(map(NotServed.of, listeners.degraded())),
        sources=tuple(_report_source(controller, *report) for report in inventory.reports.items()),
        conflicts=inventory.conflicts(),
        problems=(*controller.own_problems(), *controller.unnoticed_problems()),
        haproxy=_report_haproxy(controller),
        documents=DocumentsReport(
            companion.read().pids, _reason(controller.documents_problem()), companion.needed
        ),
        last_plan=PlanReport(
            plan.at, plan.operations, plan.reasons, tuple(map(str, plan.problems)), plan.seconds
        ),
        nova=controller.nova_watch.endpoints,
        unix_listener=listeners.unix.report(),
        macs=report_macs(controller),
        warnings=list_warnings(
            each for found in records.compiler.warnings.values() for each in found
        ),
        foreign=_list_idle(plan.foreign),
        unmatched_policies=controller.policy_store.find_unmatched(inventory),
        busiest=await find_busiest(controller),
        audit=controller.audit.report(),
        fleet=report_fleet(controller),
        progress=records.progress.steps,
    )


async def find_busiest(controller: Controller) -> tuple[limits.Asker, ...]:
    """Return the instances that are limited or busy now, by the worker's counters; none while HAProxy cannot answer."""
    allowed, haproxy = controller.holder.settings.limits, controller.haproxy
    if not allowed.enabled or (worker := haproxy.worker) is None:
        return ()
    now = controller.clock.now().timestamp()
    most = limits.most_in_window(allowed.requests_per_s, allowed.burst)
    try:
        own = await haproxy.master.send(worker, f"show table {limits.POLICY_COUNTERS}")
        wanted = (
            f"data.gpc0_rate ge {max(1, most // _WORTH_A_LOOK)}",
            f"data.conn_cur ge {max(2, allowed.connections // _WORTH_A_LOOK)}",
            # A policy's limits can be lower than these thresholds.
            *(f"key {key}" for key in limits.refused_lately(own, now)),
        )
        commands = (f"show table {limits.COUNTERS} {each}" for each in wanted)
        usual = [await haproxy.master.send(worker, command) for command in commands]
    except (DataplaneError, WorkerEnded):
        # The watchdog handles the failure, and the same report shows HAProxy's state.
        return ()
    table, connections = "\n".join(usual), allowed.connections
    return tuple(limits.busiest(table, own, requests=most, connections=connections, now=now))


def report_fleet(controller: Controller) -> FleetReport | None:
    """Return the state of the fleet on this host; `None` if this host belongs to no fleet."""
    source = controller.sources.fleet
    if source is None:
        return None
    return FleetReport(
        source.hub or "",
        source.age_s,
        source.acknowledged,
        len(source.known.items),
        tuple(sorted(source.known.held)),
        source.failing,
        source.skew_s,
        source.certificate_end,
        source.serves_for_s,
    )


def report_macs(controller: Controller) -> MacsReport:
    filters, learned = controller.mac_filters, controller.records.learned.values()
    claims = controller.forged_claims
    return MacsReport(
        mac_filters=len(filters.plan.filters),
        refused=len(filters.refused),
        pairs=filters.pair_count,
        learned=sum(entry.mac is not None for entry in learned),
        mismatches=dict(controller.resolver.mismatched.most_common(_SHOWN)),
        forged_claims=dict((+Counter(claims.counts)).most_common(_SHOWN)),
        claimed=claims.lines()[:_SHOWN],
    )


def _report_source(controller: Controller, name: str, report: Report) -> SourceReport:
    """Report a source with its refused records, and its ports in networks that no source has."""
    sources = controller.sources
    source = next(each for each in sources.all if each.name == name)
    ports = [port for port in controller.inventory.stranded() if port.source == name]
    stranded = [source.explain_stranded(port) for port in ports]
    asked, fleet = sources.look_up, sources.fleet
    # Other sources are in sync only while they can be read.
    stale_s = asked.queries.stale_s if asked is not None and asked is source else 0.0
    if fleet is not None and fleet is source and not fleet.in_sync:
        stale_s = fleet.age_s
    networks, instances = len(report.networks), len(report.instances)
    problems = (*report.problems, *stranded)
    return SourceReport(name, report.in_sync, networks, instances, stale_s, problems)


def _report_haproxy(controller: Controller) -> HaproxyReport:
    haproxy = controller.haproxy
    processes = haproxy.processes or Processes(0, None)
    return HaproxyReport(
        controller.haproxy_version,
        processes.master or None,
        processes.worker,
        processes.draining,
        processes.reloads,
        haproxy.last_reload,
        _reason(controller.watchdog.failure),
    )


def _reason(problem: Problem | None) -> str:
    return "" if problem is None else problem.reason
