"""Whether guests are known and reach us: records, the running daemon, MACs, and the host's rules and routes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final

from imdsproxy.anti_spoofing import host_rules
from imdsproxy.anti_spoofing.host_rules import DroppingChain
from imdsproxy.cli.checks import Finding, Subject, refused, warn, wrong
from imdsproxy.cli.record_io import read_networks
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.model import (
    METADATA_IPV4,
    METADATA_PORT,
    BridgeListener,
    InterfaceListener,
    Network,
)
from imdsproxy.core.records import Records
from imdsproxy.core.wire import VERIFIED_PORT
from imdsproxy.errors import HostRefused, ImdsproxyError, SourceRefused
from imdsproxy.sources.file.record_file import SUFFIXES, decode_records, payload_reader

_WITH_ENDS: Final = 4
"""A smaller range has no addresses of its own for network and broadcast (RFC 3021)."""

# Packets that pass the MAC filter are redirected to its own port (`anti_spoofing.plan`).
_IN: Final = f"ip daddr {METADATA_IPV4} tcp dport {{ {METADATA_PORT}, {VERIFIED_PORT} }} accept"
_TO: Final = f"ip daddr {METADATA_IPV4} tcp dport 80 accept"
_FROM: Final = f"ip saddr {METADATA_IPV4} tcp sport 80 accept"


def check_records(on: Subject) -> list[Finding]:
    """Every record file of the file source: what is refused."""
    source = on.settings.sources.file
    if not source.enabled:
        return []
    if not source.directory.is_dir():
        text = f"sources.file.directory: there is no directory {source.directory}"
        return [wrong(text, "make it, or change the setting", SourceRefused)]
    problems: list[str] = []
    count = 0
    for path, records in read_record_files(source.directory):
        if isinstance(records, OSError):
            problems.append(f"{path}: cannot be read: {records.strerror}")
            continue
        count += len(records.networks) + len(records.instances)
        problems += map(str, records.all_problems)
    found = [wrong(problem, "", SourceRefused) for problem in problems]
    return found or [Finding(f"{count} in {source.directory}")]


def read_record_files(directory: Path) -> Iterator[tuple[Path, Records | OSError]]:
    """What each record file of a directory holds, or why it cannot be read."""
    for path in sorted(directory.iterdir()):
        if path.suffix not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            data = path.read_bytes()
        except OSError as error:
            yield path, error
            continue
        yield path, decode_records(data, file=str(path), read_file=payload_reader(directory))


def check_networks(on: Subject) -> list[Finding]:
    """The networks that the running daemon does not serve."""
    status = on.status if isinstance(on.status, Mapping) else {}
    return [
        wrong(f"network {one['network']} is not served: {one['reason']}", one["hint"], HostRefused)
        for one in status.get("left_out", ())
    ]


def check_daemon(on: Subject) -> list[Finding]:
    """Whether the running daemon is ready, or why it cannot be asked."""
    if on.status is None:
        return []
    if isinstance(on.status, ImdsproxyError):
        return refused(on.status)
    readiness, pid = on.status["readiness"], on.status["controller"]
    if readiness["ready"]:
        return [Finding(f"runs and is ready (pid {pid})")]
    text = f"runs and is not ready (pid {pid}): {'; '.join(readiness['reasons'])}"
    return [wrong(text, "`imdsproxy status`", HostRefused)]


def check_macs(on: Subject) -> list[Finding]:
    """Whether the kernel can look at guests' MACs, and whether something keeps guests to theirs."""
    if os.geteuid() != 0:
        return []
    found = [kernel_finding(host_rules.try_mac_filter())]
    if on.daemon is None:
        return found
    devices = checked_devices(one["record"] for one in on.daemon.get("/v1/networks"))
    if devices:
        rules, naming = host_rules.read_rules(), Naming(on.settings.host.name_prefix)
        seen = {device: host_rules.observe_bridge(device, rules, naming) for device in devices}
        found += [bridge_finding(bridge, ports) for bridge, ports in seen.items() if ports]
    return found


def kernel_finding(refusal: str) -> Finding:
    """Whether the kernel can look at guests' MACs.

    Args:
        refusal: Of `try_mac_filter`.
    """
    if not refusal:
        return Finding("the kernel can check them")
    return wrong(
        f"the kernel cannot check them (nf_tables, netdev chains at ingress and egress): {refusal}",
        "Linux 5.16; until then networks with MACs in their records need --no-mac-check",
        HostRefused,
    )


