"""What the controller counts for Prometheus.

Every metric is a method of `Metrics` (`admin.exposition`). No label has values that guests or operators choose freely,
except `network`, whose number of series is bounded (see `NETWORK_SUM`). HAProxy's own exporter has connections,
queues and bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from shutil import disk_usage
from typing import Annotated, Final, Literal, TypeAlias, TypeVar, get_args

from imdsproxy import __version__
from imdsproxy.admin import status
from imdsproxy.admin.answers import Readiness
from imdsproxy.admin.exposition import By, Count, Exposed, Gauge, Times
from imdsproxy.controller.controller import Controller
from imdsproxy.core.haproxy.frontends import AGENTS
from imdsproxy.core.haproxy.runtime import WorkerTotals, parse_count
from imdsproxy.core.hoststate import Effect
from imdsproxy.core.identity import Denial
from imdsproxy.core.timing import Durations
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import DataplaneError
from imdsproxy.serving.resolver import FOUND
from imdsproxy.sources.neutron.queries import QueryResult
from imdsproxy.sources.neutron.source import LookUpResult, NeutronSource

NETWORK_SUM: Final = "*"
"""The `network` label of the one sum that stands for all, where there are too many for each."""

_COUNTED: Final = ("stot", "dreq", "ereq")
TRAFFIC_COLUMNS: Final = frozenset({"pxname", "svname", "type", *_COUNTED})
"""What `count_traffic` reads of `show stat`."""

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
            # The watchdog restarts it; these counters come back with it.
            return
        self.traffic.add(worker, count_traffic(rows))
        self.limited = sum(one.limited for one in await status.find_busiest(self.one))

    def readiness(self) -> Readiness:
        """Whether guests get what the sources say, as /readyz reports it."""
        return status.report_readiness(self.one)

    def _by_network(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """Each network's own count, or with more than `network_series` of them their sum.

        A network without any has 0: of a counter that begins with its first event, Prometheus sees no increase.
        """
        found = {**dict.fromkeys(map(str, self.one.inventory.networks), 0), **counts}
        few = len(found) <= self.one.holder.settings.metrics.network_series
        return found if few else {NETWORK_SUM: sum(counts.values())}

    def _disks(self) -> Mapping[str, tuple[int, int]]:
        """Free bytes and size by directory; none of one that was removed."""
        places = {"runtime": self.one.layout.runtime, "state": self.one.layout.state}
        found = {name: disk_usage(path) for name, path in places.items() if path.exists()}
        return {name: (one.free, one.total) for name, one in found.items()}

    def _guests(self, column: str) -> Mapping[str, int]:
        """One column of the traffic, by network."""
        totals, kind = self.traffic.totals.items(), (_GUESTS[0], column)
        return self._by_network({key[1]: count for key, count in totals if key[::2] == kind})

    def _agents(self, column: str) -> int:
        """The same of Neutron's proxies, all together."""
        return self.traffic.totals[AGENTS, AGENTS, column]

    def _neutron(self, read: Callable[[NeutronSource], _Figure]) -> _Figure | None:
        """What a figure of that source is; `None` without it."""
        source = self.one.sources.look_up
        return None if source is None else read(source)

    def build_info(self) -> Annotated[By, "gauge", "version"]:
        """Always 1; the label says which version runs."""
        return {__version__: 1}

    def ready(self) -> Gauge:
        """1 while guests get what the sources say; /readyz has the reasons for a 0."""
        return self.readiness().ready

    def start_time_seconds(self) -> Gauge:
        """Unix time of the controller's start."""
        return self.one.started_at

    def clock_seconds(self) -> Gauge:
        """Unix time by this host's clock. Session tokens and the end of a boot go by it: compare it with another."""
        return self.one.clock.now().timestamp()

    def disk_free_bytes(self) -> Annotated[By, "gauge", "directory"]:
        """Bytes that can be written to the file systems of `paths.runtime_dir` and `paths.state_dir`."""
        return {name: free for name, (free, _) in self._disks().items()}

    def disk_size_bytes(self) -> Annotated[By, "gauge", "directory"]:
        """The sizes of these file systems."""
        return {name: size for name, (_, size) in self._disks().items()}

    def settings_refused(self) -> Gauge:
        """1 while the last reload of the settings files was refused: those before stay in force."""
        return bool(self.one.holder.problems)

    def networks_serving(self) -> Gauge:
        """Networks that are served as configured."""
        return self.one.listeners.serving

    def networks_left_out(self) -> Annotated[By, "gauge", "code"]:
        """Networks that are configured and not served now, by the code of the reason."""
        degraded = {(one.network, one.code.value) for one in self.one.listeners.degraded()}
        return Counter(code for _, code in degraded)

    def foreign_listeners(self) -> Annotated[By, "gauge", "effect"]:
        """Sockets of other programs at networks' addresses and port, by effect: `blocks` (ours cannot listen),
        `shares` (guests get both answers), `yields` (guests get ours). `status` and the log name them.
        """
        foreign = self.one.listeners.report.foreign
        return {
            effect.value: len({one.socket for one in foreign if one.effect is effect})
            for effect in Effect
        }

    def instances(self) -> Gauge:
        """Instances known."""
        return len(self.one.inventory.instances)

    def addresses(self) -> Gauge:
        """Addresses of guests known to HAProxy."""
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
        """Problems of the source now: records that are refused, and what keeps the source itself from being read."""
        return {name: len(one.problems) for name, one in self.one.inventory.reports.items()}

    def haproxy_up(self) -> Gauge:
        """1 while HAProxy's worker answers."""
        return self.one.watchdog.answering and self.one.haproxy.processes is not None

    def haproxy_old_workers(self) -> Gauge:
        """Workers from before a reload that still have connections."""
        processes = self.one.haproxy.processes
        return 0 if processes is None else len(processes.draining)

    def haproxy_reloads(self) -> Annotated[By, "counter", "result"]:
        """Reloads of HAProxy by result: ok or failed."""
        return self.one.haproxy.reload_counts

    def haproxy_reload_seconds(self) -> Annotated[Durations, "histogram"]:
        """Time from ordering a start or a reload of HAProxy until the new worker serves, of those that succeeded."""
        return self.one.haproxy.reload_durations

    def haproxy_commands(self) -> Annotated[By, "counter", "result"]:
        """Runtime API commands by result: ok or failed."""
        return self.one.haproxy.master.commands

    def process_restarts(self) -> Annotated[By, "counter", "process"]:
        """Processes started again because they died or hung, by process: haproxy, or documents with its workers."""
        one = self.one
        return {"documents": one.companion.restarts, "haproxy": one.watchdog.restarts}

    def documents_processes(self) -> Gauge:
        """Workers of the document server that run; no series where the settings switch it off."""
        companion = self.one.companion
        return len(companion.read().workers) if companion.needed else None

    def plan_seconds(self) -> Annotated[Durations, "histogram"]:
        """Time that applying a plan took."""
        return self.one.listeners.durations

    def plan_operations(self) -> Annotated[By, "counter", "result"]:
        """Operations of plans by result: ok or failed (failed ones are tried again)."""
        return self.one.host.operations

    def convergence_seconds(self) -> Annotated[Durations, "histogram"]:
        """Time from a source's observation until every worker of HAProxy has confirmed it."""
        return self.one.records.rounds

    def resolver_requests(self) -> Annotated[By, "counter", "outcome"]:
        """Requests of unknown addresses by outcome: found, unknown, unavailable, conflict, over-limit or gone (the
        guest left).
        """
        return {one: self.one.resolver.outcomes[one] for one in (FOUND, *Denial)}

    def resolver_seconds(self) -> Annotated[Durations, "histogram"]:
        """Time from the request of an unknown address until its guest was found, without the answer itself. A request
        that is held until a source reports the guest counts with that time.
        """
        return self.one.resolver.durations

    def resolver_held(self) -> Gauge:
        """Requests of unknown addresses that are held now."""
        return self.one.resolver.held

    def network_connections(self) -> Annotated[By, "counter", "network"]:
        """Guests' connections by network; one series "*" for all above metrics.network_series."""
        return self._guests("stot")

    def network_denied(self) -> Annotated[By, "counter", "network"]:
        """Guests' requests that were refused, by network as above."""
        return self._guests("dreq")

    def network_malformed(self) -> Annotated[By, "counter", "network"]:
        """Guests' requests that were no proper HTTP, by network as above."""
        return self._guests("ereq")

    def limited_guests(self) -> Gauge:
        """Instances that are refused requests or connections because they are over their limits, and networks whose
        unknown guests are; up to ten are counted, every ten seconds. `status` names them.
        """
        return self.limited

    def mac_mismatches(self) -> Annotated[By, "counter", "network"]:
        """Requests that got 403 because the address goes with another MAC, by network as above."""
        found = self.one.resolver.mismatched.items()
        return self._by_network({str(network): count for network, count in found})

    def forged_claims(self) -> Annotated[By, "counter", "network"]:
        """Packets of ARP and ND that claim an address whose record has another MAC, by network as above."""
        return self._by_network(self.one.forged_claims.counts)

    def metadata_no_token(self) -> Annotated[By, "counter", "network"]:
        """Reads of EC2's tree, or of one that requires tokens, without a session token and not refused for it, by
        network as above: each, or an estimate by one in 20, or none, as `tokens.count_reads` says. It goes on over
        restarts of the controller.
        """
        return self._counted_reads("read")

    def metadata_no_token_rejected(self) -> Annotated[By, "counter", "network"]:
        """Reads that were refused because a session token is required, each of them, by network as above."""
        return self._counted_reads("refused")

    def _counted_reads(self, which: Literal["read", "refused"]) -> Mapping[str, int] | None:
        """Nothing until those of the controllers before are known: they would count as new ones."""
        counting = self.one.counting
        return self._by_network(getattr(counting.ledger, which)) if counting.recalled else None

    def learned_addresses(self) -> Gauge:
        """Addresses that guests are known by because the neighbour table has their MAC there."""
        return status.report_macs(self.one).learned

    def pairs(self) -> Gauge:
        """Addresses that the kernel lets through to HAProxy's maps with one MAC only, or with any."""
        return status.report_macs(self.one).pairs

    def gates(self) -> Annotated[By, "gauge", "state"]:
        """Networks in which the kernel looks at guests' MACs: open, or refused where it should and cannot."""
        macs = status.report_macs(self.one)
        return {"open": macs.gates, "refused": macs.refused}

    def unix_listener_serving(self) -> Gauge:
        """1 while HAProxy's socket is at unix_listener.path; no series where that is off."""
        return None if (unix := status.report_unix_listener(self.one)) is None else unix.serving

    def unix_listener_taken_over(self) -> Count:
        """Times that unix_listener.path was taken from a process that lives; it grows whenever that takes it back."""
        return self.one.listeners.unix.taken_over

    def unix_listener_connections(self) -> Count:
        """Connections of Neutron's proxies, all networks together."""
        return self._agents("stot")

    def unix_listener_denied(self) -> Count:
        """Requests of theirs that were refused: without exactly one network or router and one address."""
        return self._agents("dreq")

    def unix_listener_malformed(self) -> Count:
        """Requests of theirs that were no proper HTTP."""
        return self._agents("ereq")

    def audit_lines(self) -> Count:
        """Lines of the audit log that were written."""
        return self.one.audit.written

    def audit_left_out(self) -> Count:
        """Requests that have no line in the audit log, because HAProxy's ring or the journal had no room."""
        return self.one.audit.left_out

    def audit_failing(self) -> Gauge:
        """1 while the audit log cannot be written; `imdsproxy status` says why. Guests are served."""
        audit = self.one.audit
        return audit.problem is not None if audit.settings().one_in else None

    def nova_endpoint_up(self) -> Annotated[By, "gauge", "endpoint_set", "endpoint"]:
        """1 while HAProxy takes the endpoint of Nova for one that answers."""
        return {(one.endpoint_set, one.endpoint): one.up for one in self.one.nova_watch.endpoints}

    def nova_endpoint_failures(self) -> Annotated[By, "counter", "endpoint_set", "endpoint"]:
        """Connections to the endpoint of Nova that failed, and requests that it did not answer in time or in full."""
        endpoints = self.one.nova_watch.endpoints
        return {(one.endpoint_set, one.endpoint): one.failures for one in endpoints}

    def nova_refused(self) -> Annotated[By, "counter", "endpoint_set"]:
        """Answers 403 of Nova, by endpoint set: it refuses our signature, most likely for another secret."""
        return {**dict.fromkeys(self.one.nova.names(), 0), **self.one.nova_watch.refused.totals}

    def _fleet(self, read: Callable[[status.FleetReport], _Figure]) -> _Figure | None:
        """A figure of the fleet; `None` where this host is of none."""
        report = status.report_fleet(self.one)
        return None if report is None else read(report)

    def fleet_connected(self) -> Gauge:
        """1 while a hub of the fleet is followed. Without one, guests are served on from disk."""
        return self._fleet(lambda one: bool(one.hub))

    def fleet_age_seconds(self) -> Gauge:
        """Seconds since a hub that was followed knew the state of the fleet."""
        return self._fleet(lambda one: one.age_s)

    def fleet_expired(self) -> Gauge:
        """1 while guests of the fleet's instances get 503, because sources.fleet.serve_without_hubs_s is over."""
        return self._fleet(lambda one: one.serves_for_s == 0)

    def fleet_revision(self) -> Gauge:
        """Revision of the fleet's store up to which everything for this host is in force, but for what fails."""
        return self._fleet(lambda one: one.revision)

    def fleet_failing(self) -> Gauge:
        """Items of the fleet that are not in force in their newest version; `imdsproxy status` has the reasons."""
        return self._fleet(lambda one: len(one.failing))

    def fleet_held(self) -> Gauge:
        """Items that are served on although the fleet's store lacks them, as after a restore from a backup."""
        return self._fleet(lambda one: len(one.held))

    def fleet_clock_difference_seconds(self) -> Gauge:
        """Seconds by which the hub's clock is ahead of this host's."""
        return self._fleet(lambda one: one.skew_s)

    def fleet_certificate_end_seconds(self) -> Gauge:
        """Unix time at which this host's certificate in the fleet ends; it is renewed ten days before. No series where
        another program renews it.
        """
        return self._fleet(lambda one: one.certificate_end)

    def neutron_queries(self) -> Annotated[By, "counter", "result"]:
        """Queries to Neutron by result: ok, failed or timeout."""
        return self._neutron(lambda one: {**_NO_QUERIES, **one.queries.results})

    def neutron_look_ups(self) -> Annotated[By, "counter", "result"]:
        """Look-ups of guests that HAProxy did not know, by result: found, known (without a query), missing,
        negative-cached (missing, without a query), coalesced (waited for another's query), ambiguous or
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
        """Seconds since Neutron answered last, while it does not; else 0. What is known is served on."""
        return self._neutron(lambda one: one.queries.stale_s)

    def neutron_backoff_seconds(self) -> Gauge:
        """Seconds until Neutron is asked again, while it does not answer; else 0."""
        return self._neutron(lambda one: one.queries.backoff_s)


def count_traffic(rows: Iterable[Mapping[str, str]]) -> Counter[_TrafficKey]:
    """Connections, refused and malformed requests by frontend, bind name and column of one worker's `show stat`."""
    found: Counter[_TrafficKey] = Counter()
    for row in rows:
        frontend = _GUESTS[0] if row.get("pxname") in _GUESTS else row.get("pxname")
        if frontend in {_GUESTS[0], AGENTS} and row.get("type") == _LISTENER:
            for column in _COUNTED:
                found[frontend, row["svname"], column] += parse_count(row, column)
    return found
