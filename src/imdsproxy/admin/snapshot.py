"""What the controller counts, as plain numbers of one moment: nothing here knows how it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from imdsproxy.core.progress import Durations

__all__ = [
    "NETWORK_SUM",
    "MetricsSnapshot",
    "NetworkTraffic",
    "NeutronCounts",
    "SourceFigures",
    "Timing",
    "bound_counts",
    "bound_networks",
]

NETWORK_SUM: Final = "*"
"""The `network` label of the one sum that stands for all, where there are too many for each."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How often something was done, and how long it took in all, in seconds."""

    count: int = 0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SourceFigures:
    """One source's records; `failures` counts the times it did not answer or was refused."""

    in_sync: bool
    networks: int = 0
    instances: int = 0
    refused_records: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class NetworkTraffic:
    """What HAProxy counts for each listener of a network, since the controller knows it; only ever grows.

    HAProxy's own counters begin at 0 with each reload: who fills this in adds them up.
    """

    connections: int = 0
    denied: int = 0
    malformed: int = 0


@dataclass(frozen=True, slots=True)
class NeutronCounts:
    """The source `neutron`.

    Attributes:
        queries: By result: `ok`, `failed`, `timeout`.
        look_ups: Of addresses that HAProxy did not know, by result: `known` (a moment ago, or before it was
            withdrawn), `found`, `missing`, `ambiguous`, `unavailable`, `negative-cached`, `coalesced`.
        ports: Known now.
        stale_s: Seconds since Neutron answered last, while it does not; else 0.
        backoff_s: Seconds until it is asked again, while it does not; else 0.
    """

    queries: Mapping[str, int] = field(default_factory=dict)
    look_ups: Mapping[str, int] = field(default_factory=dict)
    ports: int = 0
    stale_s: float = 0.0
    backoff_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """What `/metrics` shows, at one moment. Counters only ever grow while the controller lives.

    Attributes:
        left_out: Networks that are configured and not served now, by the reason's code.
        foreign: Sockets of other programs at networks' addresses and port, by what they do to ours.
        reloads: HAProxy's reloads by result, `ok` or `failed`.
        restarts: Processes started again because they died or hung, by process.
        operations: Operations of applied plans by result, `ok` or `failed`.
        resolver: Requests of unknown addresses by outcome: `found`, `unknown`, `unavailable`,
            `conflict`, `over-limit`, `mismatch`, `gone` (the guest left).
        commands: Runtime API commands by result, `ok` or `failed`.
        convergence: From a source's observation to the acknowledgement by HAProxy.
        mismatches: Requests with an address of one and the MAC of another, by network.
        learned: Addresses that guests have by their MAC alone.
        pairs: Addresses that are let through with a MAC, or with any.
        gates: Networks where the kernel looks at MACs.
        gates_refused: Networks where it should, and cannot.
        unix_serving: `None` where the unix listener is off.
        unix_taken_over: How often its path was taken from a process that lives.
        settings_refused: The settings files were refused at the last reload.
        audit_failing: `None` where there is no audit log.
        audit_left_out: Requests that have no line in it, because HAProxy's ring or the journal had no room.
        no_token: Reads without a session token (`imdsproxy.core.haproxy.counting`), by network.
        no_token_rejected: Reads that were refused because a token is required, by network.
    """

    version: str
    ready: bool
    started_at: float
    networks_serving: int = 0
    instances: int = 0
    addresses: int = 0
    conflicts: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    foreign: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, SourceFigures] = field(default_factory=dict)
    haproxy_up: bool = False
    haproxy_old_workers: int = 0
    reloads: Mapping[str, int] = field(default_factory=dict)
    reload: Timing = field(default_factory=Timing)
    restarts: Mapping[str, int] = field(default_factory=dict)
    documents_up: int = 0
    plans: Timing = field(default_factory=Timing)
    operations: Mapping[str, int] = field(default_factory=dict)
    convergence: Durations = field(default_factory=Durations)
    resolver: Mapping[str, int] = field(default_factory=dict)
    resolver_held: int = 0
    commands: Mapping[str, int] = field(default_factory=dict)
    traffic: Mapping[str, NetworkTraffic] = field(default_factory=dict)
    nova_up: Mapping[tuple[str, str], bool] = field(default_factory=dict)
    nova_failures: Mapping[tuple[str, str], int] = field(default_factory=dict)
    mismatches: Mapping[str, int] = field(default_factory=dict)
    learned: int = 0
    pairs: int = 0
    gates: int = 0
    gates_refused: int = 0
    unix_serving: bool | None = None
    unix_taken_over: int = 0
    unix_traffic: NetworkTraffic = field(default_factory=NetworkTraffic)
    nova_refused: Mapping[str, int] = field(default_factory=dict)
    audit_lines: int = 0
    audit_left_out: int = 0
    audit_failing: bool | None = None
    no_token: Mapping[str, int] = field(default_factory=dict)
    no_token_rejected: Mapping[str, int] = field(default_factory=dict)
    settings_refused: bool = False
    neutron: NeutronCounts | None = None


def bound_networks(
    traffic: Mapping[str, NetworkTraffic], limit: int
) -> Mapping[str, NetworkTraffic]:
    """Each network's own traffic, or with more than `limit` of them their sum as `NETWORK_SUM`."""
    if len(traffic) <= limit:
        return traffic
    return {
        NETWORK_SUM: NetworkTraffic(
            connections=sum(one.connections for one in traffic.values()),
            denied=sum(one.denied for one in traffic.values()),
            malformed=sum(one.malformed for one in traffic.values()),
        )
    }


def bound_counts(counts: Mapping[str, int], limit: int) -> Mapping[str, int]:
    """Each network's own count, or with more than `limit` of them their sum as `NETWORK_SUM`."""
    return counts if len(counts) <= limit else {NETWORK_SUM: sum(counts.values())}
