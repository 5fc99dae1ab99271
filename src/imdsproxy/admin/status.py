"""The state of the controller and of what it looks after: readiness, and everything that `status` reports."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from imdsproxy import __version__
from imdsproxy.admin.answers import LeftOut, Readiness
from imdsproxy.controller.controller import Controller
from imdsproxy.core.documents.ec2 import list_warnings
from imdsproxy.core.endpoints import Foreign
from imdsproxy.core.haproxy import limits
from imdsproxy.core.haproxy.runtime import Processes
from imdsproxy.core.hoststate import Effect
from imdsproxy.core.inventory import Report
from imdsproxy.core.observation import Conflict, SourceName
from imdsproxy.core.timing import Step
from imdsproxy.dataplane.haproxy import ReloadReport
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import DataplaneError, Problem
from imdsproxy.listeners.endpoints import owners_of
from imdsproxy.nova.upstream import NovaEndpointReport

_SHOWN: Final = 20
_WORTH_A_LOOK: Final = 10
"""An instance that uses less than one part in so many of its limit is not listed: most of 10,000 guests do."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source of records.

    Attributes:
        in_sync: It has reported all its records.
        stale_s: Seconds for which it has not answered, 0 while it does; its last records stay.
        problems: Every record that it refuses now.
    """

    name: SourceName
    in_sync: bool
    networks: int = 0
    instances: int = 0
    stale_s: float = 0.0
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class HaproxyReport:
    """The data plane; `None` where it is not known (not started, or not answering)."""

    version: str | None = None
    master: int | None = None
    worker: int | None = None
    old_workers: tuple[int, ...] = ()
    reloads: int = 0
    last_reload: ReloadReport | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class DocumentsReport:
    """The document server's processes: the parent first.

    Attributes:
        needed: Off where the settings say so; then it does not run.
    """

    pids: tuple[int, ...] = ()
    problem: str = ""
    needed: bool = True


@dataclass(frozen=True, slots=True)
class UnixListenerReport:
    """The socket for Neutron's proxies, where it is enabled.

    Attributes:
        serving: HAProxy's socket is at the path.
        mode: Of the socket, as `0644`; empty where it is left out.
        user: Its owner's uid.
        group: Its group's gid.
        problem: Why it is left out.
        taken_over: How often the path was taken from a process that lives, since the controller started.
        taken_from: The process, the last time; empty for none.
    """

    path: str
    serving: bool
    mode: str = ""
    user: int | None = None
    group: int | None = None
    problem: str = ""
    taken_over: int = 0
    taken_from: str = ""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The last plan: what it did, why, and what of it failed (and is tried again)."""

    at: float
    operations: int
    reasons: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MacsReport:
    """What is made of guests' MACs.

    Attributes:
        gates: Networks where the kernel looks at them.
        refused: Networks where it should, and cannot: guests with a MAC in their records get no answer there.
        pairs: Addresses that are let through with a MAC, or with any.
        learned: Addresses that guests have by their MAC alone.
        mismatches: Requests with an address of one and the MAC of another since the controller started, by network;
            the twenty with the most.
        forged_claims: Packets of ARP and ND that say of an address with a pair that it is at another MAC, since the
            network's filter was created, by network; the twenty with the most. They harm no guest.
        claimed: Addresses claimed in the last ten minutes, and the MACs that claimed them; the first twenty.
    """

    gates: int = 0
    refused: int = 0
    pairs: int = 0
    learned: int = 0
    mismatches: Mapping[str, int] = field(default_factory=dict)
    forged_claims: Mapping[str, int] = field(default_factory=dict)
    claimed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The audit log.

    Attributes:
        mode: `sampled` or `all`.
        written: Lines since the controller started.
        left_out: Requests without a line since then, because HAProxy's ring or the journal had no room.
        problem: Why no lines are written now.
    """

    mode: str
    destination: str
    written: int = 0
    left_out: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class FleetReport:
    """What this host has of its fleet.

    Attributes:
        hub: URL of the one that is followed; empty for none.
        age_s: Seconds since a hub that was followed knew the state of the fleet.
        revision: All items up to it are in force, but for those in `failing`.
        items: How many are in force.
        held: Items that the fleet's store lacks, or has in an older version: they are served on.
        failing: Why items are not in force in their newest version.
        skew_s: By how much the hub's clock is ahead of this host's.
        certificate_end: When this host's certificate ends, Unix time; `None` where another program renews it.
        serves_for_s: Seconds for which instances are still served without a hub; 0 where guests get 503, `None` for
            no end.
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
    """Everything at one moment.

    Attributes:
        started_at: Unix time of the controller's start, in seconds.
        serving: Networks that are served as configured.
        problems: What is wrong and belongs to no source, network or instance.
        unix_listener: `None` where it is off.
        warnings: Names in records that documents change or lack; twenty at most, then how many more.
        foreign: Other programs that listen where guests of a network are answered, and get no request; twenty at most,
            then how many more. Those that do get some are in `left_out`.
        policy_for_nobody: Where settings speak of a network, project or instance that no source tells of.
        busiest: Who is kept to its limits now, and then who asks for most; ten at most.
        audit: `None` where there is none.
        fleet: `None` on a host of no fleet.
        progress: Long work that is under way.
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
    left_out: tuple[LeftOut, ...] = ()
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
    policy_for_nobody: tuple[str, ...] = ()
    busiest: tuple[limits.Asker, ...] = ()
    audit: AuditReport | None = None
    fleet: FleetReport | None = None
    progress: tuple[Step, ...] = ()


def report_readiness(controller: Controller) -> Readiness:
    """In sync, last plan applied, a probe through HAProxy answered, and all networks served; else why not."""
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
    """A line for each network that is not served, up to twenty; the others are counted."""
    found = [LeftOut.of(one) for one in controller.listeners.degraded()]
    lines = [
        f"network {one.network}: {one.reason} ({one.code})" + (f"; {one.hint}" if one.hint else "")
        for one in found[:_SHOWN]
    ]
    more = len({one.network for one in found[_SHOWN:]})
    return [*lines, f"and {more} more networks: imdsproxy status"] if more else lines


def _list_idle(foreign: Iterable[Foreign]) -> tuple[str, ...]:
    """A line for each program that listens beside HAProxy and gets no request."""
    found = dict.fromkeys(
        f"network {one.network}: {owners_of([one.socket])} listens on {one.socket.address} port {one.socket.port}"
        for one in foreign
        if one.effect is Effect.YIELDS
    )
    lines, more = list(found)[:_SHOWN], len(found) - _SHOWN
    return (*lines, f"and {more} more") if more > 0 else tuple(lines)


async def report_status(controller: Controller) -> StatusReport:
    """Everything at one moment."""
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
        left_out=tuple(map(LeftOut.of, listeners.degraded())),
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
        unix_listener=report_unix_listener(controller),
        macs=report_macs(controller),
        warnings=list_warnings(
            each for found in records.compiler.warnings.values() for each in found
        ),
        foreign=_list_idle(plan.foreign),
        policy_for_nobody=controller.policy_store.for_nobody(inventory),
        busiest=await find_busiest(controller),
        audit=_report_audit(controller),
        fleet=report_fleet(controller),
        progress=records.progress.steps,
    )


async def find_busiest(controller: Controller) -> tuple[limits.Asker, ...]:
    """Instances that are limited now, as HAProxy's worker counts them; none while HAProxy cannot be asked."""
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
            # Limits of a policy may be as small as one likes.
            *(f"key {key}" for key in limits.refused_lately(own, now)),
        )
        commands = (f"show table {limits.COUNTERS} {each}" for each in wanted)
        usual = [await haproxy.master.send(worker, command) for command in commands]
    except (DataplaneError, WorkerEnded):
        # The watchdog handles that, and the same report has HAProxy's state.
        return ()
    table, connections = "\n".join(usual), allowed.connections
    return tuple(limits.busiest(table, own, requests=most, connections=connections, now=now))


