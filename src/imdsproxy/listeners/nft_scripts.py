"""Scripts for nft(8) that keep guests of bridges and of the host's own devices on their listener. Pure.

ARP: the host answers for an address of its own on every device, so that a guest of any bridge could reach a listener on
another device. It is to answer for the metadata address on the devices of interface listeners only.

Diversions: a guest sends a packet for 169.254.169.254 to its default gateway unless it has a route. The gateway may be
another machine, or this host, which must not take the address where it is a guest of a cloud itself. So on each port of
a bridge that has a listener the kernel replaces the destination MAC of such frames before the bridge forwards them:
by that of the listener's veth, or by the bridge's own where the bridge is an interface listener's device. Answers to
ARP or ND do not matter any more: several hosts on one LAN may each have the address, and so may an impostor. Frames
that a guest sends *from* the metadata address are dropped where the port is a guest's (tap, veth); a NIC may lead to a
cloud that has that address too, for this host.

With br_netfilter, as Docker loads it, bridged packets pass the host's NAT too: libvirt's rule would replace a guest's
address by the host's. It spares what connection tracking does not see.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import ObservedDevice, ObservedHost
from imdsproxy.core.model import (
    METADATA_IPV4,
    METADATA_IPV6,
    METADATA_PORT,
    BridgeListener,
    InterfaceListener,
    Network,
    NetworkId,
)

_GUEST_KINDS: Final = frozenset({"tun", "veth"})

_ADDRESSES: Final = (("ip", METADATA_IPV4), ("ip6", METADATA_IPV6))
_WANTED: Final = tuple(
    f"{family} daddr {address} tcp dport {METADATA_PORT}" for family, address in _ADDRESSES
)

_NAME: Final = re.compile(r"[A-Za-z0-9._:@+-]+")
"""Names that nft(8) takes literally; no hypervisor uses others."""


def render_diversions(
    networks: Mapping[NetworkId, Network], observed: ObservedHost, naming: Naming
) -> str:
    """A script that replaces our table of family `bridge` at once.

    It is about each bridge that has our veth, or that is an interface listener's device, and another port; without one
    the table is only removed.
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
    # Where a bridge has both, a veth gets what is sent.
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
        # The bridge has looked at the MAC already: for another one than its own the host would drop the packet.
        *(
            f"    {one} ether daddr set iifname map @inward meta pkttype set host"
            for one in _WANTED
        ),
        *(f"    iifname @links {family} saddr {address} notrack" for family, address in _ADDRESSES),
        "  }",
        # A bridge that has not met our MAC yet sends the frame to every port.
        "  chain leaving {",
        "    type filter hook forward priority 0; policy accept;",
        *(f"    iifname @ports oifname != @links {one} drop" for one in _WANTED),
        "  }",
    ]
    return _replace_table("bridge", naming.prefix, body if ports_of_all else [])


def _led_to(
    network: Network, observed: ObservedHost, naming: Naming
) -> tuple[ObservedDevice, str, str | None] | None:
    """A network's bridge, the MAC that its guests' requests are for, and our veth on it; `None` without a bridge."""
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
    """A script that replaces the table of that name at once; without interface listeners it only removes it.

    Args:
        table: Our own table of family `arp`.
        networks: All of them.
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
    # Naming it before deleting it is how nft(8) deletes what may not be there.
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