def checked_devices(networks: Iterable[Mapping[str, Any]]) -> list[str]:
    """The devices that networks with `mac_check` name, of records as mappings; a bridge perhaps, or not."""
    listeners = (one.get("listener") for one in networks if one.get("mac_check", True))
    devices = (
        one.get("bridge") or one.get("interface") for one in listeners if isinstance(one, Mapping)
    )
    return sorted({device for device in devices if isinstance(device, str)})


def bridge_finding(bridge: str, ports: Mapping[str, str]) -> Finding:
    """Whether something keeps a bridge's guests to their MACs: what imdsproxy cannot see.

    Args:
        bridge: Its name.
        ports: Of `observe_bridge`.
    """
    open_ports = [port for port, guard in ports.items() if not guard]
    if open_ports:
        return warn(
            f"bridge {bridge}: nothing was seen that keeps the guests on {', '.join(open_ports)} from "
            "using another's MAC",
            "docs/anti-spoofing.md: nwfilter's clean-traffic, a rule for the bridge, or a locked port",
        )
    seen = ", ".join(f"{port} ({guard})" for port, guard in ports.items())
    return Finding(f"bridge {bridge}: guests are kept to their MACs: {seen}")


def check_paths(on: Subject) -> list[Finding]:
    """Whether the host's rules and routes may stand in guests' way."""
    if os.geteuid() != 0 or on.daemon is None:
        return []
    found = find_obstacles(
        read_networks(on.daemon),
        host_rules.read_dropping_chains(),
        host_rules.leads_by,
        bridged_are_forwarded=host_rules.passes_forward_chain(),
    )
    return list(found) or [Finding("nothing was seen in guests' way")]


def find_obstacles(
    networks: Iterable[Network],
    chains: Sequence[DroppingChain],
    leads_by: Callable[[IPv4Address, str], bool | None],
    *,
    bridged_are_forwarded: bool,
) -> Iterator[Finding]:
    """What may stand in the way, each with the rule that helps. All are warnings: what a rule lets in is not known.

    Args:
        networks: All of them.
        chains: Of the host, those that drop what they do not know.
        leads_by: Whether the host's own way to an address is by a device; `None` where there is no such device.
        bridged_are_forwarded: `br_netfilter` is in force.
    """
    for network in networks:
        listener = network.listener
        if isinstance(listener, InterfaceListener):
            device = listener.device
            for chain in _without_rule_for(device, chains, "input"):
                yield warn(
                    f"network {network.id}: {chain} drops what guests on {device} send to this host, if no rule of "
                    "it lets them in",
                    f'nft insert rule {chain} iifname "{device}" {_IN}',
                )
            yield from _no_way_back(network, device, leads_by)
        elif isinstance(listener, BridgeListener) and bridged_are_forwarded:
            for chain in _without_rule_for(listener.bridge, chains, "forward"):
                yield warn(
                    f"network {network.id}: packets between the ports of {listener.bridge} go through {chain}, which "
                    "drops them if no rule of it lets them pass (br_netfilter)",
                    f"sysctl net.bridge.bridge-nf-call-iptables=0; or nft insert rule {chain} {_TO}, and "
                    f"nft insert rule {chain} {_FROM}",
                )


def _without_rule_for(
    device: str, chains: Iterable[DroppingChain], hook: str
) -> Iterator[DroppingChain]:
    for chain in chains:
        if chain.hook == hook and not (
            str(METADATA_IPV4) in chain.rules or f'"{device}"' in chain.rules
        ):
            yield chain


def _no_way_back(
    network: Network, device: str, leads_by: Callable[[IPv4Address, str], bool | None]
) -> Iterator[Finding]:
    for subnet in network.subnets:
        if not isinstance(subnet.cidr, IPv4Network):
            continue
        # One of them may be the host's own.
        inner = subnet.cidr.num_addresses >= _WITH_ENDS
        some = {subnet.cidr[inner], subnet.cidr[-1 - inner]}
        if all(leads_by(guest, device) is False for guest in some):
            yield warn(
                f"network {network.id}: this host's way to {subnet.cidr} is not by {device}: answers go elsewhere, "
                "and with a strict rp_filter questions are not taken in",
                f"ip route add {subnet.cidr} dev {device}",
            )
