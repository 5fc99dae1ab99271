"""Tables of nf_tables that lead guests of bridges, routers and the host's own devices to their listener. Pure.

ARP: by default the host answers for each of its addresses on every device, so a guest of any bridge could reach a
listener on another device. The table lets the host answer for the metadata address only on devices of interface
listeners.

Diversions: a guest without a route sends packets for 169.254.169.254 to its default gateway. The gateway may be another
machine, or this host, which must not take the address if it is a guest of a cloud itself. So on each port of a bridge
with a listener, the kernel replaces the destination MAC of such frames before the bridge forwards them. The new MAC is
that of the listener's veth, or that of the bridge if the bridge is an interface listener's device. Answers to ARP or ND
then do not matter: several hosts on one LAN, and even an impostor, may have the address. Frames *from* the metadata
address are dropped on ports of guests (tap, veth). They pass on a NIC, which may lead to a cloud that serves this host
at that address.

With br_netfilter, which Docker loads, bridged packets also pass the host's NAT. libvirt's rule would replace a guest's
address by the host's, so the table marks the packets `notrack`: NAT skips untracked packets.

The rules are shown in nft(8)'s syntax, for IPv4 (IPv6 is the same), where M is the metadata address:

    chain arriving                                # bridge, prerouting
      iifname @guests ip saddr M drop
      ip daddr M tcp dport 80 ether daddr set iifname map @cables notrack
      ip daddr M tcp dport 80 ether daddr set iifname map @inward meta pkttype set host
      iifname @links ip saddr M notrack
    chain leaving                                 # bridge, forward
      iifname @ports oifname != @links ip daddr M tcp dport 80 drop

    chain input                                   # arp, input
      iifname != @devices arp operation request arp daddr ip M drop

The namespace of a Neutron router has two tables. The first table exists as long as the namespace, so that no request
ever reaches another router:

    chain arriving                                # prerouting, after NAT: requests that no rule has redirected
      ip daddr M drop
    chain input
      tcp dport 9254 ct status != dnat drop       # only redirected requests come in

The second table exists while HAProxy listens in the namespace. Its chain runs before iptables' chains, which may
redirect to the L3 agent's own proxy: the first rule that redirects a connection decides for the whole connection.
Connections that another rule has already redirected stay there.

    chain redirect                                # nat, prerouting
      iifname "qr-*" ip daddr M tcp dport 80 redirect to :9254
    chain output                                  # as in `network.anti_spoofing.rules`
      tcp sport 9254 jump limit4
"""

import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from imdsproxy.host import nftables as nft
from imdsproxy.host.names import Naming
from imdsproxy.host.nftables import LINK, NETWORK, TRANSPORT, Batch, Change
from imdsproxy.host.state import ObservedDevice, ObservedHost
from imdsproxy.model.entities import (
    METADATA_IPV4,
    METADATA_PORT,
    BridgeListener,
    InterfaceListener,
    Network,
    NetworkId,
)
from imdsproxy.model.wire import REDIRECTED_PORT
from imdsproxy.network.anti_spoofing.rules import LAYOUTS, Layout, fill_redirected_hop_limit
from imdsproxy.network.planned import RouterTable

_GUEST_KINDS: Final = frozenset({"tun", "veth"})
_ETHER: Final = 9
_IFNAME_BYTES, _MAC_BYTES = 16, 6
"""A longer name was not valid UTF-8, and stands for another."""

ROUTER_COMMENT: Final = "imdsproxy 1"
"""Comment of each router's tables, with the number of their format: a table with another comment is replaced."""

_ROUTER_DEVICES: Final = b"qr-"
_BEFORE_IPTABLES, _AFTER_NAT = -101, -90

_DPORT: Final = 2
_TCP: Final = bytes((socket.IPPROTO_TCP,))
_RAW, _FILTER = -300, 0
_DROP: Final = nft.verdict(nft.DROP)
_ARP_REQUEST: Final = b"\x06\x04\x00\x01"
"""Lengths of the addresses, and the operation."""

_ARP_LENGTHS, _ARP_TARGET = 4, 24


@dataclass(frozen=True, slots=True)
class Diversions:
    """Content of our table of family `bridge`.

    Attributes:
        cables: MAC of our veth, by port of a bridge that has one.
        inward: MAC of the bridge, by port of a bridge that is an interface listener's device.
    """

    cables: Mapping[str, str] = field(default_factory=dict)
    inward: Mapping[str, str] = field(default_factory=dict)
    guests: frozenset[str] = frozenset()
    links: frozenset[str] = frozenset()

    def content(self) -> tuple[Change, ...]:
        """Return the table's content; empty if no table is needed."""
        if not self.cables and not self.inward:
            return ()
        batch = Batch("")
        for name, macs in (("cables", self.cables), ("inward", self.inward)):
            batch.make_set(name, (nft.DEVICE_NAME,), _IFNAME_BYTES, value=(_ETHER, _MAC_BYTES))
            packed = {
                _pack(port): bytes.fromhex(macs[port].replace(":", "")) for port in sorted(macs)
            }
            batch.add_elements(name, list(packed.items()))
        _make_names(batch, "ports", {*self.cables, *self.inward})
        _make_names(batch, "guests", self.guests)
        _make_names(batch, "links", self.links)
        batch.make_base_chain("arriving", nft.PREROUTING, _RAW)
        # A bridge that has not learned our MAC yet sends the frame to every port.
        batch.make_base_chain("leaving", nft.BRIDGE_FORWARD, _FILTER)
        for layout in LAYOUTS:
            _divert(batch, layout)
        return tuple(batch.changes)


