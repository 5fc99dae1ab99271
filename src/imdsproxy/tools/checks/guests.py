"""Checks of guests' records, reachability and access: records, daemon, MACs, routes, tokens."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from imdsproxy.controller.policy_store import read_overrides
from imdsproxy.controller.token_keys import read_token_keys
from imdsproxy.controller.token_report import USER_DATA, OpenUserData, open_trees, open_user_data
from imdsproxy.documents.dialects.respond import can_be_served
from imdsproxy.errors import ImdsproxyError, SourceUnavailable, spell_count
from imdsproxy.host.names import Naming
from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.model.entities import METADATA_IPV4, BridgeListener, InterfaceListener, Network
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import Observation, SourceName
from imdsproxy.model.policy import DEFAULT, NO_RULES, PolicyRules, PolicyScope, fold_policy
from imdsproxy.model.records import Records
from imdsproxy.model.wire import VERIFIED_PORT
from imdsproxy.network.anti_spoofing import host_rules
from imdsproxy.network.anti_spoofing.host_rules import DroppingChain, GuestBridge
from imdsproxy.tools.checks import Finding, Subject, found, refused

_TREES: Final = {"/openstack": "openstack_tokens", "/nocloud": "nocloud_tokens"}
_NAMES: Final = {"/latest": "EC2's tree", "/openstack": "/openstack", "/nocloud": "/nocloud"}
_CONCERNED: Final = ("tokens", "seal_user_data", "paths", *_TREES.values())
_SHOWN: Final = 3
_WITH_ENDS: Final = 4
"""Minimum number of addresses of a subnet that has a network and a broadcast address (RFC 3021)."""


def check_records(on: Subject) -> list[Finding]:
    """Check all record files; report refused records."""
    source = on.settings.sources.file
    if not source.enabled:
        return []
    if not source.directory.is_dir():
        return [found("records-directory", directory=source.directory)]
    read, problems = on.in_files
    number = sum(len(one.networks) + len(one.instances) for one in read)
    findings = [found("record-refused", problem=problem) for problem in problems]
    return findings or [found("records", number=number, directory=source.directory)]


def check_networks(on: Subject) -> list[Finding]:
    status = on.status if isinstance(on.status, Mapping) else {}
    return [found("not-served", **one) for one in status.get("not_served", ())]


def check_daemon(on: Subject) -> list[Finding]:
    if on.status is None:
        return []
    if isinstance(on.status, ImdsproxyError):
        return refused(on.status)
    ready, reasons = on.status["readiness"]["ready"], "; ".join(on.status["readiness"]["reasons"])
    name = "daemon" if ready else "daemon-not-ready"
    return [found(name, pid=on.status["controller"], reasons=reasons)]


def check_macs(on: Subject) -> list[Finding]:
    """Check that the kernel supports MAC filters, and that each guest's port enforces the guest's MAC."""
    if os.geteuid() != 0:
        return []
    refusal = host_rules.try_mac_filter()
    findings = [found("kernel-lacks" if refusal else "kernel", refusal=refusal)]
    naming = Naming(on.settings.host.name_prefix)
    directory = NamespaceDirectory(on.settings.paths.netns_dir)
    read = cache(lambda _: host_rules.read_rules())
    unseen: list[str] = []
    bridges: dict[str, GuestBridge] = {}
    for network in on.networks:
        if not network.mac_check:
            continue
        seen = host_rules.observe_guests(network.listener, naming, directory, read)
        bridges |= {one.name: one for one in seen.bridges}
        if seen.missing:
            findings.append(found("guests-missing", network=network.id, place=seen.missing))
        elif not seen.bridges:
            unseen.append(network.id)
    findings += [one for name in sorted(bridges) for one in _of_bridge(bridges[name])]
    if unseen:
        shown = ", ".join(unseen[:_SHOWN])
        more = f" and {len(unseen) - _SHOWN} more" if len(unseen) > _SHOWN else ""
        findings.append(found("guests-unseen", networks=shown + more))
    return findings


def _of_bridge(bridge: GuestBridge) -> Iterator[Finding]:
    if unprotected := [port for port, protection in bridge.macs.items() if not protection]:
        yield found("bridge-open", bridge=bridge.name, ports=", ".join(unprotected))
    elif bridge.macs:
        protected = ", ".join(f"{port} ({protection})" for port, protection in bridge.macs.items())
        yield found("bridge", bridge=bridge.name, ports=protected)
    if bridge.posing:
        yield found("bridge-poses", bridge=bridge.name, ports=", ".join(bridge.posing))


def check_paths(on: Subject) -> list[Finding]:
    """Check that the host's firewall rules and routes do not block guests."""
    if os.geteuid() != 0 or on.daemon is None:
        return []
    findings = find_obstacles(
        on.networks,
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
    """Yield a warning for each chain or missing route that may block guests, with the rule that helps.

    All are warnings, because the check does not evaluate the rules.

    Args:
        leads_by: Function that returns whether the host's route to an address uses a device; `None` without the device.
        bridged_are_forwarded: Bridged packets pass the forward hook (`br_netfilter`).
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
    """Yield chains of the hook in the finding's name that have no rule for the device or 169.254.169.254."""
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
                # The MAC filter redirects accepted packets to a port of its own (`network.anti_spoofing.plan`).
                verified=VERIFIED_PORT,
            )


