"""Whether guests are known and reach us: records, the running daemon, MACs, and the host's rules and routes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final

from imdsproxy.anti_spoofing.host_rules import DroppingChain, GuardedPort
from imdsproxy.cli.checks.finding import Area, Finding
from imdsproxy.config.schema import Settings
from imdsproxy.core.model import (
    METADATA_IPV4,
    METADATA_PORT,
    BridgeListener,
    InterfaceListener,
    Network,
)
from imdsproxy.core.records.document import Records
from imdsproxy.core.wire import VERIFIED_PORT
from imdsproxy.errors import HostRefused, SourceRefused
from imdsproxy.sources.file.record_file import SUFFIXES, decode_records, payload_reader

_RECORDS: Final = Area("records")
_NAMESPACES: Final = Area("namespaces")
_DAEMON: Final = Area("daemon")
_MACS: Final = Area("macs")
_PATHS: Final = Area("paths")
_WITH_ENDS = 4
"""A smaller range has no addresses of its own for network and broadcast (RFC 3021)."""

# Packets that pass the MAC filter are redirected to its own port (`anti_spoofing.plan`).
_IN = f"ip daddr {METADATA_IPV4} tcp dport {{ {METADATA_PORT}, {VERIFIED_PORT} }} accept"
_TO = f"ip daddr {METADATA_IPV4} tcp dport 80 accept"
_FROM = f"ip saddr {METADATA_IPV4} tcp sport 80 accept"


def check_records(settings: Settings) -> list[Finding]:
    """Every record file of the file source: what is refused, and which namespaces are missing."""
    source = settings.sources.file
    if not source.enabled:
        return []
    if not source.directory.is_dir():
        return [
            _RECORDS.wrong(
                f"sources.file.directory: there is no directory {source.directory}",
                "make it, or change the setting",
                SourceRefused,
            )
        ]
    found: list[Finding] = []
    count = 0
    for path, records in read_record_files(source.directory):
        if isinstance(records, OSError):
            text = f"{path}: cannot be read: {records.strerror}"
            found.append(_RECORDS.wrong(text, "", SourceRefused))
            continue
        count += len(records.networks) + len(records.instances)
        found += [
            _RECORDS.wrong(str(problem), "", SourceRefused) for problem in records.all_problems
        ]
    return found or [_RECORDS.ok(f"{count} in {source.directory}")]


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
        yield path, decode_records(data, file=str(path), read_file=payload_reader(directory))[0]


def check_daemon(status: Mapping[str, Any]) -> list[Finding]:
    """What the running daemon reports: networks that are not served, and what else is wrong."""
    left_out = status["left_out"]
    found = [
        _NAMESPACES.wrong(
            f"network {one['network']} is not served: {one['reason']}", one["hint"], HostRefused
        )
        for one in left_out
    ]
    readiness = status["readiness"]
    pid = status["controller"]
    if readiness["ready"]:
        return [*found, _DAEMON.ok(f"runs and is ready (pid {pid})")]
    reasons = "; ".join(readiness["reasons"])
    text = f"runs and is not ready (pid {pid}): {reasons}"
    return [*found, _DAEMON.wrong(text, "`imdsproxy status`", HostRefused)]


def check_kernel(refusal: str) -> Finding:
    """Whether the kernel can look at guests' MACs.

    Args:
        refusal: Of `try_mac_filter`.
    """
    if not refusal:
        return _MACS.ok("the kernel can check them")
    return _MACS.wrong(
        f"the kernel cannot check them (nf_tables, netdev chains at ingress and egress): {refusal}",
        "Linux 5.16; until then networks with MACs in their records need --no-mac-check",
        HostRefused,
    )


def checked_devices(networks: Iterable[Mapping[str, Any]]) -> list[str]:
    """The devices that networks with `mac_check` name, of records as mappings; a bridge perhaps, or not."""
    found: set[str] = set()
    for network in networks:
        listener = network.get("listener")
        if network.get("mac_check", True) and isinstance(listener, Mapping):
            device = listener.get("bridge") or listener.get("interface")
            if isinstance(device, str):
                found.add(device)
    return sorted(found)


def check_bridges(bridges: Mapping[str, Sequence[GuardedPort] | None]) -> list[Finding]:
    """Whether something keeps guests to their MACs: what imdsproxy cannot see.

    Args:
        bridges: Guests' ports by bridge; `None` where the device is none.
    """
    found: list[Finding] = []
    for bridge, ports in bridges.items():
        if not ports:
            continue
        open_ports = [port.name for port in ports if not port.by]
        if open_ports:
            found.append(
                _MACS.warn(
                    f"bridge {bridge}: nothing was seen that keeps the guests on {', '.join(open_ports)} from "
                    "using another's MAC",
                    "docs/anti-spoofing.md: nwfilter's clean-traffic, a rule for the bridge, or a locked port",
                )
            )
            continue
        seen = ", ".join(f"{port.name} ({port.by})" for port in ports)
        found.append(_MACS.ok(f"bridge {bridge}: guests are kept to their MACs: {seen}"))
    return found


def check_paths(
    networks: Iterable[Network],
    chains: Sequence[DroppingChain],
    leads_by: Callable[[IPv4Address, str], bool | None],
    *,
    bridged_are_forwarded: bool,
) -> list[Finding]:
    """What may stand in the way, each with the rule that helps. All are warnings: what a rule lets in is not known.

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
    return found or [_PATHS.ok("nothing was seen in guests' way")]


def _mentions(chain: DroppingChain, device: str) -> bool:
    """Whether a rule may have been made for it."""
    return str(METADATA_IPV4) in chain.rules or f'"{device}"' in chain.rules


def _walls(network: Network, device: str, chains: Iterable[DroppingChain]) -> Iterator[Finding]:
    for chain in chains:
        if chain.hook == "input" and not _mentions(chain, device):
            yield _PATHS.warn(
                f"network {network.id}: {chain} drops what guests on {device} send to this host, if no rule of "
                "it lets them in",
                f'nft insert rule {chain} iifname "{device}" {_IN}',
            )


def _filtered(network: Network, bridge: str, chains: Iterable[DroppingChain]) -> Iterator[Finding]:
    for chain in chains:
        if chain.hook == "forward" and not _mentions(chain, bridge):
            yield _PATHS.warn(
                f"network {network.id}: packets between the ports of {bridge} go through {chain}, which drops "
                "them if no rule of it lets them pass (br_netfilter)",
                f"sysctl net.bridge.bridge-nf-call-iptables=0; or nft insert rule {chain} {_TO}, and "
                f"nft insert rule {chain} {_FROM}",
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
            yield _PATHS.warn(
                f"network {network.id}: this host's way to {subnet.cidr} is not by {device}: answers go elsewhere, "
                "and with a strict rp_filter questions are not taken in",
                f"ip route add {subnet.cidr} dev {device}",
            )
