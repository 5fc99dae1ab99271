"""Prometheus metrics of the controller.

Every metric is a method of `Metrics` (`api.exposition`). No label has values that guests or operators choose freely,
except `network`, whose number of series is bounded (see `NETWORK_SUM`). HAProxy's own exporter has connections, queues
and bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from shutil import disk_usage
from typing import Annotated, Final, Literal, TypeAlias, TypeVar, get_args

from imdsproxy import __version__
from imdsproxy.api import status
from imdsproxy.api.answers import Readiness
from imdsproxy.api.exposition import By, Count, Exposed, Gauge, Times
from imdsproxy.controller.controller import Controller
from imdsproxy.documents.resolver import FOUND
from imdsproxy.errors import DataplaneError
from imdsproxy.haproxy.master import WorkerEnded
from imdsproxy.haproxy.rules.frontends import AGENTS
from imdsproxy.haproxy.rules.runtime import WorkerTotals, parse_count
from imdsproxy.host.state import Effect
from imdsproxy.model.identity import Denial
from imdsproxy.reconcile.progress import Durations
from imdsproxy.sources.neutron.queries import QueryResult
from imdsproxy.sources.neutron.source import LookUpResult, NeutronSource

NETWORK_SUM: Final = "*"
"""Value of the label `network` for the sum of all networks, used when there are too many for a series each."""

_COUNTED: Final = ("stot", "dreq", "ereq")
TRAFFIC_COLUMNS: Final = frozenset({"pxname", "svname", "type", *_COUNTED})
"""Columns of `show stat` that `count_traffic` reads."""

_GUESTS: Final = ("guests", "unverified")
_LISTENER: Final = "3"

_TrafficKey: TypeAlias = tuple[str, str, str]
_Figure = TypeVar("_Figure")
_NO_QUERIES: Final = dict.fromkeys(get_args(QueryResult), 0)
_NO_LOOK_UPS: Final = dict.fromkeys(get_args(LookUpResult), 0)


@dataclass(eq=False)
class Metrics(Exposed, prefix="imdsproxy_"):
    """Reads every metric when Prometheus asks for it."""

    one: Controller
    traffic: WorkerTotals[_TrafficKey] = field(default_factory=WorkerTotals)
    limited: int = 0

    async def refresh(self) -> None:
        """Read HAProxy's counters once."""
        await self.one.nova_watch.refresh()
        await self.one.counting.refresh()
        await self.one.forged_claims.refresh()
        haproxy = self.one.haproxy
        if (worker := haproxy.worker) is None:
            return
        try:
            rows = await haproxy.master.read_stat(worker, TRAFFIC_COLUMNS)
        except (DataplaneError, WorkerEnded):
            # The watchdog restarts HAProxy; the next refresh reads its counters again.
            return
        self.traffic.add(worker, count_traffic(rows))
        self.limited = sum(one.limited for one in await status.find_busiest(self.one))

    def readiness(self) -> Readiness:
        """Return whether guests get what the sources report, as /readyz does."""
        return status.report_readiness(self.one)

    def _by_network(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the count of each network, or only their sum if there are more than `network_series` networks.

        A network without a count has 0: Prometheus sees no increase in a counter that begins with its first event.
        """
        found = {**dict.fromkeys(map(str, self.one.inventory.networks), 0), **counts}
        few = len(found) <= self.one.holder.settings.metrics.network_series
        return found if few else {NETWORK_SUM: sum(counts.values())}

    def _disks(self) -> Mapping[str, tuple[int, int]]:
        """Return free bytes and size by directory, without removed directories."""
        places = {"runtime": self.one.layout.runtime, "state": self.one.layout.state}
        found = {name: disk_usage(path) for name, path in places.items() if path.exists()}
        return {name: (one.free, one.total) for name, one in found.items()}

    def _guests(self, column: str) -> Mapping[str, int]:
        """Return one column of the guests' traffic, by network."""
        totals, kind = self.traffic.totals.items(), (_GUESTS[0], column)
        return self._by_network({key[1]: count for key, count in totals if key[::2] == kind})

    def _agents(self, column: str) -> int:
        """Return one column of the traffic of Neutron's proxies, summed."""
        return self.traffic.totals[AGENTS, AGENTS, column]

    def _neutron(self, read: Callable[[NeutronSource], _Figure]) -> _Figure | None:
        """Read a figure of the Neutron source; `None` without that source."""
        source = self.one.sources.look_up
        return None if source is None else read(source)

    def build_info(self) -> Annotated[By, "gauge", "version"]:
        """Always 1; the label has the running version."""
        return {__version__: 1}

    def ready(self) -> Gauge:
        """1 while guests get what the sources report; /readyz has the reasons for a 0."""
        return self.readiness().ready

    def start_time_seconds(self) -> Gauge:
        """Unix time of the controller's start."""
        return self.one.started_at

    def clock_seconds(self) -> Gauge:
        """Unix time by this host's clock, which decides when session tokens and boots end: compare it with another
        clock.
        """
        return self.one.clock.now().timestamp()

    def disk_free_bytes(self) -> Annotated[By, "gauge", "directory"]:
        """Bytes that can be written to the file systems of `paths.runtime_dir` and `paths.state_dir`."""
        return {name: free for name, (free, _) in self._disks().items()}

    def disk_size_bytes(self) -> Annotated[By, "gauge", "directory"]:
        """The sizes of the file systems of `paths.runtime_dir` and `paths.state_dir`."""
        return {name: size for name, (_, size) in self._disks().items()}

    def settings_refused(self) -> Gauge:
        """1 while the last reload of the settings files is refused and the settings before it stay in force."""
        return bool(self.one.holder.problems)

    def networks_serving(self) -> Gauge:
        """Networks that are served as configured."""
        return self.one.listeners.serving

    def networks_not_served(self) -> Annotated[By, "gauge", "code"]:
        """Configured networks that are not served now, by the code of the reason."""
        degraded = {(one.network, one.code.value) for one in self.one.listeners.degraded()}
        return Counter(code for _, code in degraded)

    def foreign_listeners(self) -> Annotated[By, "gauge", "effect"]:
        """Sockets of other programs at networks' addresses and port, by effect: `blocks` (HAProxy cannot listen),
        `shares` (both answer guests), `yields` (HAProxy alone answers guests). `status` and the log name them.
        """
        foreign = self.one.listeners.report.foreign
        return {
            effect.value: len({one.socket for one in foreign if one.effect is effect})
            for effect in Effect
        }

    def instances(self) -> Gauge:
        """Known instances."""
        return len(self.one.inventory.instances)

    def addresses(self) -> Gauge:
        """Guests' addresses that HAProxy knows."""
        return self.one.inventory.address_count

    def conflicts(self) -> Gauge:
        """Ids and addresses that several records claim; their guests get 503."""
        return self.one.inventory.conflict_count

    def source_in_sync(self) -> Annotated[By, "gauge", "source"]:
        """1 while the source has reported all its records."""
        return {name: report.in_sync for name, report in self.one.inventory.reports.items()}

    def source_records(self) -> Annotated[By, "gauge", "source", "kind"]:
        """Records in force from the source, by kind: network or instance."""
        reports = self.one.inventory.reports.items()
        return {
            (name, kind): len(records)
            for name, one in reports
            for kind, records in (("network", one.networks), ("instance", one.instances))
        }

    def source_refused_records(self) -> Annotated[By, "gauge", "source"]:
        """Current problems of the source: refused records, and reasons why the source cannot be read."""
        return {name: len(one.problems) for name, one in self.one.inventory.reports.items()}

    def haproxy_up(self) -> Gauge:
        """1 while HAProxy's worker answers."""
        return self.one.watchdog.answering and self.one.haproxy.processes is not None

    def haproxy_old_workers(self) -> Gauge:
        """Workers from before a reload that still have open connections."""
        processes = self.one.haproxy.processes
        return 0 if processes is None else len(processes.draining)

    def haproxy_reloads(self) -> Annotated[By, "counter", "result"]:
        """Reloads of HAProxy by result: ok or failed."""
        return self.one.haproxy.reload_counts

    def haproxy_reload_seconds(self) -> Annotated[Durations, "histogram"]:
        """Time from the order to start or reload HAProxy until the new worker serves; failures are not counted."""
        return self.one.haproxy.reload_durations

    def haproxy_commands(self) -> Annotated[By, "counter", "result"]:
        """Runtime API commands by result: ok or failed."""
        return self.one.haproxy.master.commands

    def process_restarts(self) -> Annotated[By, "counter", "process"]:
        """Restarts of processes that died or hung, by process: haproxy, or documents (the server and its workers)."""
        one = self.one
        return {"documents": one.companion.restarts, "haproxy": one.watchdog.restarts}

    def documents_processes(self) -> Gauge:
        """Running workers of the document server; no series if the settings disable the server."""
        companion = self.one.companion
        return len(companion.read().workers) if companion.needed else None

    def plan_seconds(self) -> Annotated[Durations, "histogram"]:
        """Time to apply a plan."""
        return self.one.listeners.durations

    def plan_operations(self) -> Annotated[By, "counter", "result"]:
        """Operations of plans by result: ok or failed (failed operations are retried)."""
        return self.one.host.operations

    def convergence_seconds(self) -> Annotated[Durations, "histogram"]:
        """Time from a source's observation until every worker of HAProxy has confirmed it."""
        return self.one.records.rounds

    def resolver_requests(self) -> Annotated[By, "counter", "outcome"]:
        """Requests from unknown addresses by outcome: found, unknown, unavailable, conflict, over-limit or gone (the
        guest left).
        """
        return {one: self.one.resolver.outcomes[one] for one in (FOUND, *Denial)}

    def resolver_seconds(self) -> Annotated[Durations, "histogram"]:
        """Time from a request of an unknown address until its guest was identified, without the answer itself. The time
        includes the wait of a request that is held until a source reports the guest.
        """
        return self.one.resolver.durations

    def resolver_held(self) -> Gauge:
        """Requests from unknown addresses that are held now."""
        return self.one.resolver.held

    def network_connections(self) -> Annotated[By, "counter", "network"]:
        """Guests' connections by network; one series "*" if there are more networks than metrics.network_series."""
        return self._guests("stot")

    def network_denied(self) -> Annotated[By, "counter", "network"]:
        """Refused requests of guests, by network as above."""
        return self._guests("dreq")

    def network_malformed(self) -> Annotated[By, "counter", "network"]:
        """Guests' requests that were not valid HTTP, by network as above."""
        return self._guests("ereq")

    def limited_guests(self) -> Gauge:
        """Instances that are over their limits and refused requests or connections, and networks whose unknown guests
        are; at most ten are counted, every ten seconds. `status` names them.
        """
        return self.limited

    def mac_mismatches(self) -> Annotated[By, "counter", "network"]:
        """Requests refused with 403 because the records have another MAC for the address, by network as above."""
        found = self.one.resolver.mismatched.items()
        return self._by_network({str(network): count for network, count in found})

    def forged_claims(self) -> Annotated[By, "counter", "network"]:
        """Packets of ARP and ND that claim an address whose record has another MAC, by network as above."""
        return self._by_network(self.one.forged_claims.counts)

    def metadata_no_token(self) -> Annotated[By, "counter", "network"]:
        """Reads of the EC2 tree, or of a tree that requires tokens, that had no session token and were not refused for
        that, by network as above: each read, an estimate from one read in 20, or none, by `tokens.count_reads`. The
        count continues over restarts of the controller.
        """
        return self._counted_reads("read")

    def metadata_no_token_rejected(self) -> Annotated[By, "counter", "network"]:
        """Reads refused because a session token is required, by network as above."""
        return self._counted_reads("refused")

    def _counted_reads(self, which: Literal["read", "refused"]) -> Mapping[str, int] | None:
        """Return nothing until earlier controllers' counts are loaded: Prometheus would take them for new reads."""
        counting = self.one.counting
        return self._by_network(getattr(counting.ledger, which)) if counting.recalled else None

    def learned_addresses(self) -> Gauge:
        """Addresses under which guests are known only because the neighbour table has their MAC there."""
        return status.report_macs(self.one).learned

    def pairs(self) -> Gauge:
        """Addresses that the MAC filter lets through to HAProxy's maps with one MAC only, or with any."""
        return status.report_macs(self.one).pairs

    def mac_filters(self) -> Annotated[By, "gauge", "state"]:
        """Networks with a MAC filter: open, or refused if the kernel should check MACs and cannot."""
        macs = status.report_macs(self.one)
        return {"open": macs.mac_filters, "refused": macs.refused}

    def unix_listener_serving(self) -> Gauge:
        """1 while HAProxy's socket is at unix_listener.path; no series if the unix listener is disabled."""
        return None if (unix := self.one.listeners.unix.report()) is None else unix.serving

    def unix_listener_taken_over(self) -> Count:
        """Times that HAProxy took unix_listener.path from a running process; grows each time that process takes it
        back.
        """
        return self.one.listeners.unix.taken_over

    def unix_listener_connections(self) -> Count:
        """Connections of Neutron's proxies, all networks together."""
        return self._agents("stot")

    def unix_listener_denied(self) -> Count:
        """Refused requests of Neutron's proxies: without exactly one network or router and one address."""
        return self._agents("dreq")

    def unix_listener_malformed(self) -> Count:
        """Requests of Neutron's proxies that were not valid HTTP."""
        return self._agents("ereq")

    def audit_lines(self) -> Count:
        """Lines written to the audit log."""
        return self.one.audit.written

    def audit_lines_lost(self) -> Count:
        """Requests without a line in the audit log, because HAProxy's ring or the journal had no room."""
        return self.one.audit.lost

    def audit_failing(self) -> Gauge:
        """1 while the audit log cannot be written; `imdsproxy status` has the reason. Guests are served."""
        return None if (audit := self.one.audit.report()) is None else bool(audit.problem)

    def nova_endpoint_up(self) -> Annotated[By, "gauge", "endpoint_set", "endpoint"]:
        """1 while HAProxy considers the endpoint of Nova up."""
        return {(one.endpoint_set, one.endpoint): one.up for one in self.one.nova_watch.endpoints}

    def nova_endpoint_failures(self) -> Annotated[By, "counter", "endpoint_set", "endpoint"]:
        """Failed connections to the endpoint of Nova, and requests without a timely and complete answer."""
        endpoints = self.one.nova_watch.endpoints
        return {(one.endpoint_set, one.endpoint): one.failures for one in endpoints}

    def nova_refused(self) -> Annotated[By, "counter", "endpoint_set"]:
        """Answers 403 from Nova, by endpoint set: Nova refuses the signature, most likely for another secret."""
        return {**dict.fromkeys(self.one.nova.names(), 0), **self.one.nova_watch.refused.totals}

    def _fleet(self, read: Callable[[status.FleetReport], _Figure]) -> _Figure | None:
        """Read a figure of the fleet; `None` if this host belongs to no fleet."""
        report = status.report_fleet(self.one)
        return None if report is None else read(report)

    def fleet_connected(self) -> Gauge:
        """1 while this host follows a hub of the fleet. Without a hub, guests are served from disk."""
        return self._fleet(lambda one: bool(one.hub))

    def fleet_age_seconds(self) -> Gauge:
        """Seconds since a followed hub last knew the state of the fleet."""
        return self._fleet(lambda one: one.age_s)

    def fleet_expired(self) -> Gauge:
        """1 while guests of the fleet's instances get 503, because sources.fleet.serve_without_hubs_s is over."""
        return self._fleet(lambda one: one.serves_for_s == 0)

    def fleet_revision(self) -> Gauge:
        """Revision of the fleet's store up to which all items for this host are in force, except failing items."""
        return self._fleet(lambda one: one.revision)

    def fleet_failing(self) -> Gauge:
        """Items of the fleet whose newest version is not in force; `imdsproxy status` has the reasons."""
        return self._fleet(lambda one: len(one.failing))

    def fleet_held(self) -> Gauge:
        """Items that this host still serves although the fleet's store lacks them, as after a restore from a backup."""
        return self._fleet(lambda one: len(one.held))

    def fleet_clock_difference_seconds(self) -> Gauge:
        """Seconds by which the hub's clock is ahead of this host's."""
        return self._fleet(lambda one: one.skew_s)

    def fleet_certificate_end_seconds(self) -> Gauge:
        """Unix time when this host's certificate in the fleet ends; the host renews it ten days before. No series if
        another program renews the certificate.
        """
        return self._fleet(lambda one: one.certificate_end)

    def neutron_queries(self) -> Annotated[By, "counter", "result"]:
        """Queries to Neutron by result: ok, failed or timeout."""
        return self._neutron(lambda one: {**_NO_QUERIES, **one.queries.results})

    def neutron_look_ups(self) -> Annotated[By, "counter", "result"]:
        """Look-ups of guests that HAProxy did not know, by result: found, known (without a query), missing,
        negative-cached (missing, without a query), coalesced (waited for another look-up's query), ambiguous or
        unavailable.
        """
        return self._neutron(lambda one: {**_NO_LOOK_UPS, **one.look_ups})

    def neutron_query_seconds(self) -> Times:
        """Time that Neutron took for the queries that it answered."""
        return self._neutron(lambda one: one.queries.durations)

    def neutron_ports(self) -> Gauge:
        """Neutron's ports that are known and kept up to date."""
        return self._neutron(lambda one: len(one.known.ports))

    def neutron_stale_seconds(self) -> Gauge:
        """Seconds since Neutron's last answer while Neutron does not answer, else 0. Known guests are still served."""
        return self._neutron(lambda one: one.queries.stale_s)

    def neutron_backoff_seconds(self) -> Gauge:
        """Seconds until the next query while Neutron does not answer, else 0."""
        return self._neutron(lambda one: one.queries.backoff_s)


def count_traffic(rows: Iterable[Mapping[str, str]]) -> Counter[_TrafficKey]:
    """Count a worker's connections, refused and malformed requests by frontend, bind name and `show stat` column."""
    found: Counter[_TrafficKey] = Counter()
    for row in rows:
        frontend = _GUESTS[0] if row.get("pxname") in _GUESTS else row.get("pxname")
        if frontend in {_GUESTS[0], AGENTS} and row.get("type") == _LISTENER:
            for column in _COUNTED:
                found[frontend, row["svname"], column] += parse_count(row, column)
    return found
