"""Which of the host's own rules stand in the way of guests' packets; looked at, never changed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final, cast

from imdsproxy.host.netlink import find_link, route_device
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.host.programs import run_program

_FAMILIES: Final = frozenset({"inet", "ip"})
_READ_S: Final = 5
_BRIDGED: Final = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


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
    program = shutil.which("nft")
    if program is None:
        return ()
    status, text = asyncio.run(
        run_program(program, "--json", "list", "ruleset", deadline_s=_READ_S, errors=False)
    )
    return parse_dropping_chains(text) if status == 0 else ()


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
