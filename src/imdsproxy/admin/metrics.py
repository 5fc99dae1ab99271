"""Every figure that the controller tells Prometheus: names, labels and meaning, in one place.

No label takes what guests or operators write freely, except `network`, whose number of series is
bounded (see `NETWORK_SUM`). HAProxy's own exporter tells of connections, queues and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from imdsproxy.admin.snapshot import (
    MetricsSnapshot,
    NetworkTraffic,
    NeutronCounts,
    SourceFigures,
    Timing,
)
from imdsproxy.core.progress import Durations

__all__ = ["METRICS", "MetricDescription"]

_Kind: TypeAlias = Literal["gauge", "counter", "summary", "histogram"]


_Sample: TypeAlias = tuple[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class MetricDescription:
    """One metric family: what it is called, what it says, and how it is read from a snapshot.

    Attributes:
        name: As exposed, but for `_total`, `_count` and `_sum`, which follow from `kind`.
        read: Label values and the value of each series; a summary gives its count, then its sum; a
            histogram its buckets, then its sum.
    """

    name: str
    kind: _Kind
    help: str
    labels: tuple[str, ...]
    read: Callable[[MetricsSnapshot], Iterable[_Sample]]

    @property
    def exposed(self) -> str:
        """The name that a query uses."""
        if self.kind == "histogram":
            return f"{self.name}_bucket, {self.name}_count, {self.name}_sum"
        if self.kind == "summary":
            return f"{self.name}_count, {self.name}_sum"
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _one(read: Callable[[MetricsSnapshot], float]) -> Callable[[MetricsSnapshot], list[_Sample]]:
    return lambda snapshot: [((), float(read(snapshot)))]


def _each(
    read: Callable[[MetricsSnapshot], Mapping[str, int]],
) -> Callable[[MetricsSnapshot], list[_Sample]]:
    return lambda snapshot: [
        ((key,), float(value)) for key, value in sorted(read(snapshot).items())
    ]


def _per_source(
    read: Callable[[SourceFigures], float],
) -> Callable[[MetricsSnapshot], list[_Sample]]:
    return lambda snapshot: [
        ((name,), float(read(figures))) for name, figures in sorted(snapshot.sources.items())
    ]


def _per_network(
    read: Callable[[NetworkTraffic], int],
) -> Callable[[MetricsSnapshot], list[_Sample]]:
    return lambda snapshot: [
        ((network,), float(read(traffic))) for network, traffic in sorted(snapshot.traffic.items())
    ]


def _neutron(
    read: Callable[[NeutronCounts], float],
) -> Callable[[MetricsSnapshot], list[_Sample]]:
    return lambda snapshot: (
        [] if snapshot.neutron is None else [((), float(read(snapshot.neutron)))]
    )


def _neutron_each(
    read: Callable[[NeutronCounts], Mapping[str, int]],
) -> Callable[[MetricsSnapshot], list[_Sample]]:
    return lambda snapshot: (
        []
        if snapshot.neutron is None
        else [((key,), float(value)) for key, value in sorted(read(snapshot.neutron).items())]
    )


def _unix_serving(snapshot: MetricsSnapshot) -> list[_Sample]:
    return [] if snapshot.unix_serving is None else [((), float(snapshot.unix_serving))]


def _audit_failing(snapshot: MetricsSnapshot) -> list[_Sample]:
    return [] if snapshot.audit_failing is None else [((), float(snapshot.audit_failing))]


def _timing(
    read: Callable[[MetricsSnapshot], Timing],
) -> Callable[[MetricsSnapshot], list[_Sample]]:
    def samples(snapshot: MetricsSnapshot) -> list[_Sample]:
        timing = read(snapshot)
        return [((), float(timing.count)), ((), timing.total_s)]

    return samples


def _durations(
    read: Callable[[MetricsSnapshot], Durations],
) -> Callable[[MetricsSnapshot], list[_Sample]]:
    def samples(snapshot: MetricsSnapshot) -> list[_Sample]:
        durations = read(snapshot)
        buckets = [
            (("+Inf" if bound == math.inf else str(bound),), float(count))
            for bound, count in durations.within().items()
        ]
        return [*buckets, ((), durations.total_s)]

    return samples


def _source_records(snapshot: MetricsSnapshot) -> list[_Sample]:
    samples: list[_Sample] = []
    for name, figures in sorted(snapshot.sources.items()):
        samples.append(((name, "network"), float(figures.networks)))
        samples.append(((name, "instance"), float(figures.instances)))
    return samples


METRICS: Final[tuple[MetricDescription, ...]] = (
    MetricDescription(
        "imdsproxy_build_info",
        "gauge",
        "Always 1; the label says which version runs.",
        ("version",),
        lambda snapshot: [((snapshot.version,), 1.0)],
    ),
    MetricDescription(
        "imdsproxy_ready",
        "gauge",
        "1 while guests get what the sources say; /readyz has the reasons for a 0.",
        (),
        _one(lambda snapshot: snapshot.ready),
    ),
    MetricDescription(
        "imdsproxy_start_time_seconds",
        "gauge",
        "Unix time of the controller's start.",
        (),
        _one(lambda snapshot: snapshot.started_at),
    ),
    MetricDescription(
        "imdsproxy_settings_refused",
        "gauge",
        "1 while the last reload of the settings files was refused: those before stay in force.",
        (),
        _one(lambda snapshot: snapshot.settings_refused),
    ),
    MetricDescription(
        "imdsproxy_networks_serving",
        "gauge",
        "Networks that are served as configured.",
        (),
        _one(lambda snapshot: snapshot.networks_serving),
    ),
    MetricDescription(
        "imdsproxy_networks_left_out",
        "gauge",
        "Networks that are configured and not served now, by the code of the reason.",
        ("code",),
        _each(lambda snapshot: snapshot.left_out),
    ),
    MetricDescription(
        "imdsproxy_foreign_listeners",
        "gauge",
        "Sockets of other programs at networks' addresses and port, by effect: `blocks` (ours cannot listen), "
        "`shares` (guests get both answers), `yields` (guests get ours). `status` and the log name them.",
        ("effect",),
        _each(lambda snapshot: snapshot.foreign),
    ),
    MetricDescription(
        "imdsproxy_instances",
        "gauge",
        "Instances known.",
        (),
        _one(lambda snapshot: snapshot.instances),
    ),
    MetricDescription(
        "imdsproxy_addresses",
        "gauge",
        "Addresses of guests known to HAProxy.",
        (),
        _one(lambda snapshot: snapshot.addresses),
    ),
    MetricDescription(
        "imdsproxy_conflicts",
        "gauge",
        "Ids and addresses that several records claim; their guests get 503.",
        (),
        _one(lambda snapshot: snapshot.conflicts),
    ),
    MetricDescription(
        "imdsproxy_source_in_sync",
        "gauge",
        "1 while the source has told all that it knows.",
        ("source",),
        _per_source(lambda figures: figures.in_sync),
    ),
    MetricDescription(
        "imdsproxy_source_records",
        "gauge",
        "Records in force from the source, by kind: network or instance.",
        ("source", "kind"),
        _source_records,
    ),
    MetricDescription(
        "imdsproxy_source_refused_records",
        "gauge",
        "Records of the source that are refused now.",
        ("source",),
        _per_source(lambda figures: figures.refused_records),
    ),
    MetricDescription(
        "imdsproxy_source_failures",
        "counter",
        "Times that the source did not answer or its store was refused.",
        ("source",),
        _per_source(lambda figures: figures.failures),
    ),
    MetricDescription(
        "imdsproxy_haproxy_up",
        "gauge",
        "1 while HAProxy's worker answers.",
        (),
        _one(lambda snapshot: snapshot.haproxy_up),
    ),
    MetricDescription(
        "imdsproxy_haproxy_old_workers",
        "gauge",
        "Workers from before a reload that still have connections.",
        (),
        _one(lambda snapshot: snapshot.haproxy_old_workers),
    ),
    MetricDescription(
        "imdsproxy_haproxy_reloads",
        "counter",
        "Reloads of HAProxy by result: ok or failed.",
        ("result",),
        _each(lambda snapshot: snapshot.reloads),
    ),
    MetricDescription(
        "imdsproxy_haproxy_reload_seconds",
        "summary",
        "Time from ordering a reload until the new worker serves.",
        (),
        _timing(lambda snapshot: snapshot.reload),
    ),
    MetricDescription(
        "imdsproxy_haproxy_commands",
        "counter",
        "Runtime API commands by result: ok or failed.",
        ("result",),
        _each(lambda snapshot: snapshot.commands),
    ),
    MetricDescription(
        "imdsproxy_process_restarts",
        "counter",
        "Processes started again because they died or hung, by process: haproxy, or documents with its workers.",
        ("process",),
        _each(lambda snapshot: snapshot.restarts),
    ),
    MetricDescription(
        "imdsproxy_documents_processes",
        "gauge",
        "Processes of the document server that run.",
        (),
        _one(lambda snapshot: snapshot.documents_up),
    ),
    MetricDescription(
        "imdsproxy_plan_seconds",
        "summary",
        "Time that applying a plan took.",
        (),
        _timing(lambda snapshot: snapshot.plans),
    ),
    MetricDescription(
        "imdsproxy_plan_operations",
        "counter",
        "Operations of plans by result: ok or failed (failed ones are tried again).",
        ("result",),
        _each(lambda snapshot: snapshot.operations),
    ),
    MetricDescription(
        "imdsproxy_convergence_seconds",
        "histogram",
        "Time from a source's observation until every worker of HAProxy has confirmed it.",
        (),
        _durations(lambda snapshot: snapshot.convergence),
    ),
    MetricDescription(
        "imdsproxy_resolver_requests",
        "counter",
        "Requests of unknown addresses by outcome: found, unknown, unavailable, conflict, "
        "over-limit or gone (the guest left).",
        ("outcome",),
        _each(lambda snapshot: snapshot.resolver),
    ),
    MetricDescription(
        "imdsproxy_resolver_held",
        "gauge",
        "Requests of unknown addresses that are held now.",
        (),
        _one(lambda snapshot: snapshot.resolver_held),
    ),
    MetricDescription(
        "imdsproxy_network_connections",
        "counter",
        'Guests\' connections by network; one series "*" for all above metrics.network_series.',
        ("network",),
        _per_network(lambda traffic: traffic.connections),
    ),
    MetricDescription(
        "imdsproxy_network_denied",
        "counter",
        "Guests' requests that were refused, by network as above.",
        ("network",),
        _per_network(lambda traffic: traffic.denied),
    ),
    MetricDescription(
        "imdsproxy_network_malformed",
        "counter",
        "Guests' requests that were no proper HTTP, by network as above.",
        ("network",),
        _per_network(lambda traffic: traffic.malformed),
    ),
    MetricDescription(
        "imdsproxy_mac_mismatches",
        "counter",
        "Requests that got 403 because the address goes with another MAC, by network as above.",
        ("network",),
        _each(lambda snapshot: snapshot.mismatches),
    ),
    MetricDescription(
        "imdsproxy_metadata_no_token",
        "counter",
        "Reads of EC2's tree, or of one that requires tokens, without a session token and not refused for it, by "
        "network as above: each, or an estimate by one in 20, or none, as `tokens.count_reads` says.",
        ("network",),
        _each(lambda snapshot: snapshot.no_token),
    ),
    MetricDescription(
        "imdsproxy_metadata_no_token_rejected",
        "counter",
        "Reads that were refused because a session token is required, each of them, by network as above.",
        ("network",),
        _each(lambda snapshot: snapshot.no_token_rejected),
    ),
    MetricDescription(
        "imdsproxy_learned_addresses",
        "gauge",
        "Addresses that guests are known by because the neighbour table has their MAC there.",
        (),
        _one(lambda snapshot: snapshot.learned),
    ),
    MetricDescription(
        "imdsproxy_pairs",
        "gauge",
        "Addresses that the kernel lets through to HAProxy's maps with one MAC only, or with any.",
        (),
        _one(lambda snapshot: snapshot.pairs),
    ),
    MetricDescription(
        "imdsproxy_gates",
        "gauge",
        "Networks in which the kernel looks at guests' MACs: open, or refused where it should and cannot.",
        ("state",),
        lambda snapshot: [
            (("open",), float(snapshot.gates)),
            (("refused",), float(snapshot.gates_refused)),
        ],
    ),
    MetricDescription(
        "imdsproxy_unix_listener_serving",
        "gauge",
        "1 while HAProxy's socket is at unix_listener.path; no series where that is off.",
        (),
        _unix_serving,
    ),
    MetricDescription(
        "imdsproxy_unix_listener_taken_over",
        "counter",
        "Times that unix_listener.path was taken from a process that lives; it grows whenever that takes it back.",
        (),
        _one(lambda snapshot: snapshot.unix_taken_over),
    ),
    MetricDescription(
        "imdsproxy_unix_listener_connections",
        "counter",
        "Connections of Neutron's proxies, all networks together.",
        (),
        _one(lambda snapshot: snapshot.unix_traffic.connections),
    ),
    MetricDescription(
        "imdsproxy_unix_listener_denied",
        "counter",
        "Requests of theirs that were refused: without exactly one network or router and one address.",
        (),
        _one(lambda snapshot: snapshot.unix_traffic.denied),
    ),
    MetricDescription(
        "imdsproxy_unix_listener_malformed",
        "counter",
        "Requests of theirs that were no proper HTTP.",
        (),
        _one(lambda snapshot: snapshot.unix_traffic.malformed),
    ),
    MetricDescription(
        "imdsproxy_audit_lines",
        "counter",
        "Lines of the audit log that were written.",
        (),
        _one(lambda snapshot: snapshot.audit_lines),
    ),
    MetricDescription(
        "imdsproxy_audit_left_out",
        "counter",
        "Requests that have no line in the audit log, because HAProxy's ring or the journal had no room.",
        (),
        _one(lambda snapshot: snapshot.audit_left_out),
    ),
    MetricDescription(
        "imdsproxy_audit_failing",
        "gauge",
        "1 while the audit log cannot be written; `imdsproxy status` says why. Guests are served.",
        (),
        _audit_failing,
    ),
    MetricDescription(
        "imdsproxy_nova_endpoint_up",
        "gauge",
        "1 while HAProxy takes the endpoint of Nova for one that answers.",
        ("endpoint_set", "endpoint"),
        lambda snapshot: [(key, float(up)) for key, up in sorted(snapshot.nova_up.items())],
    ),
    MetricDescription(
        "imdsproxy_nova_endpoint_failures",
        "counter",
        "Connections to the endpoint of Nova that failed, and requests that it did not answer in time or in full.",
        ("endpoint_set", "endpoint"),
        lambda snapshot: [(key, float(n)) for key, n in sorted(snapshot.nova_failures.items())],
    ),
    MetricDescription(
        "imdsproxy_nova_refused",
        "counter",
        "Answers 403 of Nova, by endpoint set: it refuses our signature, most likely for another secret.",
        ("endpoint_set",),
        _each(lambda snapshot: snapshot.nova_refused),
    ),
    MetricDescription(
        "imdsproxy_neutron_queries",
        "counter",
        "Queries to Neutron by result: ok, failed or timeout.",
        ("result",),
        _neutron_each(lambda neutron: neutron.queries),
    ),
    MetricDescription(
        "imdsproxy_neutron_look_ups",
        "counter",
        "Look-ups of guests that HAProxy did not know, by result: found, known (without a query), missing, "
        "negative-cached (missing, without a query), coalesced (waited for another's query), ambiguous or "
        "unavailable.",
        ("result",),
        _neutron_each(lambda neutron: neutron.look_ups),
    ),
    MetricDescription(
        "imdsproxy_neutron_ports",
        "gauge",
        "Neutron's ports that are known and kept up to date.",
        (),
        _neutron(lambda neutron: neutron.ports),
    ),
    MetricDescription(
        "imdsproxy_neutron_stale_seconds",
        "gauge",
        "Seconds since Neutron answered last, while it does not; else 0. What is known is served on.",
        (),
        _neutron(lambda neutron: neutron.stale_s),
    ),
    MetricDescription(
        "imdsproxy_neutron_backoff_seconds",
        "gauge",
        "Seconds until Neutron is asked again, while it does not answer; else 0.",
        (),
        _neutron(lambda neutron: neutron.backoff_s),
    ),
)
