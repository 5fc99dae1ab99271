"""The controller's figures for Prometheus, gathered when they are asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final, get_args

from imdsproxy import __version__
from imdsproxy.admin.snapshot import (
    MetricsSnapshot,
    NetworkTraffic,
    NeutronCounts,
    SourceFigures,
    Timing,
)
from imdsproxy.admin.status import StatusService
from imdsproxy.app.token_report import TokenCounting
from imdsproxy.core.haproxy.unix_listener import AGENTS
from imdsproxy.core.hoststate import Effect
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import DataplaneError
from imdsproxy.serving.resolver import Resolver
from imdsproxy.sources.neutron.look_ups import LookUpResult
from imdsproxy.sources.neutron.queries import QueryResult
from imdsproxy.sources.neutron.source import NeutronFigures, NeutronSource

__all__ = ["TRAFFIC_COLUMNS", "Figures", "TrafficCounter"]

TRAFFIC_COLUMNS: Final = frozenset({"pxname", "svname", "type", "stot", "dreq", "ereq"})
"""What `TrafficCounter` reads of `show stat`."""

# Series that begin at 0 let a rate be told from the first failure on.
_QUERY_RESULTS: Final[tuple[QueryResult, ...]] = get_args(QueryResult)
_LOOK_UP_RESULTS: Final[tuple[LookUpResult, ...]] = get_args(LookUpResult)


@dataclass(slots=True)
class TrafficCounter:
    """Adds up the counters of frontends' binds, which begin at 0 with each worker.

    Attributes:
        totals: By the bind's name.
    """

    frontends: tuple[str, ...] = ("guests", "unverified")
    totals: dict[str, NetworkTraffic] = field(default_factory=dict)
    _worker: int | None = None
    _base: dict[str, NetworkTraffic] = field(default_factory=dict)

    def add(self, worker: int, rows: list[dict[str, str]]) -> None:
        """Take in one worker's `show stat`."""
        if worker != self._worker:
            self._base = dict(self.totals)
            self._worker = worker
        now: dict[str, NetworkTraffic] = {}
        for row in rows:
            if row.get("pxname") in self.frontends and row.get("type") == "3":
                name = row["svname"]
                before = now.get(name, NetworkTraffic())
                now[name] = NetworkTraffic(
                    before.connections + _number(row, "stot"),
                    before.denied + _number(row, "dreq"),
                    before.malformed + _number(row, "ereq"),
                )
        for name, traffic in now.items():
            base = self._base.get(name, NetworkTraffic())
            self.totals[name] = NetworkTraffic(
                base.connections + traffic.connections,
                base.denied + traffic.denied,
                base.malformed + traffic.malformed,
            )


def _number(row: dict[str, str], name: str) -> int:
    text = row.get(name, "")
    return int(text) if text.isdigit() else 0


@dataclass(slots=True)
class Figures:
    """Everything that `/metrics` shows."""

    status: StatusService
    counting: TokenCounting
    resolver: Resolver
    neutron: NeutronSource | None = None
    traffic: TrafficCounter = field(default_factory=TrafficCounter)
    agents: TrafficCounter = field(default_factory=lambda: TrafficCounter((AGENTS,)))

    def _failures(self, source: str) -> int:
        if self.neutron is None or source != self.neutron.name:
            return 0
        queries = self.neutron.figures.queries
        return sum(number for result, number in queries.items() if result != "ok")

    async def refresh(self) -> None:
        """Read HAProxy's counters once."""
        await self.status.nova_watch.refresh()
        await self.counting.refresh()
        haproxy = self.status.haproxy
        processes = haproxy.processes
        if processes is None or processes.worker is None:
            return
        try:
            rows = await haproxy.master.read_stat(processes.worker, TRAFFIC_COLUMNS)
            self.traffic.add(processes.worker, rows)
            self.agents.add(processes.worker, rows)
        except (DataplaneError, WorkerEnded):
            # The guard watches over it; these figures come back with it.
            return

    def take(self) -> MetricsSnapshot:
        """What is so now."""
        status = self.status
        inventory = status.inventory
        counts = self.resolver.counts
        report = status.listeners.report
        processes = status.haproxy.processes
        degraded = {(one.network, one.code.value) for one in status.listeners.degraded()}
        unix, listener = status.unix_listener(), status.listeners.unix
        return MetricsSnapshot(
            version=__version__,
            ready=status.readiness().ready,
            started_at=status.started_at,
            networks_serving=status.listeners.serving,
            instances=len(inventory.instances),
            addresses=inventory.address_count,
            conflicts=inventory.conflict_count,
            left_out=Counter(code for _, code in degraded),
            foreign={
                effect.value: len({one.socket for one in report.foreign if one.effect is effect})
                for effect in Effect
            },
            sources={
                name: SourceFigures(
                    in_sync,
                    *inventory.record_counts(name),
                    refused_records=len(inventory.problems_of(name)),
                    failures=self._failures(name),
                )
                for name, in_sync in inventory.sources.items()
            },
            haproxy_up=status.guard.answering and processes is not None,
            haproxy_old_workers=0 if processes is None else len(processes.draining),
            reloads=status.haproxy.reload_counts,
            reload=Timing(status.haproxy.reload_counts.total(), status.haproxy.seconds_spent),
            restarts={
                "haproxy": status.guard.restarts,
                "documents": status.companion.restarts,
            },
            documents_up=max(0, len(status.companion.read().pids) - 1),
            plans=Timing(status.listeners.rounds, status.listeners.seconds),
            operations=status.listeners.operations,
            convergence=status.records.rounds,
            commands=status.haproxy.master.commands,
            resolver={
                "found": counts.found,
                "unknown": counts.not_found,
                "unavailable": counts.not_in_sync,
                "conflict": counts.contested,
                "over-limit": counts.over_limit,
                "mismatch": counts.mismatched.total(),
            },
            resolver_held=self.resolver.held,
            traffic=self.traffic.totals,
            mismatches={str(name): count for name, count in counts.mismatched.items()},
            learned=status.macs().learned,
            pairs=status.macs().pairs,
            gates=status.macs().gates,
            gates_refused=status.macs().refused,
            unix_serving=None if unix is None else unix.serving,
            unix_taken_over=0 if listener is None else listener.taken_over,
            unix_traffic=self.agents.totals.get(AGENTS, NetworkTraffic()),
            nova_failures={
                (one.endpoint_set, one.endpoint): one.failures
                for one in status.nova_watch.endpoints
            },
            nova_up={
                (one.endpoint_set, one.endpoint): one.up for one in status.nova_watch.endpoints
            },
            audit_lines=status.audit.written,
            audit_left_out=status.audit.left_out,
            audit_failing=(
                status.audit.problem is not None if status.audit.settings().one_in else None
            ),
            no_token=dict(self.counting.ledger.read),
            no_token_rejected=dict(self.counting.ledger.refused),
            nova_refused=status.nova_watch.refused.totals,
            settings_refused=bool(status.settings.problems),
            neutron=None if self.neutron is None else _neutron(self.neutron.figures),
        )


def _neutron(figures: NeutronFigures) -> NeutronCounts:
    return NeutronCounts(
        queries={result: figures.queries.get(result, 0) for result in _QUERY_RESULTS},
        look_ups={result: figures.look_ups.get(result, 0) for result in _LOOK_UP_RESULTS},
        ports=figures.ports,
        stale_s=figures.stale_s,
        backoff_s=figures.backoff_s,
    )