def _report_audit(controller: Controller) -> AuditReport | None:
    audit = controller.audit
    settings, problem = audit.settings(), _reason(audit.problem)
    if not settings.one_in:
        return None
    return AuditReport(settings.mode, settings.destination, audit.written, audit.left_out, problem)


def report_fleet(controller: Controller) -> FleetReport | None:
    """What this host has of its fleet; `None` where it is of none."""
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
    """What is made of guests' MACs."""
    filters, learned = controller.mac_filters, controller.records.learned.values()
    claims = controller.forged_claims
    return MacsReport(
        gates=len(filters.plan.filters),
        refused=len(filters.refused),
        pairs=filters.pair_count,
        learned=sum(entry.mac is not None for entry in learned),
        mismatches=dict(controller.resolver.mismatched.most_common(_SHOWN)),
        forged_claims=dict((+Counter(claims.counts)).most_common(_SHOWN)),
        claimed=claims.lines()[:_SHOWN],
    )


def _report_source(controller: Controller, name: str, report: Report) -> SourceReport:
    """A source with the records that it refuses, and its ports in networks that no source has."""
    sources = controller.sources
    source = next(each for each in sources.all if each.name == name)
    ports = [port for port in controller.inventory.stranded() if port.source == name]
    stranded = [source.explain_stranded(port) for port in ports]
    asked, fleet = sources.look_up, sources.fleet
    # Others are in sync only while they can be read.
    stale_s = asked.queries.stale_s if asked is not None and asked is source else 0.0
    if fleet is not None and fleet is source and not fleet.in_sync:
        stale_s = fleet.age_s
    networks, instances = len(report.networks), len(report.instances)
    problems = (*report.problems, *stranded)
    return SourceReport(name, report.in_sync, networks, instances, stale_s, problems)


def report_unix_listener(controller: Controller) -> UnixListenerReport | None:
    """The socket for Neutron's proxies; `None` where it is off."""
    unix = controller.listeners.unix
    settings, bind = unix.settings(), unix.bind
    if not settings.enabled:
        return None
    return UnixListenerReport(
        path=str(settings.path),
        serving=unix.serving,
        mode="" if bind is None else bind.mode,
        user=None if bind is None else bind.user,
        group=None if bind is None else bind.group,
        problem=_reason(unix.problem),
        taken_over=unix.taken_over,
        taken_from=unix.taken_from,
    )


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
