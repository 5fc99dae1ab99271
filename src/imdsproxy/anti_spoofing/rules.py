"""The tables of MAC filters and hop limits in nf_tables, rule by rule.

In nft(8)'s syntax, for IPv4 (and the same for IPv6), where M is the metadata address. A MAC filter:

    chain ingress                                 # hook ingress, the filter's devices
      ether type vlan, outer vlan id 0 → drop     # would be unpacked behind our back
      ip daddr M jump in4
    chain in4
      ip frag-off & 0x3fff != 0 drop              # ports must be where we look for them
      tcp dport 254 drop                          # only the filter itself leads there
      tcp dport != 80 return
      ip saddr . ether saddr @good4 goto pass4
      ip saddr @free4 goto pass4
      tcp flags & (fin|syn|rst|ack) == syn delete @from4 { ip saddr . tcp sport : ether saddr }
      tcp flags & (fin|syn|rst|ack) == syn update @from4 { ip saddr . tcp sport : ether saddr }
      update @open4 { ip saddr . tcp sport }      # began unverified, stays unverified
    chain pass4
      tcp flags & (fin|syn|rst|ack) == syn delete @open4 { ip saddr . tcp sport }
      ip saddr . tcp sport @open4 return
      tcp dport set 254
    chain egress                                  # hook egress
      ip saddr M jump out4
    chain out4
      tcp sport 254 goto back4
      tcp sport != 80 return
      ether daddr set ip daddr . tcp dport map @from4
      ip dscp != 0x2f return                      # a refusal: any MAC may have it
      ip daddr @free4 return
      ether daddr set ip daddr . tcp dport map @told4 return
      drop
    chain back4
      ip daddr . ether daddr @good4 tcp sport set 80 return
      ip daddr @free4 tcp sport set 80 return
      drop

There is no connection tracking: each packet is checked by itself, and a packet that lost its pair arrives at port 80,
where the kernel knows no such connection and resets it. Answers are checked because of ARP: a guest that claims a
neighbour's address would get the neighbour's answers otherwise.

Connections that began unverified are answered to the MAC that they came from: the neighbour table may still have the
guest that had the address before, and only an answer makes the kernel learn the new one.

The rule that turns DSCPs into hop limits (`core.wire`), for IPv6 into its hop limit:

    chain output                                  # hook output, before all other programs' chains
      ip saddr M tcp sport 80 jump limit4         # and 254, behind a MAC filter
    chain limit4
      ip dscp 0 return
      ip dscp 0x2f return                         # the MAC filter's own mark
      ip ttl set (ip dscp)                        # nft(8) has no syntax for it
      ip dscp set 0
"""

import socket
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from ipaddress import ip_address
from typing import Final

from imdsproxy.anti_spoofing.plan import ANY_MAC
from imdsproxy.core.hoststate import Family
from imdsproxy.core.model import METADATA_PORT, IpAddress, MacAddress
from imdsproxy.core.wire import ANSWER_DSCP, REDIRECTED_PORT, VERIFIED_PORT
from imdsproxy.host import nftables as nft
from imdsproxy.host.nftables import LINK, NETWORK, TRANSPORT, Batch, Change

FORMAT: Final = 2
"""In each table's comment: a table of another format is replaced."""

SETS: Final = tuple(f"{what}{family.value}" for family in Family for what in ("good", "free"))
"""The sets that hold pairs."""

_OPEN_MS: Final = 600_000
_FROM_MS: Final = 30_000
_TOLD_MS: Final = 120_000
_FLOWS: Final = 8192

_TCP: Final = bytes((socket.IPPROTO_TCP,))
_GUESTS: Final = struct.pack(">H", METADATA_PORT)
_REDIRECTED: Final = struct.pack(">H", REDIRECTED_PORT)
_VERIFIED: Final = struct.pack(">H", VERIFIED_PORT)
_VLANS: Final = (b"\x81\x00", b"\x88\xa8")
_FRAGMENT_HEADER: Final = 44
_SPORT, _DPORT, _FLAGS, _CHECKSUM = 0, 2, 13, 16
_DADDR_MAC, _SADDR_MAC, _VLAN_ID = 0, 6, 14
_MAC_BYTES: Final = 6
_ETHER, _SERVICE = 9, 13
_BEFORE_OTHERS, _AFTER_OTHERS = -400, 400

