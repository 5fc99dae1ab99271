"""The state of the controller and of what it looks after: readiness, and everything that `status` reports."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from imdsproxy import __version__
from imdsproxy.admin.record_reports import LeftOut, report_left_out
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.app.audit import Audit
from imdsproxy.app.companion import Companion, DocumentProbe
from imdsproxy.app.policy_store import PolicyStore
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.app.watchdog import HaproxyWatchdog
from imdsproxy.config.changes import SettingsHolder
from imdsproxy.core.documents.ec2 import list_warnings
from imdsproxy.core.haproxy.limits import (
    COUNTERS,
    POLICY_COUNTERS,
    Asker,
    busiest,
    most_in_window,
    refused_lately,
)
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import NetworkId
from imdsproxy.core.observation import Conflict, SourceName
from imdsproxy.core.timing import Step
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import DataplaneError, Problem
from imdsproxy.host.clock import Clock
from imdsproxy.listeners.loop import ListenerLoop
from imdsproxy.nova.upstream import NovaEndpointReport, NovaUpstream, NovaWatch
from imdsproxy.sources.api import Source

_MISMATCHES_SHOWN: Final = 20
_NETWORKS_SHOWN: Final = 20
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
class ReloadReport:
    """A reload of HAProxy that has ended.

    Attributes:
        at: Unix time, in seconds.
        reason: Why it was asked for, as `network-added`.
        result: HAProxy's own words where it failed, else empty.
    """

    number: int
    at: float
    reason: str
    ok: bool
    result: str = ""
    took_s: float = 0.0


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
    """

    gates: int = 0
    refused: int = 0
    pairs: int = 0
    learned: int = 0
    mismatches: Mapping[str, int] = field(default_factory=dict)


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
class Readiness:
    """Whether guests get what the sources say.

    Attributes:
        reasons: Why not, a line each.
        degraded: Networks that are configured and not served, then what is wrong and no guest notices; a line each.
    """

    ready: bool
    reasons: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()


def list_degraded(networks: Iterable[LeftOut]) -> list[str]:
    """A line for each network that is not served, up to twenty; the others are counted."""
    found = list(networks)
    lines = [
        f"network {one.network}: {one.reason} ({one.code})" + (f"; {one.hint}" if one.hint else "")
        for one in found[:_NETWORKS_SHOWN]
    ]
    more = len({one.network for one in found[_NETWORKS_SHOWN:]})
    return [*lines, f"and {more} more networks: imdsproxy status"] if more else lines


