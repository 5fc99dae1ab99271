"""What the controller counts for Prometheus.

Every metric is a function: its name, its help (the docstring), its kind and labels, and where its value comes from.
No label has values that guests or operators choose freely, except `network`, whose number of series is bounded (see
`NETWORK_SUM`). HAProxy's own exporter has connections, queues and bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, TypeVar, get_args

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from imdsproxy import __version__
from imdsproxy.admin.status import StatusService
from imdsproxy.app.token_report import TokenCounting
from imdsproxy.core.haproxy.frontends import AGENTS
from imdsproxy.core.haproxy.runtime import WorkerTotals
from imdsproxy.core.hoststate import Effect
from imdsproxy.core.identity import Denial
from imdsproxy.core.timing import Durations
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import DataplaneError
from imdsproxy.serving.resolver import Resolver
from imdsproxy.sources.neutron.queries import QueryResult
from imdsproxy.sources.neutron.source import LookUpResult, NeutronFigures, NeutronSource

NETWORK_SUM: Final = "*"
"""The `network` label of the one sum that stands for all, where there are too many for each."""

_COUNTED: Final = ("stot", "dreq", "ereq")
TRAFFIC_COLUMNS: Final = frozenset({"pxname", "svname", "type", *_COUNTED})
"""What `count_traffic` reads of `show stat`."""

_GUESTS: Final = ("guests", "unverified")
_LISTENER: Final = "3"

_Kind: TypeAlias = Literal["gauge", "counter", "summary", "histogram"]
_TrafficKey: TypeAlias = tuple[str, str, str]
_ByLabel: TypeAlias = Mapping[str, float]
_ByLabels: TypeAlias = Mapping[tuple[str, str], float]
_Timing: TypeAlias = tuple[float, float]
_Read: TypeAlias = "Callable[[Metrics], float | _ByLabel | _ByLabels | _Timing | Durations | None]"
_Figure = TypeVar("_Figure")
_SUFFIXES: Final[Mapping[_Kind, tuple[str, ...]]] = {
    "gauge": ("",),
    "counter": ("_total",),
    "summary": ("_count", "_sum"),
    "histogram": ("_bucket", "_count", "_sum"),
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family.

    Attributes:
        name: As exposed, but for the suffixes that follow from `kind`.
        read: Its value, `None` for no series; with labels, values by theirs; of a summary count and sum.
    """

    name: str
    kind: _Kind
    help: str
    labels: tuple[str, ...]
    read: _Read

    @property
    def exposed(self) -> str:
        """The name that a query uses."""
        return ", ".join(self.name + suffix for suffix in _SUFFIXES[self.kind])

    def collect(self, now: Metrics) -> Family:
        """The family with the values of now."""
        family = Family(self.name, self.help, self.kind)
        match self.read(now):
            case Durations() as durations:
                within = durations.within()
                for bound, count in within.items():
                    le = "+Inf" if bound == math.inf else str(bound)
                    family.add_sample(f"{self.name}_bucket", {"le": le}, count)
                family.add_sample(f"{self.name}_count", {}, within[math.inf])
                family.add_sample(f"{self.name}_sum", {}, durations.total_s)
            case (count, total):
                family.add_sample(f"{self.name}_count", {}, count)
                family.add_sample(f"{self.name}_sum", {}, total)
            case Mapping() as values:
                series = [((key,) if isinstance(key, str) else key, values[key]) for key in values]
                for key, value in sorted(series, key=lambda one: one[0][0]):
                    family.add_sample(self.exposed, dict(zip(self.labels, key, strict=True)), value)
            case int() | float() as value:
                family.add_sample(self.exposed, {}, value)
            case None:
                pass
        return family


METRICS: Final[list[Metric]] = []
"""All of them, in the order in which they are exposed."""