def _no_way_back(
    network: Network, device: str, leads_by: Callable[[IPv4Address, str], bool | None]
) -> Iterator[Finding]:
    for subnet in network.subnets:
        if not isinstance(subnet.cidr, IPv4Network):
            continue
        # Two addresses, because one may be the host's own.
        inner = subnet.cidr.num_addresses >= _WITH_ENDS
        some = {subnet.cidr[inner], subnet.cidr[-1 - inner]}
        if all(leads_by(guest, device) is False for guest in some):
            yield found("no-way-back", network=network.id, subnet=subnet.cidr, device=device)


def check_trees(on: Subject) -> list[Finding]:
    """Warn about scopes whose user-data is protected in one tree and open in another (`controller.token_report`)."""
    host = on.settings.policy.book().host
    findings: list[Finding] = []
    for place, scope, rules in _scopes(on):
        # A scope without such rules would repeat the host section's finding.
        if scope is PolicyScope.HOST or any(getattr(rules, one) is not None for one in _CONCERNED):
            own = [] if scope is PolicyScope.HOST else [(scope, rules)]
            left = open_user_data(fold_policy([(PolicyScope.HOST, host), *own]).policy)
            findings += [_of_open_trees(place, left)] if left.trees else []
    return findings


def _of_open_trees(place: str, left: OpenUserData) -> Finding:
    named = " and ".join(_NAMES[tree] for tree in left.trees)
    trees = f"{named} {'give' if len(left.trees) > 1 else 'gives'}"
    if left.denied:
        denied = f"{' and '.join(left.denied)} {'are' if len(left.denied) > 1 else 'is'}"
        paths = ", ".join(f"{USER_DATA[tree]}: deny" for tree in left.trees)
        return found("trees-denied", place=place, denied=denied, trees=trees, paths=paths)
    modes = " and ".join(f"{_TREES[tree]}: required" for tree in left.trees)
    return found("trees-open", place=place, trees=trees, modes=modes)


def check_instances(on: Subject) -> list[Finding]:
    """Warn once about instances whose user-data is protected in one tree and open in another.

    The instances come from the running daemon, or else from record files and the store.
    """
    if on.daemon is not None:
        report = on.daemon.get("/v1/token-report")
        trees, number = report["open_trees"], report["open_tree_count"]
    else:
        left = open_trees(_read_inventory(on), on.settings.policy.book())
        trees, number = [asdict(one) for one in left[:_SHOWN]], len(left)
    shown = [f"{one['tree']} of {one['instance']} in {one['network']}" for one in trees[:_SHOWN]]
    more = f" and {number - len(shown)} more" if number > len(shown) else ""
    return [found("instances-open", trees=", ".join(shown) + more)] if number else []


def _read_inventory(on: Subject) -> Inventory:
    source, given = SourceName("records"), [*on.in_files[0]]
    if isinstance(on.stored, Records):
        given.append(on.stored)
    networks = {one.id: one for records in given for one in records.networks}
    instances = {one.id: one for records in given for one in records.instances}
    inventory = Inventory([source])
    inventory.observe(Observation(source, networks=networks, instances=instances))
    return inventory


def check_store(on: Subject) -> list[Finding]:
    """Check that the store is readable, unless a daemon answers."""
    return refused(on.stored) if isinstance(on.stored, SourceUnavailable) else []


def check_path_rules(on: Subject) -> list[Finding]:
    """Warn about rules for paths that no document has, which may be typing errors."""
    return [
        found("path-unserved", place=place, path=path)
        for place, _, rules in _scopes(on)
        for path, _ in rules.paths or ()
        if not can_be_served(path)
    ]


def check_hop_limits(on: Subject) -> list[Finding]:
    """Warn about scopes whose hop limit has no effect for guests of the unix listener."""
    return [
        found("hop-limit", place=place, limit=rules.hop_limit)
        for place, _, rules in _scopes(on)
        if rules.hop_limit is not None and rules.hop_limit < DEFAULT.hop_limit
        if on.settings.unix_listener.enabled
    ]


def check_token_keys(on: Subject) -> list[Finding]:
    """Check that the token key file is usable, and that only root can read it."""
    configured = on.settings.tokens.key_file
    path = configured or on.layout.token_keys
    try:
        number = spell_count(len(read_token_keys(path)), "key")
        shared = path.stat().st_mode & stat.S_IRWXG
    except ImdsproxyError as error:
        if configured is None and isinstance(error.__cause__, FileNotFoundError):
            return [found("keys-to-come", path=path)]
        return refused(error, "tokens.key_file")
    except OSError as error:
        return [found("keys-unread", path=path, reason=error.strerror)]
    return [found("keys-group" if shared else "keys", path=path, number=number)]


def check_overrides(on: Subject) -> list[Finding]:
    """Check that the file of operator overrides is readable; otherwise `run` does not start."""
    try:
        overrides, _ = read_overrides(on.layout.overrides)
    except ImdsproxyError as error:
        return refused(error)
    number = spell_count(len(overrides), "instance")
    return [found("overrides", number=number)] if overrides else []


def _scopes(on: Subject) -> Iterator[tuple[str, PolicyScope, PolicyRules]]:
    book = on.settings.policy.book()
    yield "policy.host", PolicyScope.HOST, book.host
    for scope in (PolicyScope.NETWORK, PolicyScope.PROJECT, PolicyScope.INSTANCE):
        for name, rules in getattr(book, f"{scope}s").items():
            if rules != NO_RULES:
                yield f"policy.{scope}s.{name}", scope, rules
