"""Whether guests are known and reach us: records, the running daemon, MACs, and the host's rules and routes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from imdsproxy.anti_spoofing import host_rules
from imdsproxy.anti_spoofing.host_rules import DroppingChain
from imdsproxy.cli.checks import Finding, Subject, found, refused
from imdsproxy.cli.record_io import read_networks
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.model import METADATA_IPV4, BridgeListener, InterfaceListener, Network
from imdsproxy.core.records import Records
from imdsproxy.core.wire import VERIFIED_PORT
from imdsproxy.errors import ImdsproxyError
from imdsproxy.sources.file.record_file import SUFFIXES, decode_records, payload_reader

_WITH_ENDS: Final = 4
"""A smaller range has no addresses of its own for network and broadcast (RFC 3021)."""


def check_records(on: Subject) -> list[Finding]:
    """Every record file of the file source: what is refused."""
    source = on.settings.sources.file
    if not source.enabled:
        return []
    if not source.directory.is_dir():
        return [found("records-directory", directory=source.directory)]
    read, problems = read_record_files(source.directory)
    number = sum(len(one.networks) + len(one.instances) for one in read)
    findings = [found("record-refused", problem=problem) for problem in problems]
    return findings or [found("records", number=number, directory=source.directory)]


def read_record_files(directory: Path) -> tuple[list[Records], list[str]]:
    """What the record files of a directory hold, and everything that is wrong with them."""
    read: list[Records] = []
    problems: list[str] = []
    for path in sorted(directory.iterdir()):
        if path.suffix not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            data = path.read_bytes()
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
            continue
        read.append(decode_records(data, file=str(path), read_file=payload_reader(directory)))
        problems += map(str, read[-1].all_problems)
    return read, problems


def check_networks(on: Subject) -> list[Finding]:
    """The networks that the running daemon does not serve."""
    status = on.status if isinstance(on.status, Mapping) else {}
    return [found("not-served", **one) for one in status.get("left_out", ())]


def check_daemon(on: Subject) -> list[Finding]:
    """Whether the running daemon is ready, or why it cannot be asked."""
    if on.status is None:
        return []
    if isinstance(on.status, ImdsproxyError):
        return refused(on.status)
    ready, reasons = on.status["readiness"]["ready"], "; ".join(on.status["readiness"]["reasons"])
    name = "daemon" if ready else "daemon-not-ready"
    return [found(name, pid=on.status["controller"], reasons=reasons)]


def check_macs(on: Subject) -> list[Finding]:
    """Whether the kernel can look at guests' MACs, and whether something keeps guests to theirs."""
    if os.geteuid() != 0:
        return []
    refusal = host_rules.try_mac_filter()
    findings = [found("kernel-lacks" if refusal else "kernel", refusal=refusal)]
    devices = [] if on.daemon is None else checked_devices(read_networks(on.daemon))
    if devices:
        rules, naming = host_rules.read_rules(), Naming(on.settings.host.name_prefix)
        seen = {device: host_rules.observe_bridge(device, rules, naming) for device in devices}
        findings += [bridge_finding(bridge, ports) for bridge, ports in seen.items() if ports]
    return findings


def checked_devices(networks: Iterable[Network]) -> list[str]:
    """The devices that networks with `mac_check` name; a bridge perhaps, or not."""
    listeners = [network.listener for network in networks if network.mac_check]
    bridges = {one.bridge for one in listeners if isinstance(one, BridgeListener)}
    return sorted(bridges | {one.device for one in listeners if isinstance(one, InterfaceListener)})


def bridge_finding(bridge: str, ports: Mapping[str, str]) -> Finding:
    """Whether something keeps a bridge's guests to their MACs: what imdsproxy cannot see.

    Args:
        bridge: Its name.
        ports: Of `observe_bridge`.
    """
    if open_ports := [port for port, guard in ports.items() if not guard]:
        return found("bridge-open", bridge=bridge, ports=", ".join(open_ports))
    seen = ", ".join(f"{port} ({guard})" for port, guard in ports.items())
    return found("bridge", bridge=bridge, ports=seen)


def check_paths(on: Subject) -> list[Finding]:
    """Whether the host's rules and routes may stand in guests' way."""
    if os.geteuid() != 0 or on.daemon is None:
        return []
    findings = find_obstacles(
        read_networks(on.daemon),
        host_rules.read_dropping_chains(),
        host_rules.leads_by,
        bridged_are_forwarded=host_rules.passes_forward_chain(),
    )
    return list(findings) or [found("paths")]


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
            yield from _drops("input-drops", network, listener.device, chains)
            yield from _no_way_back(network, listener.device, leads_by)
        elif isinstance(listener, BridgeListener) and bridged_are_forwarded:
            yield from _drops("forward-drops", network, listener.bridge, chains)


def _drops(
    name: str, network: Network, device: str, chains: Sequence[DroppingChain]
) -> Iterator[Finding]:
    """The chains of a hook, as the finding names it, without a rule for the device or for our address."""
    hook = name.removesuffix("-drops")
    for chain in chains:
        rules = chain.rules
        if chain.hook == hook and str(METADATA_IPV4) not in rules and f'"{device}"' not in rules:
            yield found(
                name,
                network=network.id,
                device=device,
                chain=chain.name,
                address=METADATA_IPV4,
                # Packets that pass the MAC filter are redirected to its own port (`anti_spoofing.plan`).
                verified=VERIFIED_PORT,
            )


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
            yield found("no-way-back", network=network.id, subnet=subnet.cidr, device=device)
