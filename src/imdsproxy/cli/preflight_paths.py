"""Whether guests' packets arrive and answers find back, as far as the host's own rules and routes go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

from imdsproxy.cli.preflight import Finding
from imdsproxy.core.model import (
    METADATA_IPV4,
    METADATA_PORT,
    BridgeListener,
    InterfaceListener,
    Network,
)
from imdsproxy.core.wire import VERIFIED_PORT

if TYPE_CHECKING:
    from imdsproxy.host.firewall import DroppingChain

_AREA = "paths"
_WITH_ENDS = 4
"""A smaller range has no addresses of its own for network and broadcast (RFC 3021)."""

# Packets that pass the MAC filter are redirected to its own port (`anti_spoofing.plan`).
_IN = f"ip daddr {METADATA_IPV4} tcp dport {{ {METADATA_PORT}, {VERIFIED_PORT} }} accept"
_TO = f"ip daddr {METADATA_IPV4} tcp dport 80 accept"
_FROM = f"ip saddr {METADATA_IPV4} tcp sport 80 accept"


def check_paths(
    networks: Iterable[Network],
    chains: Sequence[DroppingChain],
    leads_by: Callable[[IPv4Address, str], bool | None],
    *,
    bridged_are_forwarded: bool,
) -> list[Finding]:
    """What may stand in the way, each with the rule that helps. All are warnings: what a rule lets in cannot be told.

    Args:
        networks: All of them.
        chains: Of the host, those that drop what they do not know.
        leads_by: Whether the host's own way to an address is by a device; `None` where there is no such device.
        bridged_are_forwarded: `br_netfilter` is in force.
    """
    given = tuple(networks)
    found: list[Finding] = []
    for network in given:
        listener = network.listener
        if isinstance(listener, InterfaceListener):
            found += _walls(network, listener.device, chains)
            found += _no_way_back(network, listener.device, leads_by)
        elif isinstance(listener, BridgeListener) and bridged_are_forwarded:
            found += _filtered(network, listener.bridge, chains)
    return found or [Finding(_AREA, "nothing was seen in guests' way")]


def _mentions(chain: DroppingChain, device: str) -> bool:
    """Whether a rule may have been made for it."""
    return str(METADATA_IPV4) in chain.rules or f'"{device}"' in chain.rules


def _walls(network: Network, device: str, chains: Iterable[DroppingChain]) -> Iterator[Finding]:
    for chain in chains:
        if chain.hook == "input" and not _mentions(chain, device):
            yield Finding(
                _AREA,
                f"network {network.id}: {chain} drops what guests on {device} send to this host, if no rule of "
                "it lets them in",
                f'nft insert rule {chain} iifname "{device}" {_IN}',
                warning=True,
            )


def _filtered(network: Network, bridge: str, chains: Iterable[DroppingChain]) -> Iterator[Finding]:
    for chain in chains:
        if chain.hook == "forward" and not _mentions(chain, bridge):
            yield Finding(
                _AREA,
                f"network {network.id}: packets between the ports of {bridge} go through {chain}, which drops "
                "them if no rule of it lets them pass (br_netfilter)",
                f"sysctl net.bridge.bridge-nf-call-iptables=0; or nft insert rule {chain} {_TO}, and "
                f"nft insert rule {chain} {_FROM}",
                warning=True,
            )


def _no_way_back(
    network: Network, device: str, leads_by: Callable[[IPv4Address, str], bool | None]
) -> Iterator[Finding]:
    for subnet in network.subnets:
        if not isinstance(subnet.cidr, IPv4Network):
            continue
        # One of them may be the host's own.
        some = (
            {subnet.cidr[0], subnet.cidr[-1]}
            if subnet.cidr.num_addresses < _WITH_ENDS
            else {subnet.cidr[1], subnet.cidr[-2]}
        )
        if all(leads_by(guest, device) is False for guest in some):
            yield Finding(
                _AREA,
                f"network {network.id}: this host's way to {subnet.cidr} is not by {device}: answers go elsewhere, "
                "and with a strict rp_filter questions are not taken in",
                f"ip route add {subnet.cidr} dev {device}",
                warning=True,
            )
