"""Observation of other programs' rules for guests' packets, and of the kernel's support for MAC filters. Read only."""

import asyncio
import contextlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from imdsproxy.host.names import Naming
from imdsproxy.host.namespaces import (
    NamespaceDirectory,
    NamespaceMissing,
    NamespaceThread,
    unshare_network,
)
from imdsproxy.host.netlink import (
    bridge_ports,
    find_link,
    list_links,
    route_device,
    veth_ends,
)
from imdsproxy.host.nftables import Batch, commit
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.process import run_program
from imdsproxy.host.state import ObservedDevice
from imdsproxy.model.entities import BridgeListener, Listener, NamespaceListener
from imdsproxy.network.anti_spoofing.rules import fill_mac_filter

_GUEST_KINDS: Final = frozenset({"tun", "veth"})
_RULE_READERS: Final = (
    ("nft", "list", "ruleset", "bridge"),
    ("nft", "list", "ruleset", "netdev"),
    ("ebtables-legacy-save",),
)
_READ_S: Final = 5
_FAMILIES: Final = frozenset({"inet", "ip"})
_HOOKS: Final = frozenset({"input", "forward"})
_BRIDGED: Final = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
_TABLE: Final = re.compile(r"(?m)^(?=table )")
_SOURCE: Final = re.compile(r"ether saddr|arp saddr ether|@ll,48,48|-s ")
_ANSWERER: Final = re.compile(r"arp saddr ip|--arp-ip-src")


@dataclass(frozen=True, slots=True)
class GuestBridge:
    """Bridge with guests.

    Attributes:
        macs: Description, by port, of the rule that binds the guest to its MAC; empty without such a rule.
        posing: Ports whose guest may answer ARP and ND in place of the metadata service.
    """

    name: str
    macs: Mapping[str, str]
    posing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GuestBridges:
    """Bridges of a network's guests.

    Attributes:
        missing: Device or namespace that does not exist in the observing process's network namespace.
    """

    bridges: tuple[GuestBridge, ...] = ()
    missing: str = ""


def observe_guests(
    listener: Listener,
    naming: Naming,
    directory: NamespaceDirectory,
    read: Callable[[str | None], str],
) -> GuestBridges:
    """Observe the bridges of a network's guests: in this namespace, and behind a namespace's devices.

    Args:
        read: Lists the rules (`read_rules`) in the calling thread's namespace. Its argument is the namespace's name, or
            `None` for that of this process.

    Raises:
        OSError: The kernel refuses.
        HostRefused: The kernel refuses, or a program hangs.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_observe_guests, listener, naming, directory, read).result()


def _observe_guests(
    listener: Listener,
    naming: Naming,
    directory: NamespaceDirectory,
    read: Callable[[str | None], str],
) -> GuestBridges:
    if not isinstance(listener, NamespaceListener):
        name = listener.bridge if isinstance(listener, BridgeListener) else listener.device
        with NetlinkSocket() as channel:
            device = find_link(channel, name)
            if device is None:
                return GuestBridges(missing=f"device {name}")
            # No other guest gets packets for the metadata address (`network.listeners.rules`).
            seen = _observe_bridge(channel, device, naming, read, led=True)
            return GuestBridges(tuple(filter(None, [seen])))
    namespace, found = listener.namespace, list[GuestBridge | None]()
    with (
        contextlib.closing(NamespaceThread(directory)) as thread,
        contextlib.suppress(NamespaceMissing),
    ):
        with thread.inside(namespace), NetlinkSocket() as channel:
            there, far = list_links(channel), veth_ends(channel)
            found += [
                _observe_bridge(channel, one, naming, read, namespace=namespace) for one in there
            ]
        with NetlinkSocket() as channel:
            ends = veth_ends(channel)
            here = {one.index: one for one in list_links(channel)}
            # Compare both ends: the index alone may belong to another device.
            ports = [here[peer] for own, peer in far.items() if ends.get(peer) == own]
            own_ports = frozenset(one.name for one in ports)
            masters = dict.fromkeys(one.master for one in ports if one.master in here)
            found += [
                _observe_bridge(channel, here[one], naming, read, own=own_ports) for one in masters
            ]
        return GuestBridges(tuple(filter(None, found)))
    return GuestBridges(missing=f"namespace {namespace}")


def _observe_bridge(
    channel: NetlinkSocket,
    device: ObservedDevice,
    naming: Naming,
    read: Callable[[str | None], str],
    *,
    namespace: str | None = None,
    own: Collection[str] = (),
    led: bool = False,
) -> GuestBridge | None:
    """Observe a bridge; `None` for other devices.

    On ports in `own`, which belong to the service, there are no guests. If guests are `led`, none can pose as the
    metadata service.
    """
    if device.kind != "bridge":
        return None
    ports = sorted(bridge_ports(channel, device.index), key=lambda one: one.device.name)
    guests = [
        one
        for one in ports
        if one.device.kind in _GUEST_KINDS
        and one.device.name not in own
        and not naming.is_link(one.device.name)
    ]
    rules = read(namespace) if guests else ""
    macs = {one.device.name: one.learns or rules_for(one.device.name, rules) for one in guests}
    names = [one.device.name for one in guests if not one.isolated]
    posing = [name for name in names if not rules_for(name, rules, _ANSWERER)]
    where = "" if namespace is None else f" in namespace {namespace}"
    # A single guest has no neighbour.
    return GuestBridge(device.name + where, macs, () if led or len(guests) < 2 else tuple(posing))  # noqa: PLR2004


def rules_for(port: str, rules: str, what: re.Pattern[str] = _SOURCE) -> str:
    """Return a description if a rule's table names a port and matches `what`, such as a source MAC; else empty."""
    name = re.compile(rf"(?<![\w.-]){re.escape(port)}(?![\w.-])")
    found = any(name.search(one) and what.search(one) for one in _TABLE.split(rules))
    return "a rule" if found else ""