_IS_TCP: Final = nft.meta(nft.L4_PROTOCOL) + nft.compare(_TCP)
_BEGINS: Final = (
    _IS_TCP + nft.payload(TRANSPORT, _FLAGS, 1) + nft.bitwise(b"\x17") + nft.compare(b"\x02")
)
_DROP: Final = nft.verdict(nft.DROP)
_RETURN: Final = nft.verdict(nft.RETURN)


class Layout:
    """Where things are in a family's header.

    Attributes:
        metadata: The family's metadata address.
        protocol: The family's number (`NFPROTO_IPV4`, `NFPROTO_IPV6`).
        kind: The type of its addresses, in nft(8)'s numbers.
        dscp: Mask for the DSCP in the header's first two bytes.
        bits: How far it is above the lowest bit of these.
        limit: Where the two bytes are that have TTL and protocol, or next header and hop limit.
        checksum: Where the header's is, if it has one.
        fragment: Goes on only with a packet that may be a fragment.
        word: Makes the two bytes at `limit`, with the DSCP as the limit.
    """

    def __init__(self, family: Family) -> None:
        four = family is Family.IPV4
        self.family, self._version = family, family.value
        self.metadata = family.metadata_address.packed
        self.ethertype = b"\x08\x00" if four else b"\x86\xdd"
        self.protocol, self.kind = (2, 7) if four else (10, 8)
        self.source, self.target = (12, 16) if four else (8, 24)
        self.dscp, self.bits = (b"\x00\xfc", 2) if four else (b"\x0f\xc0", 6)
        self.limit = 8 if four else 6
        self.checksum = 10 if four else None
        if four:
            offset = nft.payload(NETWORK, 6, 2) + nft.bitwise(b"\x3f\xff")
            self.fragment = offset + nft.compare(b"\0\0", differs=True)
            # The kernel updates a checksum for two bytes at least; the second one, the protocol, is TCP.
            dscp = nft.payload(NETWORK, 1, 1) + nft.shift_right(2)
            self.word = dscp + nft.bitwise(b"\x3f\x00", b"\x00" + _TCP)
        else:
            self.fragment = nft.present6(_FRAGMENT_HEADER)
            shifted = nft.swap_bytes() + nft.shift_right(6) + nft.swap_bytes()
            dscp = nft.payload(NETWORK, 0, 2) + shifted
            self.word = dscp + nft.bitwise(b"\x00\x3f", _TCP + b"\x00")

    @property
    def is_tcp(self) -> bytes:
        """Go on only with a TCP packet of the family."""
        return nft.meta(nft.FAMILY) + nft.compare(bytes((self.protocol,))) + _IS_TCP

    def load(self, offset: int) -> bytes:
        """Load an address of the header."""
        return nft.payload(NETWORK, offset, len(self.metadata))

    def name(self, what: str) -> str:
        """Of a chain or set of the family."""
        return f"{what}{self._version}"


LAYOUTS: Final = tuple(map(Layout, Family))


def fill_mac_filter(batch: Batch, devices: Sequence[str]) -> None:
    """Put chains, rules and empty sets into a table that is new."""
    batch.make_base_chain("ingress", nft.INGRESS, _BEFORE_OTHERS, devices)
    batch.make_base_chain("egress", nft.EGRESS, _AFTER_OTHERS, devices)
    batch.changes += _filter_rules()


@cache
def _filter_rules() -> tuple[Change, ...]:
    """The same for all filters, and what takes most of the time."""
    batch = Batch("")
    for ethertype in _VLANS:
        tagged = nft.meta(nft.PROTOCOL) + nft.compare(ethertype) + nft.payload(LINK, _VLAN_ID, 2)
        batch.make_rule("ingress", tagged, nft.bitwise(b"\x0f\xff"), nft.compare(b"\0\0"), _DROP)
    for layout in LAYOUTS:
        _make_sets(batch, layout)
        for chain in ("pass", "in", "back", "out"):
            batch.make_chain(layout.name(chain))
        is_ours = nft.meta(nft.PROTOCOL) + nft.compare(layout.ethertype)
        metadata = nft.compare(layout.metadata)
        inward = nft.verdict(nft.JUMP, layout.name("in"))
        outward = nft.verdict(nft.JUMP, layout.name("out"))
        batch.make_rule("ingress", is_ours, layout.load(layout.target), metadata, inward)
        batch.make_rule("egress", is_ours, layout.load(layout.source), metadata, outward)
        _inward(batch, layout)
        _outward(batch, layout)
    return tuple(batch.changes)