def _metric(kind: _Kind, *labels: str) -> Callable[[_Read], _Read]:
    """Have a function's result exposed under its name, with its docstring as the help."""

    def add(read: _Read) -> _Read:
        text = " ".join((read.__doc__ or "").split())
        METRICS.append(Metric(f"imdsproxy_{read.__name__}", kind, text, labels, read))
        return read

    return add


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
        return (metric.collect(self) for metric in METRICS)

    def by_network(self, counts: Mapping[str, int]) -> _ByLabel:
        """Each network's own count, or with more than `network_series` of them their sum."""
        few = len(counts) <= self.network_series()
        return counts if few else {NETWORK_SUM: sum(counts.values())}

    def guests(self, column: str) -> _ByLabel:
        """One column of the traffic, by network."""
        totals = self.traffic.totals.items()
        return self.by_network(
            {key[1]: count for key, count in totals if key[::2] == (_GUESTS[0], column)}
        )

    def agents(self, column: str) -> float:
        """The same of Neutron's proxies, all together."""
        return self.traffic.totals[AGENTS, AGENTS, column]

    def of_neutron(self, read: Callable[[NeutronFigures], _Figure]) -> _Figure | None:
        """What a figure of the source is; `None` without that source."""
        return None if self.neutron is None else read(self.neutron.figures)


def count_traffic(rows: Iterable[Mapping[str, str]]) -> Counter[_TrafficKey]:
    """Connections, refused and malformed requests by frontend, bind name and column of one worker's `show stat`."""
    found: Counter[_TrafficKey] = Counter()
    for row in rows:
        frontend = _GUESTS[0] if row.get("pxname") in _GUESTS else row.get("pxname")
        if frontend in {_GUESTS[0], AGENTS} and row.get("type") == _LISTENER:
            for column in _COUNTED:
                text = row.get(column, "")
                found[frontend, row["svname"], column] += int(text) if text.isdigit() else 0
    return found


@_metric("gauge", "version")
def build_info(_now: Metrics) -> _ByLabel:
    """Always 1; the label says which version runs."""
    return {__version__: 1}


@_metric("gauge")
def ready(now: Metrics) -> bool:
    """1 while guests get what the sources say; /readyz has the reasons for a 0."""
    return now.status.readiness().ready


@_metric("gauge")
def start_time_seconds(now: Metrics) -> float:
    """Unix time of the controller's start."""
    return now.status.started_at


@_metric("gauge")
def settings_refused(now: Metrics) -> bool:
    """1 while the last reload of the settings files was refused: those before stay in force."""
    return bool(now.status.settings.problems)


@_metric("gauge")
def networks_serving(now: Metrics) -> int:
    """Networks that are served as configured."""
    return now.status.listeners.serving


@_metric("gauge", "code")
def networks_left_out(now: Metrics) -> _ByLabel:
    """Networks that are configured and not served now, by the code of the reason."""
    degraded = {(one.network, one.code.value) for one in now.status.listeners.degraded()}
    return Counter(code for _, code in degraded)


@_metric("gauge", "effect")
def foreign_listeners(now: Metrics) -> _ByLabel:
    """Sockets of other programs at networks' addresses and port, by effect: `blocks` (ours cannot listen),
    `shares` (guests get both answers), `yields` (guests get ours). `status` and the log name them.
    """
    foreign = now.status.listeners.report.foreign
    return {
        effect.value: len({one.socket for one in foreign if one.effect is effect})
        for effect in Effect
    }


@_metric("gauge")
def instances(now: Metrics) -> int:
    """Instances known."""
    return len(now.status.inventory.instances)


@_metric("gauge")
def addresses(now: Metrics) -> int:
    """Addresses of guests known to HAProxy."""
    return now.status.inventory.address_count


@_metric("gauge")
def conflicts(now: Metrics) -> int:
    """Ids and addresses that several records claim; their guests get 503."""
    return now.status.inventory.conflict_count


@_metric("gauge", "source")
def source_in_sync(now: Metrics) -> _ByLabel:
    """1 while the source has reported all its records."""
    return now.status.inventory.sources


@_metric("gauge", "source", "kind")
def source_records(now: Metrics) -> _ByLabels:
    """Records in force from the source, by kind: network or instance."""
    inventory = now.status.inventory
    return {
        (name, kind): count
        for name in inventory.sources
        for kind, count in zip(("network", "instance"), inventory.record_counts(name), strict=True)
    }


@_metric("gauge", "source")
def source_refused_records(now: Metrics) -> _ByLabel:
    """Records of the source that are refused now."""
    inventory = now.status.inventory
    return {name: len(inventory.problems_of(name)) for name in inventory.sources}


