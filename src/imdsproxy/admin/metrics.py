"""What the controller counts for Prometheus: every metric's name, help and labels, and where its value comes from.

No label has values that guests or operators choose freely, except `network`, whose number of series is bounded (see
`NETWORK_SUM`). HAProxy's own exporter has connections, queues and bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from imdsproxy import __version__
from imdsproxy.admin.status import StatusService
from imdsproxy.app.token_report import TokenCounting
from imdsproxy.core.haproxy.runtime import WorkerTotals
from imdsproxy.core.haproxy.unix_listener import AGENTS
from imdsproxy.core.hoststate import Effect
from imdsproxy.core.identity import Denial
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import DataplaneError
from imdsproxy.nova.watch import NovaEndpointReport
from imdsproxy.serving.resolver import Resolver
from imdsproxy.sources.neutron.look_ups import LookUpResult
from imdsproxy.sources.neutron.queries import QueryResult
from imdsproxy.sources.neutron.source import NeutronFigures, NeutronSource

NETWORK_SUM: Final = "*"
"""The `network` label of the one sum that stands for all, where there are too many for each."""

TRAFFIC_COLUMNS: Final = frozenset({"pxname", "svname", "type", "stot", "dreq", "ereq"})
"""What `count_traffic` reads of `show stat`."""

_GUESTS: Final = ("guests", "unverified")
_LISTENER: Final = "3"

_Sample: TypeAlias = tuple[tuple[str, ...], float]
_TrafficKey: TypeAlias = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family.

    Attributes:
        name: As exposed, but for `_total`, `_bucket`, `_count` and `_sum`, which follow from `kind`.
        read: Label values and the value of each series; a summary gives its count, then its sum; a histogram its
            buckets, then its sum.
    """

    name: str
    kind: Literal["gauge", "counter", "summary", "histogram"]
    help: str
    read: Callable[[Metrics], Iterable[_Sample]]
    labels: tuple[str, ...] = ()

    @property
    def exposed(self) -> str:
        """The name that a query uses."""
        if self.kind == "histogram":
            return f"{self.name}_bucket, {self.name}_count, {self.name}_sum"
        if self.kind == "summary":
            return f"{self.name}_count, {self.name}_sum"
        return f"{self.name}_total" if self.kind == "counter" else self.name


@dataclass(eq=False)
class Metrics(Collector):
    """Reads every metric when Prometheus asks for it.

    Args:
        network_series: Networks up to which each has its own series.
    """

    status: StatusService
    counting: TokenCounting
    resolver: Resolver
    neutron: NeutronSource | None
    network_series: Callable[[], int]
    traffic: WorkerTotals[_TrafficKey] = field(default_factory=WorkerTotals)

    def __post_init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

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
        except (DataplaneError, WorkerEnded):
            # The watchdog restarts it; these counters come back with it.
            return
        self.traffic.add(processes.worker, count_traffic(rows))

    def expose(self, accept: str) -> tuple[str, bytes]:
        """Content type and text of all metrics, for the value of a request's `Accept`."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)

    def collect(self) -> Iterator[Family]:
        """Every family with the values of now."""
        for metric in METRICS:
            samples = list(metric.read(self))
            if metric.kind == "summary":
                (_, count), (_, total) = samples
                yield SummaryMetricFamily(
                    metric.name, metric.help, count_value=int(count), sum_value=total
                )
            elif metric.kind == "histogram":
                *buckets, (_, total) = samples
                counts = [(bound, count) for (bound,), count in buckets]
                yield HistogramMetricFamily(metric.name, metric.help, counts, total)
            else:
                make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                family = make(metric.name, metric.help, labels=metric.labels)
                for labels, value in samples:
                    family.add_metric(labels, value)
                yield family


def count_traffic(rows: Iterable[Mapping[str, str]]) -> Counter[_TrafficKey]:
    """Connections, refused and malformed requests by frontend, bind name and column of one worker's `show stat`."""
    found: Counter[_TrafficKey] = Counter()
    for row in rows:
        frontend = _GUESTS[0] if row.get("pxname") in _GUESTS else row.get("pxname")
        if frontend in {_GUESTS[0], AGENTS} and row.get("type") == _LISTENER:
            for column in ("stot", "dreq", "ereq"):
                text = row.get(column, "")
                found[frontend, row["svname"], column] += int(text) if text.isdigit() else 0
    return found


