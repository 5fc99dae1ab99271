"""Where the kernel looks at MACs for us: a gate on each device that guests of a network come in by.

HAProxy cannot see a peer's MAC, so the kernel sorts. What comes from an address together with its MAC (`core.pairs`)
is led to a port of its own, where HAProxy answers by its maps; everything else stays on the port that it was sent
to, where HAProxy asks the resolver. Without the gate, all of it is asked about: nothing is believed by accident.

    guest ─► port 80 ─► gate ─┬─ a pair      ─► port 254 ─► maps
                              └─ anything else ► port 80  ─► resolver
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from imdsproxy.core.endpoints import ENSLAVING, LOOPBACK, Endpoint
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import NamespaceRef, ObservedHost
from imdsproxy.core.model import Network, NetworkId

VERIFIED_PORT: Final = 254
"""Where what the gate lets through is taken. Reserved by IANA, and nobody's: below what rpc clients bind."""

ANSWER_DSCP: Final = 0x2F
"""Marks answers to unverified requests that only the instance may read (RFC 2474's pool for local use)."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One network's, on all devices that its guests come in by.

    Attributes:
        namespace: Where; `None` is the host's own.
        devices: Names and indexes: another device may have the name next time.
        table: The kernel's name for it, ours alone.
    """

    network: NetworkId
    namespace: NamespaceRef | None
    devices: tuple[tuple[str, int], ...]
    table: str


@dataclass(frozen=True, slots=True)
class GatePlan:
    """What to bind, by who answers there.

    Attributes:
        plain: Answered by the maps, as in networks that check no MACs.
        verified: The same, behind a gate.
        unverified: Answered by the resolver.
        gates: By network.
    """

    plain: tuple[Endpoint, ...] = ()
    verified: tuple[Endpoint, ...] = ()
    unverified: tuple[Endpoint, ...] = ()
    gates: Mapping[NetworkId, Gate] = field(default_factory=dict)

    @property
    def plain_networks(self) -> frozenset[NetworkId]:
        """Where nobody looks at MACs."""
        return frozenset(one.network for one in self.plain)

    @property
    def binds(self) -> tuple[Endpoint, ...]:
        """Everything that HAProxy is to listen on."""
        return (*self.plain, *self.verified, *self.unverified)

    def without(self, refused: Collection[NetworkId]) -> GatePlan:
        """The same where the kernel has no gate for some networks: nobody is verified there."""
        return replace(
            self,
            verified=tuple(one for one in self.verified if one.network not in refused),
            gates={name: gate for name, gate in self.gates.items() if name not in refused},
        )


def plan_gates(
    networks: Mapping[NetworkId, Network],
    endpoints: Iterable[Endpoint],
    observed: ObservedHost,
    naming: Naming,
    carries_macs: Callable[[NetworkId], bool],
) -> GatePlan:
    """Which networks need a gate, and where.

    Args:
        networks: All of them.
        endpoints: What can be bound.
        observed: The host that they were planned from.
        naming: How our own tables are named.
        carries_macs: Whether a network's ports have MACs; where none has, nothing can be checked.
    """
    plain: list[Endpoint] = []
    verified: list[Endpoint] = []
    unverified: list[Endpoint] = []
    gates: dict[NetworkId, Gate] = {}
    checked: dict[NetworkId, bool] = {}
    for endpoint in endpoints:
        name = endpoint.network
        if name not in checked:
            network = networks.get(name)
            checked[name] = network is not None and network.checks_macs and carries_macs(name)
        if not checked[name]:
            plain.append(endpoint)
            continue
        unverified.append(endpoint)
        devices = _devices(endpoint, observed)
        verified += [
            replace(endpoint, port=VERIFIED_PORT, device=device, device_index=index)
            for device, index in devices
        ]
        before = gates[name].devices if name in gates else ()
        both = tuple(dict.fromkeys((*before, *devices)))
        gates[name] = Gate(name, endpoint.namespace, both, naming.link(name))
    return GatePlan(
        tuple(plain),
        tuple(verified),
        tuple(unverified),
        {name: gate for name, gate in gates.items() if gate.devices},
    )


def _devices(endpoint: Endpoint, observed: ObservedHost) -> tuple[tuple[str, int], ...]:
    """Where packets for an endpoint come in."""
    if endpoint.device is not None:
        return ((endpoint.device, endpoint.device_index),)
    if endpoint.namespace is None:
        return ()
    seen = observed.namespaces.get(endpoint.namespace.name)
    if seen is None:
        return ()
    kinds = {one.index: one.kind for one in seen.devices.values()}
    # IPv4 is answered on every device, wherever the address is; but only what has a MAC can be checked.
    return tuple(
        (one.name, one.index)
        for one in sorted(seen.devices.values(), key=lambda one: one.index)
        if one.name != LOOPBACK and one.mac and one.up and kinds.get(one.master) not in ENSLAVING
    )
