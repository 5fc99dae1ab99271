"""The state of the controller and of what it looks after: readiness, and everything that `status` reports."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final

from imdsproxy import __version__
from imdsproxy.admin import reports
from imdsproxy.admin.record_reports import LeftOut, report_left_out
from imdsproxy.controller.controller import Controller
from imdsproxy.core.documents.ec2 import list_warnings
from imdsproxy.core.haproxy import limits
from imdsproxy.core.haproxy.runtime import Processes
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import DataplaneError, Problem
from imdsproxy.nova.upstream import NovaWatch

_SHOWN: Final = 20
_WORTH_A_LOOK: Final = 10
"""An instance that uses less than one part in so many of its limit is not listed: most of 10,000 guests do."""


@dataclass(frozen=True, slots=True)
class Status:
    """Reads the controller's parts."""

    one: Controller
    nova: NovaWatch

    def readiness(self) -> reports.Readiness:
        """In sync, last plan applied, a probe through HAProxy answered, and all networks served; else why not."""
        one = self.one
        sources = one.inventory.sources.items()
        reasons = [f"source {name} is not in sync" for name, in_sync in sources if not in_sync]
        if one.haproxy.processes is None:
            reasons.append("HAProxy does not run")
        elif not one.watchdog.answering:
            reasons.append("HAProxy does not answer a probe")
        reasons += map(str, self.own_problems())
        degraded = list_degraded(map(report_left_out, one.listeners.degraded()))
        degraded += map(str, self._unnoticed())
        if one.holder.settings.metrics.degraded == "not-ready":
            reasons += degraded
        return reports.Readiness(not reasons, tuple(reasons), tuple(degraded))

    async def report(self) -> reports.StatusReport:
        """Everything at one moment."""
        one, inventory = self.one, self.one.inventory
        plan, warnings = one.listeners.report, one.records.compiler.warnings.values()
        await self.nova.refresh()
        return reports.StatusReport(
            version=__version__,
            controller=os.getpid(),
            started_at=one.started_at,
            uptime_s=one.clock.monotonic() - one.started,
            readiness=self.readiness(),
            networks=len(inventory.networks) + len(inventory.contradictory),
            serving=one.listeners.serving,
            instances=len(inventory.instances),
            addresses=inventory.address_count,
            left_out=tuple(map(report_left_out, one.listeners.degraded())),
            sources=tuple(self._source(*source) for source in inventory.sources.items()),
            conflicts=inventory.conflicts(),
            problems=self.own_problems() + self._unnoticed(),
            haproxy=self._haproxy(),
            documents=reports.DocumentsReport(
                one.companion.read().pids, _reason(self.documents_problem()), one.companion.needed
            ),
            last_plan=reports.PlanReport(
                plan.at, plan.operations, plan.reasons, tuple(map(str, plan.problems)), plan.seconds
            ),
            nova=self.nova.endpoints,
            unix_listener=self.unix_listener(),
            macs=self.macs(),
            warnings=list_warnings(each for found in warnings for each in found),
            policy_for_nobody=one.policy_store.for_nobody(inventory),
            busiest=await self._busiest(),
            audit=self._audit(),
            progress=one.records.progress.steps,
        )

    async def _busiest(self) -> tuple[limits.Asker, ...]:
        """Instances that are limited now, as HAProxy's worker counts them; none while HAProxy cannot be asked."""
        allowed, haproxy = self.one.holder.settings.limits, self.one.haproxy
        if not allowed.enabled or haproxy.processes is None or haproxy.processes.worker is None:
            return ()
        worker, now = haproxy.processes.worker, self.one.clock.now().timestamp()
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
        found = limits.busiest(
            "\n".join(usual), own, requests=most, connections=allowed.connections, now=now
        )
        return tuple(found)

    def _unnoticed(self) -> tuple[Problem, ...]:
        """What is wrong and no guest notices."""
        return (*_only(self.one.audit.problem), *self.one.holder.problems)

    def _audit(self) -> reports.AuditReport | None:
        audit = self.one.audit
        settings, problem = audit.settings(), _reason(audit.problem)
        if not settings.one_in:
            return None
        return reports.AuditReport(
            settings.mode, settings.destination, audit.written, audit.left_out, problem
        )

    def macs(self) -> reports.MacsReport:
        """What is made of guests' MACs."""
        filters, learned = self.one.mac_filters, self.one.records.learned.values()
        return reports.MacsReport(
            gates=len(filters.plan.filters),
            refused=len(filters.refused),
            pairs=filters.pair_count,
            learned=sum(entry.mac is not None for entry in learned),
            mismatches=dict(self.one.resolver.counts.mismatched.most_common(_SHOWN)),
        )

    def _source(self, name: str, in_sync: bool) -> reports.SourceReport:  # noqa: FBT001 - as the inventory has it
        """A source with the records that it refuses, and its ports in networks that no source has."""
        inventory, sources = self.one.inventory, self.one.sources
        source = next(each for each in sources.all if each.name == name)
        found = list(inventory.problems_of(name))
        for stranded in inventory.stranded():
            if stranded.source == name:
                origin = source.origin_of_port(stranded.instance, stranded.number)
                written = {} if origin is None else asdict(origin)
                found.append(stranded.problem(**written))
        asked = sources.look_up
        # Others are in sync only while they can be read.
        stale_s = asked.queries.stale_s if asked is not None and asked is source else 0.0
        counts = inventory.record_counts(name)
        return reports.SourceReport(name, in_sync, *counts, stale_s, tuple(found))

    def own_problems(self) -> tuple[Problem, ...]:
        """What is wrong and belongs to no source, network or instance."""
        one, compiled = self.one, len(self.one.records.compiler.revisions)
        unserved = Problem(
            "documents.enabled",
            f"it is off, and {compiled} instances have documents of ours: their guests get 503",
            "switch it on, or give the records `upstream: nova`",
        )
        return (
            *self.unapplied(),
            *_only(one.haproxy.full),
            *_only(one.policy_store.keys.failure),
            *([unserved] if compiled and not one.companion.needed else []),
            *one.nova.problems,
            *self.nova.problems,
        )

    def documents_problem(self) -> Problem | None:
        """Why guests get no documents."""
        return self.one.companion.failure or self.one.probe.problem

    def unapplied(self) -> tuple[Problem, ...]:
        """What keeps a change from guests."""
        one = self.one
        return (
            *one.records.compiler.failures.values(),
            *_only(one.records.failure),
            *_only(one.listeners.failure),
            *_only(one.watchdog.failure),
            *_only(self.documents_problem()),
            *one.listeners.report.problems,
        )

    def unix_listener(self) -> reports.UnixListenerReport | None:
        """The socket for Neutron's proxies; `None` where it is off."""
        unix = self.one.listeners.unix
        settings, bind = unix.settings(), unix.bind
        if not settings.enabled:
            return None
        return reports.UnixListenerReport(
            path=str(settings.path),
            serving=unix.serving,
            mode="" if bind is None else bind.mode,
            user=None if bind is None else bind.user,
            group=None if bind is None else bind.group,
            problem=_reason(unix.problem),
            taken_over=unix.taken_over,
            taken_from=unix.taken_from,
        )

    def _haproxy(self) -> reports.HaproxyReport:
        haproxy, problem = self.one.haproxy, _reason(self.one.watchdog.failure)
        processes, last = haproxy.processes or Processes(0, None), haproxy.last_reload
        reload = (
            None
            if last is None
            else reports.ReloadReport(
                last.number,
                last.at,
                last.reason,
                last.result in {"started", "reloaded"},
                last.message,
                last.seconds,
            )
        )
        return reports.HaproxyReport(
            self.one.haproxy_version,
            processes.master or None,
            processes.worker,
            processes.draining,
            processes.reloads,
            reload,
            problem,
        )


def list_degraded(networks: Iterable[LeftOut]) -> list[str]:
    """A line for each network that is not served, up to twenty; the others are counted."""
    found = list(networks)
    lines = [
        f"network {one.network}: {one.reason} ({one.code})" + (f"; {one.hint}" if one.hint else "")
        for one in found[:_SHOWN]
    ]
    more = len({one.network for one in found[_SHOWN:]})
    return [*lines, f"and {more} more networks: imdsproxy status"] if more else lines


def _only(problem: Problem | None) -> tuple[Problem, ...]:
    return () if problem is None else (problem,)


def _reason(problem: Problem | None) -> str:
    return "" if problem is None else problem.reason