def _make_sets(batch: Batch, layout: Layout) -> None:
    address, name, length = layout.kind, layout.name, len(layout.metadata)
    flow = ((address, _SERVICE), length + 4)
    mac = (_ETHER, _MAC_BYTES)
    batch.make_set(name("good"), (address, _ETHER), length + 8)
    batch.make_set(name("free"), (address,), length)
    batch.make_set(name("open"), *flow, size=_FLOWS, timeout_ms=_OPEN_MS, dynamic=True)
    batch.make_set(name("from"), *flow, size=_FLOWS, timeout_ms=_FROM_MS, dynamic=True, value=mac)
    batch.make_set(name("told"), *flow, size=_FLOWS, timeout_ms=_TOLD_MS, value=mac)


def _inward(batch: Batch, layout: Layout) -> None:
    name, words = layout.name, len(layout.metadata) // 4
    source = layout.load(layout.source)
    pair = source + nft.payload(LINK, _SADDR_MAC, _MAC_BYTES, into=words)
    flow = source + nft.payload(TRANSPORT, _SPORT, 2, into=words)
    port = _IS_TCP + nft.payload(TRANSPORT, _DPORT, 2)
    passed = nft.verdict(nft.GOTO, name("pass"))
    sender = flow + nft.payload(LINK, _SADDR_MAC, _MAC_BYTES, into=words + 1)
    for chain, *rule in (
        ("in", layout.fragment, _DROP),
        ("in", port, nft.compare(_VERIFIED), _DROP),
        ("in", port, nft.compare(_GUESTS, differs=True), _RETURN),
        ("in", pair, nft.lookup(name("good")), passed),
        ("in", source, nft.lookup(name("free")), passed),
        # An update alone would leave the MAC of an earlier connection.
        ("in", _BEGINS, sender, nft.remember(name("from"), value=words + 1, delete=True)),
        ("in", _BEGINS, sender, nft.remember(name("from"), value=words + 1)),
        ("in", _IS_TCP, flow, nft.remember(name("open"))),
        ("pass", _BEGINS, flow, nft.remember(name("open"), delete=True)),
        ("pass", _IS_TCP, flow, nft.lookup(name("open")), _RETURN),
        ("pass", _IS_TCP, nft.rewrite(_DPORT, _VERIFIED, checksum=_CHECKSUM)),
    ):
        batch.make_rule(name(chain), *rule)


def _outward(batch: Batch, layout: Layout) -> None:
    name, words = layout.name, len(layout.metadata) // 4
    target = layout.load(layout.target)
    pair = target + nft.payload(LINK, _DADDR_MAC, _MAC_BYTES, into=words)
    flow = target + nft.payload(TRANSPORT, _DPORT, 2, into=words)
    port = _IS_TCP + nft.payload(TRANSPORT, _SPORT, 2)
    dscp = nft.payload(NETWORK, 0, 2) + nft.bitwise(layout.dscp)
    marked = struct.pack(">H", ANSWER_DSCP << layout.bits)
    to = nft.store(LINK, _DADDR_MAC, _MAC_BYTES, register=words + 1)
    answer = nft.rewrite(_SPORT, _GUESTS, checksum=_CHECKSUM) + _RETURN
    for chain, *rule in (
        ("out", port, nft.compare(_VERIFIED), nft.verdict(nft.GOTO, name("back"))),
        ("out", port, nft.compare(_GUESTS, differs=True), _RETURN),
        ("out", _IS_TCP, flow, nft.lookup(name("from"), into=words + 1), to),
        ("out", dscp, nft.compare(marked, differs=True), _RETURN),
        ("out", target, nft.lookup(name("free")), _RETURN),
        ("out", _IS_TCP, flow, nft.lookup(name("told"), into=words + 1), to, _RETURN),
        ("out", _IS_TCP, _DROP),
        ("back", pair, nft.lookup(name("good")), answer),
        ("back", target, nft.lookup(name("free")), answer),
        ("back", _DROP),
    ):
        batch.make_rule(name(chain), *rule)


