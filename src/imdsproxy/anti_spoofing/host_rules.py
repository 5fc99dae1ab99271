"""What the host does to guests' packets beside our own tables, and whether its kernel can filter by MAC. Read only."""

import asyncio
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from imdsproxy.anti_spoofing.rules import fill_mac_filter
from imdsproxy.core.hostnames import Naming
from imdsproxy.host.namespaces import unshare_network
from imdsproxy.host.netlink import find_link, port_guards, route_device
from imdsproxy.host.nftables import Batch, commit
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.process import run_program

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


def observe_bridge(bridge: str, rules: str, naming: Naming) -> dict[str, str] | None:
    """What keeps the guest on each port of a bridge to its MAC; `None` where there is no such bridge.

    Args:
        bridge: Its name.
        rules: Of `read_rules`.
        naming: How our own ports are named.

    Returns:
        Words by the port's name; empty where nothing was seen.

    Raises:
        OSError: The kernel refuses.
    """
    with NetlinkSocket() as channel:
        device = find_link(channel, bridge)
        if device is None or device.kind != "bridge":
            return None
        guards = sorted(port_guards(channel, device.index), key=lambda one: one[0].name)
    return {
        port.name: guard or rules_for(port.name, rules)
        for port, guard in guards
        if port.kind in _GUEST_KINDS and not naming.is_link(port.name)
    }


def rules_for(port: str, rules: str) -> str:
    """Words for a rule that names a port beside a source MAC; empty where none does."""
    name = re.compile(rf"(?<![\w.-]){re.escape(port)}(?![\w.-])")
    found = any(name.search(one) and _SOURCE.search(one) for one in _TABLE.split(rules))
    return "a rule" if found else ""


def read_rules(commands: Iterable[tuple[str, ...]] = _RULE_READERS) -> str:
    """Every rule for bridges and devices, as far as there are programs that list them.

    Raises:
        HostRefused: One of them hangs.
    """
    listed = (_run(*command) for command in commands)
    return "\n".join(text for _, text in filter(None, listed))


def _run(program: str, *arguments: str) -> tuple[int, str] | None:
    """Status and output of a program; `None` where it is not installed."""
    path = shutil.which(program)
    if path is None:
        return None
    return asyncio.run(run_program(path, *arguments, deadline_s=_READ_S, errors=False))


def try_mac_filter() -> str:
    """Why the kernel cannot have a MAC filter; empty where it can. Tried in a network namespace that ends at once."""

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
    """A base chain for IPv4 that drops what no rule of it accepts.

    Attributes:
        name: Family, table and its own name.
        hook: `input` or `forward`.
        rules: All rules of its table, as text to look for words in.
    """

    name: str
    hook: str
    rules: str = ""


def read_dropping_chains() -> tuple[DroppingChain, ...]:
    """The dropping chains that nft(8) lists, which are not those of iptables-legacy; none without nft(8).

    Raises:
        HostRefused: nft hangs.
    """
    found = _run("nft", "--json", "list", "ruleset")
    return () if found is None or found[0] != 0 else parse_dropping_chains(found[1])


def parse_dropping_chains(ruleset: str) -> tuple[DroppingChain, ...]:
    """Out of `nft --json list ruleset` (libnftables-json(5))."""
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
    """Whether packets between a bridge's ports go through IPv4's chains (br_netfilter)."""
    try:
        return setting.read_text().strip() == "1"
    except FileNotFoundError:
        return False


def leads_by(address: IPv4Address, device: str) -> bool | None:
    """Whether the host's own way to an address is by a device; `None` where there is no such device."""
    with NetlinkSocket() as channel:
        link = find_link(channel, device)
        return None if link is None else route_device(channel, address) == link.index