def read_rules(commands: Iterable[tuple[str, ...]] = _RULE_READERS) -> str:
    """Read all rules for bridges and devices, with the installed programs that list them.

    Raises:
        HostRefused: A program hangs.
    """
    listed = (_run(*command) for command in commands)
    return "\n".join(text for _, text in filter(None, listed))


def _run(program: str, *arguments: str) -> tuple[int, str] | None:
    path = shutil.which(program)
    if path is None:
        return None
    return asyncio.run(run_program(path, *arguments, deadline_s=_READ_S, errors=False))


def try_mac_filter() -> str:
    """Try a MAC filter in a temporary network namespace. Return why the kernel refuses; empty if it does not."""

    def attempt() -> str:
        try:
            unshare_network()
            batch = Batch("imdsproxy-check")
            batch.make_table()
            fill_mac_filter(batch, ("lo",))
            commit(batch)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(attempt).result()


@dataclass(frozen=True, slots=True)
class DroppingChain:
    """Base chain for IPv4 with policy `drop`.

    Attributes:
        rules: All rules of the chain's table, as text to search.
    """

    name: str
    hook: str
    rules: str = ""


def read_dropping_chains() -> tuple[DroppingChain, ...]:
    """Read the dropping chains that nft(8) lists; without those of iptables-legacy, and empty without nft(8).

    Raises:
        HostRefused: nft hangs.
    """
    found = _run("nft", "--json", "list", "ruleset")
    return () if found is None or found[0] != 0 else parse_dropping_chains(found[1])


def parse_dropping_chains(ruleset: str) -> tuple[DroppingChain, ...]:
    """Parse the dropping chains in the output of `nft --json list ruleset` (libnftables-json(5))."""
    entries: Sequence[Mapping[str, Mapping[str, object]]] = json.loads(ruleset)["nftables"]
    found = []
    for chain in (one["chain"] for one in entries if "chain" in one):
        family, table, hook = (str(chain.get(key)) for key in ("family", "table", "hook"))
        if chain.get("policy") == "drop" and hook in _HOOKS and family in _FAMILIES:
            rules = [one["rule"] for one in entries if "rule" in one]
            own = [one for one in rules if (one["family"], one["table"]) == (family, table)]
            name = f"{family} {table} {chain['name']}"
            found.append(DroppingChain(name, hook, json.dumps(own)))
    return tuple(found)


def passes_forward_chain(setting: Path = _BRIDGED) -> bool:
    """Return whether packets between a bridge's ports pass IPv4's chains (br_netfilter)."""
    try:
        return setting.read_text().strip() == "1"
    except FileNotFoundError:
        return False


def leads_by(address: IPv4Address, device: str) -> bool | None:
    """Return whether the host's own route to an address uses a device; `None` if there is no such device."""
    with NetlinkSocket() as channel:
        link = find_link(channel, device)
        return None if link is None else route_device(channel, address) == link.index