def pass_by_new(batch: Batch) -> None:
    """From now on, have connections that begin go on as unverified ones do."""
    for layout in LAYOUTS:
        flow = layout.load(layout.source) + nft.payload(
            TRANSPORT, _SPORT, 2, into=len(layout.metadata) // 4
        )
        noted = nft.remember(layout.name("open"))
        batch.insert_rule(layout.name("pass"), _BEGINS, flow, noted, _RETURN)


def keep_only(batch: Batch, flows: Mapping[Family, Sequence[bytes]]) -> None:
    """Have nothing redirected any more but these connections."""
    for layout in LAYOUTS:
        words, kept = len(layout.metadata) // 4, layout.name("kept")
        kind = (layout.kind, _SERVICE)
        flow = layout.load(layout.source) + nft.payload(TRANSPORT, _SPORT, 2, into=words)
        batch.make_set(kept, kind, len(layout.metadata) + 4)
        batch.add_elements(kept, flows.get(layout.family, ()))
        redirected = nft.rewrite(_DPORT, _VERIFIED, checksum=_CHECKSUM)
        chain = layout.name("pass")
        batch.insert_rule(chain, _RETURN)
        batch.insert_rule(chain, _IS_TCP, flow, nft.lookup(kept), redirected, _RETURN)


def fill_hop_limit(batch: Batch) -> None:
    """Put chains and rules into a table that is new."""
    batch.make_base_chain("output", nft.OUTPUT, _BEFORE_OTHERS)
    for layout in LAYOUTS:
        jump = _make_limit_chain(batch, layout)
        from_metadata = layout.load(layout.source) + nft.compare(layout.metadata)
        for port in (_GUESTS, _VERIFIED):
            batch.make_rule("output", layout.is_tcp, from_metadata, _sent_by(port), jump)


def fill_redirected_hop_limit(batch: Batch) -> None:
    """The same for answers to requests that were redirected, whose own address is written into them later."""
    batch.make_base_chain("output", nft.OUTPUT, _BEFORE_OTHERS)
    for layout in LAYOUTS:
        jump = _make_limit_chain(batch, layout)
        batch.make_rule("output", layout.is_tcp, _sent_by(_REDIRECTED), jump)


def _sent_by(port: bytes) -> bytes:
    return nft.payload(TRANSPORT, _SPORT, 2) + nft.compare(port)


def _make_limit_chain(batch: Batch, layout: Layout) -> bytes:
    """The verdict that leads there."""
    chain, head = layout.name("limit"), nft.payload(NETWORK, 0, 2)
    batch.make_chain(chain)
    for ours in (0, ANSWER_DSCP):
        is_it = nft.compare(struct.pack(">H", ours << layout.bits))
        batch.make_rule(chain, head, nft.bitwise(layout.dscp), is_it, _RETURN)
    rest = bytes(0xFF ^ byte for byte in layout.dscp)
    for offset, word in ((layout.limit, layout.word), (0, head + nft.bitwise(rest))):
        batch.make_rule(chain, word, nft.store(NETWORK, offset, 2, checksum=layout.checksum))
    return nft.verdict(nft.JUMP, chain)


def element_of(address: IpAddress, mac: MacAddress) -> tuple[str, bytes]:
    """The set that a pair is in, and its key there."""
    if mac == ANY_MAC:
        return f"free{address.version}", address.packed
    return f"good{address.version}", address.packed + packed_mac(mac) + b"\0\0"


def pair_of(name: str, key: bytes) -> tuple[IpAddress, MacAddress]:
    """The reverse."""
    length = 4 if name.endswith("4") else 16
    address = ip_address(key[:length])
    if name.startswith("free"):
        return address, ANY_MAC
    return address, MacAddress(key[length : length + _MAC_BYTES].hex(":"))


def flow_of(address: IpAddress, port: int) -> bytes:
    """A connection as the key of `open`."""
    return address.packed + struct.pack(">Hxx", port)


def packed_mac(mac: MacAddress) -> bytes:
    """A MAC as a map's value."""
    return bytes.fromhex(mac.replace(":", ""))
