"""Frames on a bridge that are for the metadata address, whomever they are sent to, led to the bridge's listener.

A guest sends a packet for 169.254.169.254 to its default gateway, unless it was told that the address is on the link.
That gateway may be another machine, which knows nothing of it, or this host, which must keep the address for itself
where it is a cloud's guest too. So on each port of a bridge that has a listener the kernel writes another MAC into
such frames, that of the listener's cable, before the bridge looks where they go. Who answers a guest's ARP or ND does
not matter any more: several hosts on one LAN may each have the address, and so may an impostor.

What a guest sends from the metadata address itself is dropped where the port is a guest's (tap, veth). One in hardware
may lead to a cloud that has that address too, for this host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import BridgePort, ObservedHost
from imdsproxy.core.model import (
    METADATA_IPV4,
    METADATA_IPV6,
    METADATA_PORT,
    BridgeListener,
    MacAddress,
    Network,
    NetworkId,
)

_GUEST_KINDS: Final = frozenset({"tun", "veth"})

_ADDRESSES: Final = (("ip", METADATA_IPV4), ("ip6", METADATA_IPV6))
_WANTED: Final = tuple(
    f"{family} daddr {address} tcp dport {METADATA_PORT}" for family, address in _ADDRESSES
)

_NAME: Final = re.compile(r"[A-Za-z0-9._:@+-]+")
"""What nft(8) takes literally; no hypervisor names a device otherwise."""


@dataclass(frozen=True, slots=True, order=True)
class Diversion:
    """One bridge's.

    Attributes:
        link: Our cable's end on the bridge.
        mac: The other end's, where HAProxy listens.
        ports: All ports of the bridge but `link`.
    """

    link: str
    mac: MacAddress
    ports: tuple[BridgePort, ...]


def plan_diversions(
    networks: Mapping[NetworkId, Network], observed: ObservedHost, naming: Naming
) -> tuple[Diversion, ...]:
    """A diversion for each bridge whose cable is there and that has a port."""
    found: list[Diversion] = []
    for network in networks.values():
        listener = network.listener
        if not isinstance(listener, BridgeListener):
            continue
        inside = observed.namespaces.get(naming.namespace(network.id))
        cable = inside.devices.get(naming.inner_device) if inside is not None else None
        link = naming.link(network.id)
        ports = observed.root.ports.get(listener.bridge, ())
        others = tuple(one for one in ports if one.name != link and _NAME.fullmatch(one.name))
        if cable is not None and cable.mac and others:
            found.append(Diversion(link, MacAddress(cable.mac), others))
    return tuple(sorted(found))


def render_diversions(table: str, diversions: Iterable[Diversion]) -> str:
    """An nftables script that replaces the table of that name at once; without diversions it only removes it.

    Args:
        table: Our own table of family `bridge`.
        diversions: Those that are to be in force.
    """
    given = tuple(diversions)
    # Naming it before deleting it is how nft(8) deletes what may not be there.
    script = [f"table bridge {table}", f"delete table bridge {table}"]
    if given:
        script += _table(table, given)
    return "\n".join(script) + "\n"


def _table(table: str, given: tuple[Diversion, ...]) -> list[str]:
    ports = {port.name: one.mac for one in given for port in one.ports}
    guests = sorted({port.name for one in given for port in one.ports if port.kind in _GUEST_KINDS})
    return [
        f"table bridge {table} {{",
        f"  map cables {{ type ifname : ether_addr; {_elements(_pairs(ports))} }}",
        f"  set ports {{ type ifname; {_elements(map(_quoted, sorted(ports)))} }}",
        f"  set guests {{ type ifname; {_elements(map(_quoted, guests))} }}",
        f"  set links {{ type ifname; {_elements(_quoted(one.link) for one in given)} }}",
        "  chain arriving {",
        "    type filter hook prerouting priority -300; policy accept;",
        *(f"    iifname @guests {family} saddr {address} drop" for family, address in _ADDRESSES),
        *(f"    {one} ether daddr set iifname map @cables" for one in _WANTED),
        "  }",
        # A bridge that has not met our MAC yet sends the frame to every port.
        "  chain leaving {",
        "    type filter hook forward priority 0; policy accept;",
        *(f"    iifname @ports oifname != @links {one} drop" for one in _WANTED),
        "  }",
        "}",
    ]


def _pairs(ports: Mapping[str, MacAddress]) -> list[str]:
    return [f"{_quoted(name)} : {ports[name]}" for name in sorted(ports)]


def _quoted(name: str) -> str:
    return f'"{name}"'


def _elements(words: Iterable[str]) -> str:
    given = ", ".join(words)
    return f"elements = {{ {given} }}" if given else ""