_Read: TypeAlias = Callable[[Metrics], Iterable[_Sample]]


def _one(read: Callable[[Metrics], float]) -> _Read:
    return lambda now: [((), float(read(now)))]


def _known(read: Callable[[Metrics], bool | None]) -> _Read:
    """No series where there is no value."""
    return lambda now: [] if (value := read(now)) is None else [((), float(value))]


def _each(read: Callable[[Metrics], Mapping[str, float]]) -> _Read:
    return lambda now: [((key,), float(value)) for key, value in sorted(read(now).items())]


def _per_network(read: Callable[[Metrics], Mapping[str, int]]) -> _Read:
    """Each network's own count, or with more than `network_series` of them their sum."""

    def bounded(now: Metrics) -> Mapping[str, float]:
        counts = read(now)
        few = len(counts) <= now.network_series()
        return counts if few else {NETWORK_SUM: sum(counts.values())}

    return _each(bounded)


def _traffic(column: str) -> _Read:
    return _per_network(
        lambda now: {
            network: count
            for (frontend, network, counted), count in now.traffic.totals.items()
            if frontend == _GUESTS[0] and counted == column
        }
    )


def _agents(column: str) -> _Read:
    return _one(lambda now: now.traffic.totals[AGENTS, AGENTS, column])


def _timing(read: Callable[[Metrics], tuple[float, float]]) -> _Read:
    return lambda now: [((), float(one)) for one in read(now)]


def _neutron(read: Callable[[NeutronFigures], float]) -> _Read:
    return lambda now: [] if now.neutron is None else [((), float(read(now.neutron.figures)))]


def _neutron_each(read: Callable[[NeutronFigures], Mapping[str, float]]) -> _Read:
    return _each(lambda now: {} if now.neutron is None else read(now.neutron.figures))


def _endpoints(read: Callable[[NovaEndpointReport], float]) -> _Read:
    return lambda now: sorted(
        ((one.endpoint_set, one.endpoint), float(read(one)))
        for one in now.status.nova_watch.endpoints
    )


def _not_served(now: Metrics) -> Mapping[str, int]:
    degraded = {(one.network, one.code.value) for one in now.status.listeners.degraded()}
    return Counter(code for _, code in degraded)


def _foreign(now: Metrics) -> Mapping[str, int]:
    foreign = now.status.listeners.report.foreign
    return {
        effect.value: len({one.socket for one in foreign if one.effect is effect})
        for effect in Effect
    }


def _source_records(now: Metrics) -> Iterator[_Sample]:
    inventory = now.status.inventory
    for name in sorted(inventory.sources):
        for kind, count in zip(("network", "instance"), inventory.record_counts(name), strict=True):
            yield (name, kind), float(count)


def _refused_records(now: Metrics) -> Mapping[str, int]:
    inventory = now.status.inventory
    return {name: len(inventory.problems_of(name)) for name in inventory.sources}


def _source_failures(now: Metrics) -> Mapping[str, int]:
    found = dict.fromkeys(now.status.inventory.sources, 0)
    if now.neutron is not None:
        queries = now.neutron.figures.queries
        found[now.neutron.name] = sum(count for result, count in queries.items() if result != "ok")
    return found


def _old_workers(now: Metrics) -> int:
    processes = now.status.haproxy.processes
    return 0 if processes is None else len(processes.draining)


def _convergence(now: Metrics) -> Iterator[_Sample]:
    durations = now.status.records.rounds
    for bound, count in durations.within().items():
        yield ("+Inf" if bound == math.inf else str(bound),), float(count)
    yield (), durations.total_s