@dataclass(frozen=True, slots=True)
class StatusReport:
    """Everything at one moment.

    Attributes:
        started_at: Unix time of the controller's start, in seconds.
        serving: Networks that are served as configured.
        problems: What is wrong and belongs to no source, network or instance.
        unix_listener: `None` where it is off.
        warnings: Names in records that documents change or lack; twenty at most, then how many more.
        policy_for_nobody: Where settings speak of a network, project or instance that no source tells of.
        busiest: Who is kept to its limits now, and then who asks for most; ten at most.
        audit: `None` where there is none.
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
    policy_for_nobody: tuple[str, ...] = ()
    busiest: tuple[Asker, ...] = ()
    audit: AuditReport | None = None
    progress: tuple[Step, ...] = ()


@dataclass(slots=True)
class StatusService:
    """Reads the controller's parts.

    Args:
        started_at: When this controller started, Unix time.
        started: The same by the monotonic clock.
        haproxy_version: Of the program that is installed.
        mismatched: Requests with an address of one and the MAC of another, by network.
    """

    settings: SettingsHolder
    clock: Clock
    started_at: float
    started: float
    inventory: Inventory
    sources: Sequence[Source]
    records: RecordLoop
    listeners: ListenerLoop
    haproxy: Haproxy
    haproxy_version: str
    watchdog: HaproxyWatchdog
    mac_filters: MacFilters
    mismatched: Counter[NetworkId]
    nova: NovaUpstream
    nova_watch: NovaWatch
    companion: Companion
    probe: DocumentProbe
    policy_store: PolicyStore
    audit: Audit

    def readiness(self) -> Readiness:
        """In sync, last plan applied, a probe through HAProxy answered, and all networks served; else why not."""
        reasons = [
            f"source {name} is not in sync"
            for name, in_sync in self.inventory.sources.items()
            if not in_sync
        ]
        if self.haproxy.processes is None:
            reasons.append("HAProxy does not run")
        elif not self.watchdog.answering:
            reasons.append("HAProxy does not answer a probe")
        reasons += [str(problem) for problem in self.own_problems()]
        degraded = list_degraded(map(report_left_out, self.listeners.degraded()))
        degraded += [str(problem) for problem in self._unnoticed()]
        if self.settings.settings.metrics.degraded == "not-ready":
            reasons += degraded
        return Readiness(ready=not reasons, reasons=tuple(reasons), degraded=tuple(degraded))

    async def report(self) -> StatusReport:
        """Everything at one moment."""
        report = self.listeners.report
        await self.nova_watch.refresh()
        return StatusReport(
            version=__version__,
            controller=os.getpid(),
            started_at=self.started_at,
            uptime_s=self.clock.monotonic() - self.started,
            readiness=self.readiness(),
            networks=len(self.inventory.networks) + len(self.inventory.contradictory),
            serving=self.listeners.serving,
            instances=len(self.inventory.instances),
            addresses=self.inventory.address_count,
            left_out=tuple(map(report_left_out, self.listeners.degraded())),
            sources=tuple(
                SourceReport(
                    name,
                    in_sync,
                    *self.inventory.record_counts(name),
                    problems=self._source_problems(name),
                )
                for name, in_sync in self.inventory.sources.items()
            ),
            conflicts=self.inventory.conflicts(),
            problems=self.own_problems() + self._unnoticed(),
            haproxy=self._haproxy(),
            documents=DocumentsReport(
                self.companion.read().pids,
                "" if (problem := self.documents_problem()) is None else problem.reason,
                self.companion.needed,
            ),
            last_plan=PlanReport(
                at=report.at,
                operations=report.operations,
                reasons=report.reasons,
                failed=tuple(str(problem) for problem in report.problems),
                took_s=report.seconds,
            ),
            nova=self.nova_watch.endpoints,
            unix_listener=self.unix_listener(),
            macs=self.macs(),
            warnings=list_warnings(
                one for found in self.records.compiler.warnings.values() for one in found
            ),
            policy_for_nobody=self.policy_store.for_nobody(self.inventory),
            busiest=await self._busiest(),
            audit=self._audit(),
            progress=self.records.progress.steps,
        )

    async def _busiest(self) -> tuple[Asker, ...]:
        """Instances that are limited now, as HAProxy's worker counts them; none while HAProxy cannot be asked."""
        limits, processes = self.settings.settings.limits, self.haproxy.processes
        if not limits.enabled or processes is None or processes.worker is None:
            return ()
        most = most_in_window(limits.requests_per_s, limits.burst)
        filters = (
            f"data.gpc0_rate ge {max(1, most // _WORTH_A_LOOK)}",
            f"data.conn_cur ge {max(2, limits.connections // _WORTH_A_LOOK)}",
        )
        now = self.clock.now().timestamp()
        try:
            worker = processes.worker
            own = await self.haproxy.master.send(worker, f"show table {POLICY_COUNTERS}")
            # Limits of a policy may be as small as one likes.
            keys = (f"key {one}" for one in refused_lately(own, now))
            usual = [
                await self.haproxy.master.send(worker, f"show table {COUNTERS} {one}")
                for one in (*filters, *keys)
            ]
        except (DataplaneError, WorkerEnded):
            # The watchdog handles that, and the same report has HAProxy's state.
            return ()
        found = busiest(
            "\n".join(usual), own, requests=most, connections=limits.connections, now=now
        )
        return tuple(found)

    def _unnoticed(self) -> tuple[Problem, ...]:
        """What is wrong and no guest notices."""
        audit = () if (problem := self.audit.problem) is None else (problem,)
        return (*audit, *self.settings.problems)

    def _audit(self) -> AuditReport | None:
        settings, problem = self.audit.settings(), self.audit.problem
        if not settings.one_in:
            return None
        return AuditReport(
            mode=settings.mode,
            destination=settings.destination,
            written=self.audit.written,
            left_out=self.audit.left_out,
            problem="" if problem is None else problem.reason,
        )

    def macs(self) -> MacsReport:
        """What is made of guests' MACs."""
        return MacsReport(
            gates=len(self.mac_filters.plan.filters),
            refused=len(self.mac_filters.refused),
            pairs=self.mac_filters.pair_count,
            learned=sum(entry.mac is not None for entry in self.records.learned.values()),
            mismatches=dict(self.mismatched.most_common(_MISMATCHES_SHOWN)),
        )

    def _source_problems(self, name: str) -> tuple[Problem, ...]:
        """The records that a source refuses, and its ports in networks that no source has."""
        found = list(self.inventory.problems_of(name))
        source = next(one for one in self.sources if one.name == name)
        for stranded in self.inventory.stranded():
            if stranded.source != name:
                continue
            origin = source.origin_of_port(stranded.instance, stranded.number)
            found.append(
                stranded.problem()
                if origin is None
                else stranded.problem(field=origin.field, file=origin.file, line=origin.line)
            )
        return tuple(found)

    def own_problems(self) -> tuple[Problem, ...]:
        """What is wrong and belongs to no source, network or instance."""
        found = list(self.unapplied())
        found += [] if self.haproxy.full is None else [self.haproxy.full]
        keys = self.policy_store.keys
        found += [] if keys.failure is None else [keys.failure]
        if self.records.compiler.revisions and not self.companion.needed:
            found.append(_unserved(len(self.records.compiler.revisions)))
        found += self.nova.problems
        found += self.nova_watch.problems
        return tuple(found)

    def documents_problem(self) -> Problem | None:
        """Why guests get no documents."""
        return self.companion.failure or self.probe.problem

    def unapplied(self) -> tuple[Problem, ...]:
        """What keeps a change from guests."""
        records, listeners = self.records.failure, self.listeners.failure
        parts = (records, listeners, self.watchdog.failure, self.documents_problem())
        found = list(self.records.compiler.failures.values())
        found += [problem for problem in parts if problem is not None]
        return (*found, *self.listeners.report.problems)

    def unix_listener(self) -> UnixListenerReport | None:
        """The socket for Neutron's proxies; `None` where it is off."""
        unix = self.listeners.unix
        if not unix.settings().enabled:
            return None
        bind = unix.bind
        return UnixListenerReport(
            path=str(unix.settings().path),
            serving=unix.serving,
            mode="" if bind is None else bind.mode,
            user=None if bind is None else bind.user,
            group=None if bind is None else bind.group,
            problem="" if unix.problem is None else unix.problem.reason,
            taken_over=unix.taken_over,
            taken_from=unix.taken_from,
        )

    def _haproxy(self) -> HaproxyReport:
        processes = self.haproxy.processes
        last = self.haproxy.last_reload
        return HaproxyReport(
            version=self.haproxy_version,
            master=None if processes is None else processes.master,
            worker=None if processes is None else processes.worker,
            old_workers=() if processes is None else processes.draining,
            reloads=0 if processes is None else processes.reloads,
            last_reload=None
            if last is None
            else ReloadReport(
                number=last.number,
                at=last.at,
                reason=last.reason,
                ok=last.result in {"started", "reloaded"},
                result=last.message,
                took_s=last.seconds,
            ),
            problem="" if self.watchdog.failure is None else self.watchdog.failure.reason,
        )


def _unserved(count: int) -> Problem:
    return Problem(
        "documents.enabled",
        f"it is off, and {count} instances have documents of ours: their guests get 503",
        "switch it on, or give the records `upstream: nova`",
    )