@_metric("counter", "source")
def source_failures(now: Metrics) -> _ByLabel:
    """Times that the source did not answer or its store was refused."""
    found = dict.fromkeys(now.status.inventory.sources, 0)
    if now.neutron is not None:
        queries = now.neutron.figures.queries
        found[now.neutron.name] = sum(count for result, count in queries.items() if result != "ok")
    return found


@_metric("gauge")
def haproxy_up(now: Metrics) -> bool:
    """1 while HAProxy's worker answers."""
    return now.status.watchdog.answering and now.status.haproxy.processes is not None


@_metric("gauge")
def haproxy_old_workers(now: Metrics) -> int:
    """Workers from before a reload that still have connections."""
    processes = now.status.haproxy.processes
    return 0 if processes is None else len(processes.draining)


@_metric("counter", "result")
def haproxy_reloads(now: Metrics) -> _ByLabel:
    """Reloads of HAProxy by result: ok or failed."""
    return now.status.haproxy.reload_counts


@_metric("summary")
def haproxy_reload_seconds(now: Metrics) -> _Timing:
    """Time from ordering a reload until the new worker serves."""
    return now.status.haproxy.reload_counts.total(), now.status.haproxy.seconds_spent


@_metric("counter", "result")
def haproxy_commands(now: Metrics) -> _ByLabel:
    """Runtime API commands by result: ok or failed."""
    return now.status.haproxy.master.commands


@_metric("counter", "process")
def process_restarts(now: Metrics) -> _ByLabel:
    """Processes started again because they died or hung, by process: haproxy, or documents with its workers."""
    status = now.status
    return {"documents": status.companion.restarts, "haproxy": status.watchdog.restarts}


@_metric("gauge")
def documents_processes(now: Metrics) -> int:
    """Processes of the document server that run."""
    return max(0, len(now.status.companion.read().pids) - 1)


@_metric("summary")
def plan_seconds(now: Metrics) -> _Timing:
    """Time that applying a plan took."""
    return now.status.listeners.rounds, now.status.listeners.seconds


@_metric("counter", "result")
def plan_operations(now: Metrics) -> _ByLabel:
    """Operations of plans by result: ok or failed (failed ones are tried again)."""
    return now.status.listeners.settler.operations


@_metric("histogram")
def convergence_seconds(now: Metrics) -> Durations:
    """Time from a source's observation until every worker of HAProxy has confirmed it."""
    return now.status.records.rounds


@_metric("counter", "outcome")
def resolver_requests(now: Metrics) -> _ByLabel:
    """Requests of unknown addresses by outcome: found, unknown, unavailable, conflict, over-limit or gone (the
    guest left).
    """
    counts = now.resolver.counts
    return {"found": counts.found, **{one.value: counts.denied[one] for one in Denial}}


@_metric("gauge")
def resolver_held(now: Metrics) -> int:
    """Requests of unknown addresses that are held now."""
    return now.resolver.held


@_metric("counter", "network")
def network_connections(now: Metrics) -> _ByLabel:
    """Guests' connections by network; one series "*" for all above metrics.network_series."""
    return now.guests("stot")


@_metric("counter", "network")
def network_denied(now: Metrics) -> _ByLabel:
    """Guests' requests that were refused, by network as above."""
    return now.guests("dreq")


@_metric("counter", "network")
def network_malformed(now: Metrics) -> _ByLabel:
    """Guests' requests that were no proper HTTP, by network as above."""
    return now.guests("ereq")


@_metric("counter", "network")
def mac_mismatches(now: Metrics) -> _ByLabel:
    """Requests that got 403 because the address goes with another MAC, by network as above."""
    found = now.resolver.counts.mismatched.items()
    return now.by_network({str(network): count for network, count in found})


@_metric("counter", "network")
def metadata_no_token(now: Metrics) -> _ByLabel:
    """Reads of EC2's tree, or of one that requires tokens, without a session token and not refused for it, by
    network as above: each, or an estimate by one in 20, or none, as `tokens.count_reads` says.
    """
    return now.by_network(now.counting.ledger.read)


@_metric("counter", "network")
def metadata_no_token_rejected(now: Metrics) -> _ByLabel:
    """Reads that were refused because a session token is required, each of them, by network as above."""
    return now.by_network(now.counting.ledger.refused)


@_metric("gauge")
def learned_addresses(now: Metrics) -> int:
    """Addresses that guests are known by because the neighbour table has their MAC there."""
    return now.status.macs().learned