def _resolver_requests(now: Metrics) -> Mapping[str, int]:
    counts = now.resolver.counts
    return {"found": counts.found, **{one.value: counts.denied[one] for one in Denial}}


def _mac_filters(now: Metrics) -> Mapping[str, int]:
    macs = now.status.macs()
    return {"open": macs.gates, "refused": macs.refused}


def _mismatches(now: Metrics) -> Mapping[str, int]:
    return {str(network): count for network, count in now.resolver.counts.mismatched.items()}


def _audit_failing(now: Metrics) -> bool | None:
    audit = now.status.audit
    return audit.problem is not None if audit.settings().one_in else None


METRICS: Final[tuple[Metric, ...]] = (
    Metric(
        "imdsproxy_build_info",
        "gauge",
        "Always 1; the label says which version runs.",
        lambda _: [((__version__,), 1)],
        ("version",),
    ),
    Metric(
        "imdsproxy_ready",
        "gauge",
        "1 while guests get what the sources say; /readyz has the reasons for a 0.",
        _one(lambda now: now.status.readiness().ready),
    ),
    Metric(
        "imdsproxy_start_time_seconds",
        "gauge",
        "Unix time of the controller's start.",
        _one(lambda now: now.status.started_at),
    ),
    Metric(
        "imdsproxy_settings_refused",
        "gauge",
        "1 while the last reload of the settings files was refused: those before stay in force.",
        _one(lambda now: bool(now.status.settings.problems)),
    ),
    Metric(
        "imdsproxy_networks_serving",
        "gauge",
        "Networks that are served as configured.",
        _one(lambda now: now.status.listeners.serving),
    ),
    Metric(
        "imdsproxy_networks_left_out",
        "gauge",
        "Networks that are configured and not served now, by the code of the reason.",
        _each(_not_served),
        ("code",),
    ),
    Metric(
        "imdsproxy_foreign_listeners",
        "gauge",
        "Sockets of other programs at networks' addresses and port, by effect: `blocks` (ours cannot listen), "
        "`shares` (guests get both answers), `yields` (guests get ours). `status` and the log name them.",
        _each(_foreign),
        ("effect",),
    ),
    Metric(
        "imdsproxy_instances",
        "gauge",
        "Instances known.",
        _one(lambda now: len(now.status.inventory.instances)),
    ),
    Metric(
        "imdsproxy_addresses",
        "gauge",
        "Addresses of guests known to HAProxy.",
        _one(lambda now: now.status.inventory.address_count),
    ),
    Metric(
        "imdsproxy_conflicts",
        "gauge",
        "Ids and addresses that several records claim; their guests get 503.",
        _one(lambda now: now.status.inventory.conflict_count),
    ),
    Metric(
        "imdsproxy_source_in_sync",
        "gauge",
        "1 while the source has reported all its records.",
        _each(lambda now: now.status.inventory.sources),
        ("source",),
    ),
    Metric(
        "imdsproxy_source_records",
        "gauge",
        "Records in force from the source, by kind: network or instance.",
        _source_records,
        ("source", "kind"),
    ),
    Metric(
        "imdsproxy_source_refused_records",
        "gauge",
        "Records of the source that are refused now.",
        _each(_refused_records),
        ("source",),
    ),
    Metric(
        "imdsproxy_source_failures",
        "counter",
        "Times that the source did not answer or its store was refused.",
        _each(_source_failures),
        ("source",),
    ),
    Metric(
        "imdsproxy_haproxy_up",
        "gauge",
        "1 while HAProxy's worker answers.",
        _one(
            lambda now: now.status.watchdog.answering and now.status.haproxy.processes is not None
        ),
    ),
    Metric(
        "imdsproxy_haproxy_old_workers",
        "gauge",
        "Workers from before a reload that still have connections.",
        _one(_old_workers),
    ),
    Metric(
        "imdsproxy_haproxy_reloads",
        "counter",
        "Reloads of HAProxy by result: ok or failed.",
        _each(lambda now: now.status.haproxy.reload_counts),
        ("result",),
    ),
    Metric(
        "imdsproxy_haproxy_reload_seconds",
        "summary",
        "Time from ordering a reload until the new worker serves.",
        _timing(
            lambda now: (now.status.haproxy.reload_counts.total(), now.status.haproxy.seconds_spent)
        ),
    ),
    Metric(
        "imdsproxy_haproxy_commands",
        "counter",
        "Runtime API commands by result: ok or failed.",
        _each(lambda now: now.status.haproxy.master.commands),
        ("result",),
    ),
    Metric(
        "imdsproxy_process_restarts",
        "counter",
        "Processes started again because they died or hung, by process: haproxy, or documents with its workers.",
        _each(
            lambda now: {
                "haproxy": now.status.watchdog.restarts,
                "documents": now.status.companion.restarts,
            }
        ),
        ("process",),
    ),
    Metric(
        "imdsproxy_documents_processes",
        "gauge",
        "Processes of the document server that run.",
        _one(lambda now: max(0, len(now.status.companion.read().pids) - 1)),
    ),
    Metric(
        "imdsproxy_plan_seconds",
        "summary",
        "Time that applying a plan took.",
        _timing(lambda now: (now.status.listeners.rounds, now.status.listeners.seconds)),
    ),
    Metric(
        "imdsproxy_plan_operations",
        "counter",
        "Operations of plans by result: ok or failed (failed ones are tried again).",
        _each(lambda now: now.status.listeners.settler.operations),
        ("result",),
    ),
    Metric(
        "imdsproxy_convergence_seconds",
        "histogram",
        "Time from a source's observation until every worker of HAProxy has confirmed it.",
        _convergence,
    ),
    Metric(
        "imdsproxy_resolver_requests",
        "counter",
        "Requests of unknown addresses by outcome: found, unknown, unavailable, conflict, "
        "over-limit or gone (the guest left).",
        _each(_resolver_requests),
        ("outcome",),
    ),
    Metric(
        "imdsproxy_resolver_held",
        "gauge",
        "Requests of unknown addresses that are held now.",
        _one(lambda now: now.resolver.held),
    ),
    Metric(
        "imdsproxy_network_connections",
        "counter",
        'Guests\' connections by network; one series "*" for all above metrics.network_series.',
        _traffic("stot"),
        ("network",),
    ),
    Metric(
        "imdsproxy_network_denied",
        "counter",
        "Guests' requests that were refused, by network as above.",
        _traffic("dreq"),
        ("network",),
    ),
    Metric(
        "imdsproxy_network_malformed",
        "counter",
        "Guests' requests that were no proper HTTP, by network as above.",
        _traffic("ereq"),
        ("network",),
    ),
    Metric(
        "imdsproxy_mac_mismatches",
        "counter",
        "Requests that got 403 because the address goes with another MAC, by network as above.",
        _per_network(_mismatches),
        ("network",),
    ),
    Metric(
        "imdsproxy_metadata_no_token",
        "counter",
        "Reads of EC2's tree, or of one that requires tokens, without a session token and not refused for it, by "
        "network as above: each, or an estimate by one in 20, or none, as `tokens.count_reads` says.",
        _per_network(lambda now: now.counting.ledger.read),
        ("network",),
    ),
    Metric(
        "imdsproxy_metadata_no_token_rejected",
        "counter",
        "Reads that were refused because a session token is required, each of them, by network as above.",
        _per_network(lambda now: now.counting.ledger.refused),
        ("network",),
    ),
    Metric(
        "imdsproxy_learned_addresses",
        "gauge",
        "Addresses that guests are known by because the neighbour table has their MAC there.",
        _one(lambda now: now.status.macs().learned),
    ),
    Metric(
        "imdsproxy_pairs",
        "gauge",
        "Addresses that the kernel lets through to HAProxy's maps with one MAC only, or with any.",
        _one(lambda now: now.status.macs().pairs),
    ),
    Metric(
        "imdsproxy_gates",
        "gauge",
        "Networks in which the kernel looks at guests' MACs: open, or refused where it should and cannot.",
        _each(_mac_filters),
        ("state",),
    ),
    Metric(
        "imdsproxy_unix_listener_serving",
        "gauge",
        "1 while HAProxy's socket is at unix_listener.path; no series where that is off.",
        _known(lambda now: None if (unix := now.status.unix_listener()) is None else unix.serving),
    ),
    Metric(
        "imdsproxy_unix_listener_taken_over",
        "counter",
        "Times that unix_listener.path was taken from a process that lives; it grows whenever that takes it back.",
        _one(lambda now: now.status.listeners.unix.taken_over),
    ),
    Metric(
        "imdsproxy_unix_listener_connections",
        "counter",
        "Connections of Neutron's proxies, all networks together.",
        _agents("stot"),
    ),
    Metric(
        "imdsproxy_unix_listener_denied",
        "counter",
        "Requests of theirs that were refused: without exactly one network or router and one address.",
        _agents("dreq"),
    ),
    Metric(
        "imdsproxy_unix_listener_malformed",
        "counter",
        "Requests of theirs that were no proper HTTP.",
        _agents("ereq"),
    ),
    Metric(
        "imdsproxy_audit_lines",
        "counter",
        "Lines of the audit log that were written.",
        _one(lambda now: now.status.audit.written),
    ),
    Metric(
        "imdsproxy_audit_left_out",
        "counter",
        "Requests that have no line in the audit log, because HAProxy's ring or the journal had no room.",
        _one(lambda now: now.status.audit.left_out),
    ),
    Metric(
        "imdsproxy_audit_failing",
        "gauge",
        "1 while the audit log cannot be written; `imdsproxy status` says why. Guests are served.",
        _known(_audit_failing),
    ),
    Metric(
        "imdsproxy_nova_endpoint_up",
        "gauge",
        "1 while HAProxy takes the endpoint of Nova for one that answers.",
        _endpoints(lambda endpoint: endpoint.up),
        ("endpoint_set", "endpoint"),
    ),
    Metric(
        "imdsproxy_nova_endpoint_failures",
        "counter",
        "Connections to the endpoint of Nova that failed, and requests that it did not answer in time or in full.",
        _endpoints(lambda endpoint: endpoint.failures),
        ("endpoint_set", "endpoint"),
    ),
    Metric(
        "imdsproxy_nova_refused",
        "counter",
        "Answers 403 of Nova, by endpoint set: it refuses our signature, most likely for another secret.",
        _each(lambda now: now.status.nova_watch.refused.totals),
        ("endpoint_set",),
    ),
    Metric(
        "imdsproxy_neutron_queries",
        "counter",
        "Queries to Neutron by result: ok, failed or timeout.",
        _neutron_each(
            lambda figures: {one: figures.queries.get(one, 0) for one in get_args(QueryResult)}
        ),
        ("result",),
    ),
    Metric(
        "imdsproxy_neutron_look_ups",
        "counter",
        "Look-ups of guests that HAProxy did not know, by result: found, known (without a query), missing, "
        "negative-cached (missing, without a query), coalesced (waited for another's query), ambiguous or "
        "unavailable.",
        _neutron_each(
            lambda figures: {one: figures.look_ups.get(one, 0) for one in get_args(LookUpResult)}
        ),
        ("result",),
    ),
    Metric(
        "imdsproxy_neutron_ports",
        "gauge",
        "Neutron's ports that are known and kept up to date.",
        _neutron(lambda figures: figures.ports),
    ),
    Metric(
        "imdsproxy_neutron_stale_seconds",
        "gauge",
        "Seconds since Neutron answered last, while it does not; else 0. What is known is served on.",
        _neutron(lambda figures: figures.stale_s),
    ),
    Metric(
        "imdsproxy_neutron_backoff_seconds",
        "gauge",
        "Seconds until Neutron is asked again, while it does not answer; else 0.",
        _neutron(lambda figures: figures.backoff_s),
    ),
)
