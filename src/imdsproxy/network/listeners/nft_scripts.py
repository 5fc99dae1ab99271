"""Scripts for nft(8) that keep guests of bridges and of the host's own devices on their listener. Pure.

ARP: by default the host answers for each of its addresses on every device, so a guest of any bridge could reach a
listener on another device. The script lets the host answer for the metadata address only on devices of interface
listeners.

Diversions: a guest without a route sends packets for 169.254.169.254 to its default gateway. The gateway may be another
machine, or this host, which must not take the address if it is a guest of a cloud itself. So on each port of a bridge
with a listener, the kernel replaces the destination MAC of such frames before the bridge forwards them. The new MAC is
that of the listener's veth, or that of the bridge if the bridge is an interface listener's device. Answers to ARP or ND
then do not matter: several hosts on one LAN, and even an impostor, may have the address. Frames *from* the metadata
address are dropped on ports of guests (tap, veth). They pass on a NIC, which may lead to a cloud that serves this host
at that address.

With br_netfilter, which Docker loads, bridged packets also pass the host's NAT. libvirt's rule would replace a guest's
address by the host's, so the script marks the packets `notrack`: NAT skips untracked packets.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from imdsproxy.host.state import ObservedDevice, ObservedHost
from imdsproxy.model.entities import (
    METADATA_IPV4,
    METADATA_IPV6,
    METADATA_PORT,
    BridgeListener,
    InterfaceListener,
    Network,
    NetworkId,
)
from imdsproxy.network.names import Naming

_GUEST_KINDS: Final = frozenset({"tun", "veth"})

_ADDRESSES: Final = (("ip", METADATA_IPV4), ("ip6", METADATA_IPV6))
_WANTED: Final = tuple(
    f"{family} daddr {address} tcp dport {METADATA_PORT}" for family, address in _ADDRESSES
)

_NAME: Final = re.compile(r"[A-Za-z0-9._:@+-]+")
"""Device names that nft(8) takes literally. No hypervisor uses others."""


def render_diversions(
    networks: Mapping[NetworkId, Network], observed: ObservedHost, naming: Naming
) -> str:
    """Render a script that replaces our table of family `bridge` atomically.

    The table covers each bridge that has another port and either our veth or an interface listener. Without such a
    bridge, the script only removes the table.
    """
    on_bridges: dict[int, list[ObservedDevice]] = {}
    for device in observed.root.devices.values():
        on_bridges.setdefault(device.master, []).append(device)
    links: list[str] = []
    cables: dict[str, str] = {}
    inward: dict[str, str] = {}
    guests: set[str] = set()
    for network in sorted(networks.values(), key=lambda one: one.id):
        led = _led_to(network, observed, naming)
        if led is None:
            continue
        bridge, mac, link = led
        given = on_bridges.get(bridge.index, ())
        ports = [one for one in given if one.name != link and _NAME.fullmatch(one.name)]
        if ports and link is not None:
            links.append(link)
        macs = inward if link is None else cables
        macs |= {one.name: mac for one in ports}
        guests |= {one.name for one in ports if one.kind in _GUEST_KINDS}
    # If a bridge has both, the veth gets the frames.
    inward = {name: mac for name, mac in inward.items() if name not in cables}
    ports_of_all = sorted({*cables, *inward})
    body = [
        f"  map cables {{ type ifname : ether_addr; {_map_elements(cables)} }}",
        f"  map inward {{ type ifname : ether_addr; {_map_elements(inward)} }}",
        f"  set ports {{ type ifname; {_elements(map(_quoted, ports_of_all))} }}",
        f"  set guests {{ type ifname; {_elements(map(_quoted, sorted(guests)))} }}",
        f"  set links {{ type ifname; {_elements(map(_quoted, links))} }}",
        "  chain arriving {",
        "    type filter hook prerouting priority -300; policy accept;",
        *(f"    iifname @guests {family} saddr {address} drop" for family, address in _ADDRESSES),
        *(f"    {one} ether daddr set iifname map @cables notrack" for one in _WANTED),
        # The bridge has compared the MAC already: without the new packet type the host would drop the packet.
        *(
            f"    {one} ether daddr set iifname map @inward meta pkttype set host"
            for one in _WANTED
        ),
        *(f"    iifname @links {family} saddr {address} notrack" for family, address in _ADDRESSES),
        "  }",
        # A bridge that has not learned our MAC yet sends the frame to every port.
        "  chain leaving {",
        "    type filter hook forward priority 0; policy accept;",
        *(f"    iifname @ports oifname != @links {one} drop" for one in _WANTED),
        "  }",
    ]
    return _replace_table("bridge", naming.prefix, body if ports_of_all else [])


def _led_to(
    network: Network, observed: ObservedHost, naming: Naming
) -> tuple[ObservedDevice, str, str | None] | None:
    """Return a network's bridge, the MAC for its guests' requests, and our veth, if any; `None` without a bridge."""
    listener, root = network.listener, observed.root.devices
    if isinstance(listener, InterfaceListener):
        device = root.get(listener.device)
        bridged = device is not None and device.kind == "bridge" and bool(device.mac)
        return (device, device.mac, None) if device is not None and bridged else None
    if not isinstance(listener, BridgeListener):
        return None
    inside = observed.namespaces.get(naming.namespace(network.id))
    veth = inside.devices.get(naming.inner_device) if inside is not None else None
    bridge = root.get(listener.bridge)
    if bridge is None or veth is None or not veth.mac:
        return None
    return bridge, veth.mac, naming.link(network.id)


def render_arp_guard(table: str, networks: Iterable[Network]) -> str:
    """Render a script that replaces the `arp` table atomically; without interface listeners it only removes the table.

    Args:
        table: Name of our table of family `arp`.
        networks: All networks.
    """
    listeners = (one.listener for one in networks)
    devices = {one.device for one in listeners if isinstance(one, InterfaceListener)}
    names = ", ".join(map(_quoted, sorted(devices)))
    body = [
        "  chain input {",
        "    type filter hook input priority 0; policy accept;",
        f"    iifname != {{ {names} }} arp operation request arp daddr ip {METADATA_IPV4} drop",
        "  }",
    ]
    return _replace_table("arp", table, body if devices else [])


def _replace_table(family: str, table: str, body: list[str]) -> str:
    # The first line creates a missing table, so that nft(8) can delete it in any case.
    script = [f"table {family} {table}", f"delete table {family} {table}"]
    if body:
        script += [f"table {family} {table} {{", *body, "}"]
    return "\n".join(script) + "\n"


def _quoted(name: str) -> str:
    return f'"{name}"'


def _map_elements(macs: Mapping[str, str]) -> str:
    return _elements(f"{_quoted(port)} : {macs[port]}" for port in sorted(macs))


def _elements(words: Iterable[str]) -> str:
    given = ", ".join(words)
    return f"elements = {{ {given} }}" if given else ""
