"""What the host does to guests' packets beside our own tables, and whether its kernel can filter by MAC. Read only."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final, cast

from imdsproxy.anti_spoofing.filter_rules import fill_mac_filter
from imdsproxy.core.hostnames import Naming
from imdsproxy.host.namespaces import unshare_network
from imdsproxy.host.netlink import RTM_GETLINK, bridge_ports, find_link, route_device
from imdsproxy.host.nftables import Batch, commit
from imdsproxy.host.nlmessages import NetlinkSocket, parse_attributes
from imdsproxy.host.process import run_program

_GUEST_KINDS: Final = frozenset({"tun", "veth"})
_IFINFO: Final = struct.Struct("=BxHiII")
_LINKINFO, _SLAVE_DATA = 18, 5
_LEARNING, _LOCKED = 8, 39
_RULE_READERS: Final = (
    ("nft", "list", "ruleset", "bridge"),
    ("nft", "list", "ruleset", "netdev"),
    ("ebtables-legacy-save",),
)
_READ_S: Final = 5
_FAMILIES: Final = frozenset({"inet", "ip"})
_BRIDGED: Final = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
_TABLE: Final = re.compile(r"(?m)^(?=table )")
_SOURCE: Final = re.compile(r"ether saddr|arp saddr ether|@ll,48,48|-s ")


@dataclass(frozen=True, slots=True)
class GuardedPort:
    """A guest's port of a bridge.

    Attributes:
        by: What keeps the guest to its MAC, in words; empty where nothing was seen.
    """

    name: str
    by: str = ""


def observe_bridge(bridge: str, rules: str, naming: Naming) -> tuple[GuardedPort, ...] | None:
    """The guests' ports of a bridge of this host; `None` where there is no such bridge.

    Args:
        bridge: Its name.
        rules: Of `read_rules`.
        naming: How our own ports are named.

    Raises:
        OSError: The kernel refuses.
    """
    with NetlinkSocket() as channel:
        device = find_link(channel, bridge)
        if device is None or device.kind != "bridge":
            return None
        ports = [
            one
            for one in bridge_ports(channel, device.index)
            if one.kind in _GUEST_KINDS and not naming.is_link(one.name)
        ]
        return tuple(
            GuardedPort(one.name, _flags(channel, one.name) or rules_for(one.name, rules))
            for one in ports
        )


def _flags(channel: NetlinkSocket, name: str) -> str:
    found = find_link(channel, name)
    if found is None:
        return ""
    answer = channel.get(RTM_GETLINK, _IFINFO.pack(socket.AF_UNSPEC, 0, found.index, 0, 0))
    info = parse_attributes(answer.payload, _IFINFO.size).get(_LINKINFO, b"")
    port = parse_attributes(parse_attributes(info).get(_SLAVE_DATA, b""))

    def on(flag: int) -> bool:
        return port.get(flag, b"\0") != b"\0"

    if on(_LOCKED):
        return "locked"
    if _LEARNING in port and not on(_LEARNING):
        return "learning off"
    return ""


def rules_for(port: str, rules: str) -> str:
    """Words for a rule that names a port beside a source MAC; empty where none does."""
    name = re.compile(rf"(?<![\w.-]){re.escape(port)}(?![\w.-])")
    for table in _TABLE.split(rules):
        if name.search(table) and _SOURCE.search(table):
            return "a rule"
    return ""


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
    refusals: list[str] = []

    def attempt() -> None:
        try:
            unshare_network()
            batch = Batch("imdsproxy-check")
            batch.make_table()
            fill_mac_filter(batch, ("lo",))
            commit(batch)
        except OSError as error:
            refusals.append(error.strerror or str(error))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return refusals[0] if refusals else ""


@dataclass(frozen=True, slots=True)
class DroppingChain:
    """A base chain for IPv4 that drops what no rule of it accepts.

    Attributes:
        hook: `input` or `forward`.
        rules: All rules of its table, as text to look for words in.
    """

    family: str
    table: str
    name: str
    hook: str
    rules: str = ""

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


def read_dropping_chains() -> tuple[DroppingChain, ...]:
    """The dropping chains that nft(8) lists, which are not those of iptables-legacy; none without nft(8).

    Raises:
        HostRefused: nft hangs.
    """
    found = _run("nft", "--json", "list", "ruleset")
    return () if found is None or found[0] != 0 else parse_dropping_chains(found[1])


def parse_dropping_chains(ruleset: str) -> tuple[DroppingChain, ...]:
    """Out of `nft --json list ruleset` (libnftables-json(5))."""
    entries = cast("Sequence[Mapping[str, object]]", json.loads(ruleset)["nftables"])
    found = []
    for chain in _of_kind(entries, "chain"):
        dropping = chain.get("policy") == "drop" and chain.get("hook") in ("input", "forward")
        if dropping and chain["family"] in _FAMILIES:
            place = (str(chain["family"]), str(chain["table"]))
            rules = [
                one for one in _of_kind(entries, "rule") if (one["family"], one["table"]) == place
            ]
            name, hook = str(chain["name"]), str(chain["hook"])
            found.append(DroppingChain(*place, name, hook, json.dumps(rules)))
    return tuple(found)


def _of_kind(entries: Sequence[Mapping[str, object]], kind: str) -> Iterator[Mapping[str, object]]:
    return (cast("Mapping[str, object]", one[kind]) for one in entries if kind in one)


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