@_metric("gauge")
def pairs(now: Metrics) -> int:
    """Addresses that the kernel lets through to HAProxy's maps with one MAC only, or with any."""
    return now.status.macs().pairs


@_metric("gauge", "state")
def gates(now: Metrics) -> _ByLabel:
    """Networks in which the kernel looks at guests' MACs: open, or refused where it should and cannot."""
    macs = now.status.macs()
    return {"open": macs.gates, "refused": macs.refused}


@_metric("gauge")
def unix_listener_serving(now: Metrics) -> bool | None:
    """1 while HAProxy's socket is at unix_listener.path; no series where that is off."""
    return None if (unix := now.status.unix_listener()) is None else unix.serving


@_metric("counter")
def unix_listener_taken_over(now: Metrics) -> int:
    """Times that unix_listener.path was taken from a process that lives; it grows whenever that takes it back."""
    return now.status.listeners.unix.taken_over


@_metric("counter")
def unix_listener_connections(now: Metrics) -> float:
    """Connections of Neutron's proxies, all networks together."""
    return now.agents("stot")


@_metric("counter")
def unix_listener_denied(now: Metrics) -> float:
    """Requests of theirs that were refused: without exactly one network or router and one address."""
    return now.agents("dreq")


@_metric("counter")
def unix_listener_malformed(now: Metrics) -> float:
    """Requests of theirs that were no proper HTTP."""
    return now.agents("ereq")


@_metric("counter")
def audit_lines(now: Metrics) -> int:
    """Lines of the audit log that were written."""
    return now.status.audit.written


@_metric("counter")
def audit_left_out(now: Metrics) -> int:
    """Requests that have no line in the audit log, because HAProxy's ring or the journal had no room."""
    return now.status.audit.left_out


@_metric("gauge")
def audit_failing(now: Metrics) -> bool | None:
    """1 while the audit log cannot be written; `imdsproxy status` says why. Guests are served."""
    audit = now.status.audit
    return audit.problem is not None if audit.settings().one_in else None


@_metric("gauge", "endpoint_set", "endpoint")
def nova_endpoint_up(now: Metrics) -> _ByLabels:
    """1 while HAProxy takes the endpoint of Nova for one that answers."""
    return {(one.endpoint_set, one.endpoint): one.up for one in now.status.nova_watch.endpoints}


@_metric("counter", "endpoint_set", "endpoint")
def nova_endpoint_failures(now: Metrics) -> _ByLabels:
    """Connections to the endpoint of Nova that failed, and requests that it did not answer in time or in full."""
    return {
        (one.endpoint_set, one.endpoint): one.failures for one in now.status.nova_watch.endpoints
    }


@_metric("counter", "endpoint_set")
def nova_refused(now: Metrics) -> _ByLabel:
    """Answers 403 of Nova, by endpoint set: it refuses our signature, most likely for another secret."""
    return now.status.nova_watch.refused.totals


@_metric("counter", "result")
def neutron_queries(now: Metrics) -> _ByLabel | None:
    """Queries to Neutron by result: ok, failed or timeout."""
    return now.of_neutron(
        lambda figures: {one: figures.queries.get(one, 0) for one in get_args(QueryResult)}
    )


@_metric("counter", "result")
def neutron_look_ups(now: Metrics) -> _ByLabel | None:
    """Look-ups of guests that HAProxy did not know, by result: found, known (without a query), missing,
    negative-cached (missing, without a query), coalesced (waited for another's query), ambiguous or
    unavailable.
    """
    return now.of_neutron(
        lambda figures: {one: figures.look_ups.get(one, 0) for one in get_args(LookUpResult)}
    )


@_metric("gauge")
def neutron_ports(now: Metrics) -> int | None:
    """Neutron's ports that are known and kept up to date."""
    return now.of_neutron(lambda figures: figures.ports)


@_metric("gauge")
def neutron_stale_seconds(now: Metrics) -> float | None:
    """Seconds since Neutron answered last, while it does not; else 0. What is known is served on."""
    return now.of_neutron(lambda figures: figures.stale_s)


@_metric("gauge")
def neutron_backoff_seconds(now: Metrics) -> float | None:
    """Seconds until Neutron is asked again, while it does not answer; else 0."""
    return now.of_neutron(lambda figures: figures.backoff_s)