def plan_diversions(
    networks: Mapping[NetworkId, Network], observed: ObservedHost, naming: Naming
) -> Diversions:
    """Plan the table for each bridge that has another port and either our veth or an interface listener."""
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
        ports = [
            one for one in given if one.name != link and len(one.name.encode()) < _IFNAME_BYTES
        ]
        if ports and link is not None:
            links.append(link)
        macs = inward if link is None else cables
        macs |= {one.name: mac for one in ports}
        guests |= {one.name for one in ports if one.kind in _GUEST_KINDS}
    # If a bridge has both, the veth gets the frames.
    inward = {name: mac for name, mac in inward.items() if name not in cables}
    return Diversions(cables, inward, frozenset(guests), frozenset(links))


def _divert(batch: Batch, layout: Layout) -> None:
    family = nft.meta(nft.PROTOCOL) + nft.compare(layout.ethertype)
    source = family + layout.load(layout.source) + nft.compare(layout.metadata)
    target = family + _to_metadata(layout)
    wanted = target + nft.meta(nft.L4_PROTOCOL) + nft.compare(_TCP) + _to_port(METADATA_PORT)
    to_mac = nft.store(LINK, 0, _MAC_BYTES)
    arrived = nft.meta(nft.INPUT_DEVICE)
    batch.make_rule("arriving", arrived + nft.lookup("guests"), source, _DROP)
    cable = arrived + nft.lookup("cables", into=0)
    batch.make_rule("arriving", wanted, cable, to_mac, nft.untrack())
    # The bridge has compared the MAC already: without the new packet type the host would drop the packet.
    own = arrived + nft.lookup("inward", into=0)
    batch.make_rule("arriving", wanted, own, to_mac, nft.be_for_host())
    batch.make_rule("arriving", arrived + nft.lookup("links"), source, nft.untrack())
    elsewhere = nft.meta(nft.OUTPUT_DEVICE) + nft.lookup("links", absent=True)
    batch.make_rule("leaving", arrived + nft.lookup("ports"), elsewhere, wanted, _DROP)


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


def plan_arp_filter(networks: Iterable[Network]) -> tuple[Change, ...]:
    """Return the content of our table of family `arp`; empty without interface listeners."""
    listeners = (one.listener for one in networks)
    devices = {one.device for one in listeners if isinstance(one, InterfaceListener)}
    if not devices:
        return ()
    batch = Batch("")
    _make_names(batch, "devices", devices)
    batch.make_base_chain("input", nft.ARP_INPUT, _FILTER)
    others = nft.meta(nft.INPUT_DEVICE) + nft.lookup("devices", absent=True)
    request = nft.payload(NETWORK, _ARP_LENGTHS, 4) + nft.compare(_ARP_REQUEST)
    target = nft.payload(NETWORK, _ARP_TARGET, 4) + nft.compare(METADATA_IPV4.packed)
    batch.make_rule("input", others, request, target, _DROP)
    return tuple(batch.changes)


def _make_names(batch: Batch, name: str, devices: Iterable[str]) -> None:
    batch.make_set(name, (nft.DEVICE_NAME,), _IFNAME_BYTES)
    batch.add_elements(name, [(_pack(one),) for one in sorted(devices)])


def _pack(device: str) -> bytes:
    return device.encode().ljust(_IFNAME_BYTES, b"\0")


def fill_router_table(table: RouterTable, batch: Batch) -> None:
    (_fill_drop if table is RouterTable.DROP else _fill_redirect)(batch)


def _fill_drop(batch: Batch) -> None:
    batch.make_base_chain("arriving", nft.PREROUTING, _AFTER_NAT)
    batch.make_base_chain("input", nft.INPUT, _FILTER)
    for layout in LAYOUTS:
        family = nft.meta(nft.FAMILY) + nft.compare(bytes((layout.protocol,)))
        batch.make_rule("arriving", family, _to_metadata(layout), _DROP)
        to_ours = _to_port(REDIRECTED_PORT)
        batch.make_rule("input", layout.is_tcp, to_ours, nft.is_redirected(differs=True), _DROP)


def _fill_redirect(batch: Batch) -> None:
    batch.make_base_chain("redirect", nft.PREROUTING, _BEFORE_IPTABLES, kind="nat")
    inward = nft.meta(nft.INPUT_DEVICE) + nft.compare(_ROUTER_DEVICES)
    for layout in LAYOUTS:
        wanted = (layout.is_tcp, _to_metadata(layout), _to_port(METADATA_PORT))
        batch.make_rule("redirect", inward, *wanted, nft.redirect(REDIRECTED_PORT))
    fill_redirected_hop_limit(batch)


def _to_metadata(layout: Layout) -> bytes:
    return layout.load(layout.target) + nft.compare(layout.metadata)


def _to_port(port: int) -> bytes:
    return nft.payload(TRANSPORT, _DPORT, 2) + nft.compare(struct.pack(">H", port))
