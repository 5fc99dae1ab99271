"""Tables of MAC filters and hop limits in nf_tables, rule by rule.

The rules are shown in nft(8)'s syntax, for IPv4 (IPv6 is the same), where M is the metadata address. `FLOW` is
`ip saddr . tcp sport` on the way in and `ip daddr . tcp dport` on the way out; SYN is
`tcp flags & (fin|syn|rst|ack) == syn`. A MAC filter:

    chain ingress                                 # hook ingress, the filter's devices
      ether type vlan, outer vlan id 0 → drop     # the kernel would untag it past these rules
      ip daddr M jump in4
      ether type arp jump claim4
    chain in4
      ip frag-off & 0x3fff != 0 drop              # ports must be where we look for them
      tcp dport 254 drop                          # only the filter itself leads there
      tcp dport != 80 return
      ip saddr . ether saddr @good4 goto pass4
      ip saddr @free4 goto free4
      FLOW @begun4 ip saddr @macs4 drop           # another MAC has the address
      tcp flags & rst FLOW . ether saddr @open4 delete @from4, delete @open4 return
      SYN FLOW . ether saddr @open4 update @from4, update @open4 return
      FLOW . ether saddr @open4 update @from4, update @open4 return
      FLOW @from4 drop                            # another MAC began the connection
      SYN update @from4 { FLOW : ether saddr }, update @open4 { FLOW . ether saddr } return
      tcp, ip saddr @macs4 drop                   # another MAC has the address: of TCP only a SYN may pass
    chain free4
      FLOW @from4 update @from4 goto pass4
      SYN update @from4 { FLOW : ether saddr }
      goto pass4
    chain pass4
      SYN delete @open4 { FLOW . ether saddr }, delete @begun4 { FLOW }
      FLOW . ether saddr @open4 update @from4, update @open4 return  # began unverified, stays unverified
      FLOW @begun4 update @begun4 return          # began before the filter was there
      tcp dport set 254
    chain egress                                  # hook egress
      ip saddr M jump out4
    chain out4
      tcp sport 254 goto back4
      tcp sport != 80 return
      ip dscp 0x2f goto mark4
      ether daddr set FLOW map @from4 return      # a refusal: any MAC may have it
      goto rest4
    chain rest4
      FLOW @begun4 ether daddr set ip daddr map @macs4 return
      ip daddr @macs4 drop
    chain mark4
      ether daddr set FLOW map @from4
      ip daddr @free4 return
      ether daddr set FLOW map @confirmed4 return
      drop
    chain back4
      ether daddr set ip daddr map @macs4 tcp sport set 80 return
      ether daddr set FLOW map @from4
      ip daddr @free4 tcp sport set 80 return
      drop
    chain claim4                                  # ARP; of IPv6 NS, NA, RS and RA that carry a MAC
      arp saddr ip @macs4 arp saddr ip . arp saddr ether != @good4 counter claims, update @claims4

There is no connection tracking: each packet is checked separately. A packet that lost its pair arrives at port 80,
where the kernel knows no such connection and resets it.

**Answers go to the MAC of the pair, or to the MAC that the connection came from**, whatever the neighbour table has. A
guest that claims a neighbour's address by ARP or ND neither gets nor blocks the neighbour's answers. The neighbour
table may also still have the address's previous guest, and the kernel learns the new guest only from an answer.

**A connection belongs to the MAC of its SYN.** Verified connections have their pair. For the others, `from` has the
MAC, and `open` has connection and MAC; packets from other MACs are dropped. `from` outlives `open` by a second.

The rule that converts DSCPs into hop limits (`model.wire`), or into IPv6's hop limit:

    chain output                                  # hook output, before all other programs' chains
      ip saddr M tcp sport 80 jump limit4         # and 254, behind a MAC filter
    chain limit4
      ip dscp 0 return
      ip dscp 0x2f return                         # the MAC filter's own mark
      ip ttl set (ip dscp)                        # nft(8) has no syntax for this
      ip dscp set 0
"""

import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from ipaddress import ip_address
from typing import Final

from imdsproxy.host import nftables as nft
from imdsproxy.host.nftables import LINK, NETWORK, TRANSPORT, Batch, Change, Element
from imdsproxy.host.state import Family
from imdsproxy.model.entities import METADATA_PORT, IpAddress, MacAddress
from imdsproxy.model.wire import ANSWER_DSCP, REDIRECTED_PORT, VERIFIED_PORT
from imdsproxy.network.anti_spoofing.plan import ANY_MAC

FORMAT: Final = 4
"""Format number in each table's comment: a table with another number is replaced."""

SETS: Final = tuple(f"{what}{family.value}" for family in Family for what in ("good", "free"))
"""Names of the sets that contain pairs."""

CLAIMS: Final = "claims"
"""Name of the counter of forged claims: to an address whose pair has another MAC."""

CLAIMED: Final = tuple(f"claims{family.value}" for family in Family)
"""Names of the sets of recent forged claims."""

_BEGUN_MS: Final = 600_000
_OPEN_MS: Final = 60_000
"""Lifetime of an open connection's entry: longer than HAProxy keeps an idle connection."""

_SYN_MS: Final = 10_000
"""Lifetime of an entry of a connection that has sent only its SYN."""

_SECOND_MS: Final = 1_000
_CONFIRMED_MS: Final = 120_000
_CLAIMED_MS: Final = 600_000
_FLOWS: Final = 2048
"""Size of the sets of connections. The kernel allocates memory for the whole size: 0.7 MB per network."""

_MORE_FLOWS: Final = 3000
_CLAIMANTS: Final = 256

_TCP: Final = bytes((socket.IPPROTO_TCP,))
_ICMP6: Final = bytes((socket.IPPROTO_ICMPV6,))
_GUESTS: Final = struct.pack(">H", METADATA_PORT)
_REDIRECTED: Final = struct.pack(">H", REDIRECTED_PORT)
_VERIFIED: Final = struct.pack(">H", VERIFIED_PORT)
_VLANS: Final = (b"\x81\x00", b"\x88\xa8")
_FRAGMENT_HEADER: Final = 44
_SPORT, _DPORT, _FLAGS, _CHECKSUM = 0, 2, 13, 16
_SCRATCH: Final = 12
"""Register for an unused value."""

_ARP: Final = b"\x08\x06"
_ARP_MAC, _ARP_ADDRESS = 8, 14
_SOURCE6, _ND_TARGET = 8, 8
_ND_OPTIONS: Final = (
    (133, 8, None),
    (134, 16, None),
    (135, 24, None),
    (136, 24, _ND_TARGET),
)
"""ICMPv6 types that contain a MAC, offset of their options, and offset of the MAC's address in the message; `None` for
the packet's source address."""
_DADDR_MAC, _SADDR_MAC, _VLAN_ID = 0, 6, 14
_MAC_BYTES: Final = 6
_ETHER, _SERVICE = 9, 13
_BEFORE_OTHERS, _AFTER_OTHERS = -400, 400

_IS_TCP: Final = nft.meta(nft.L4_PROTOCOL) + nft.compare(_TCP)
_TCP_FLAGS: Final = _IS_TCP + nft.payload(TRANSPORT, _FLAGS, 1)
_BEGINS: Final = _TCP_FLAGS + nft.bitwise(b"\x17") + nft.compare(b"\x02")
_RESETS: Final = _TCP_FLAGS + nft.bitwise(b"\x04") + nft.compare(b"\x04")
_DROP: Final = nft.verdict(nft.DROP)
_RETURN: Final = nft.verdict(nft.RETURN)


class Layout:
    """Layout of a family's header.

    Attributes:
        protocol: Number of the family (`NFPROTO_IPV4`, `NFPROTO_IPV6`).
        kind: Type of the family's addresses, in nft(8)'s numbers.
        dscp: Mask of the DSCP in the header's first two bytes.
        bits: Bit offset of the DSCP in these two bytes.
        limit: Offset of the two bytes with TTL and protocol, or next header and hop limit.
        checksum: Offset of the header's checksum; `None` without one.
        fragment: Expressions that match only packets that may be fragments.
        word: Expressions that compute the two bytes at `limit`, with the DSCP as the limit.
        claims: Expressions that match only packets that may claim a MAC for an address.
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
            # The kernel updates checksums for at least two bytes. The second byte is the protocol, TCP.
            dscp = nft.payload(NETWORK, 1, 1) + nft.shift_right(2)
            self.word = dscp + nft.bitwise(b"\x3f\x00", b"\x00" + _TCP)
            self.claims = nft.meta(nft.PROTOCOL) + nft.compare(_ARP)
        else:
            self.fragment = nft.present6(_FRAGMENT_HEADER)
            shifted = nft.swap_bytes() + nft.shift_right(6) + nft.swap_bytes()
            dscp = nft.payload(NETWORK, 0, 2) + shifted
            self.word = dscp + nft.bitwise(b"\x00\x3f", _TCP + b"\x00")
            self.claims = nft.meta(nft.PROTOCOL) + nft.compare(self.ethertype)
            self.claims += nft.meta(nft.L4_PROTOCOL) + nft.compare(_ICMP6)

    @property
    def is_tcp(self) -> bytes:
        return nft.meta(nft.FAMILY) + nft.compare(bytes((self.protocol,))) + _IS_TCP

    def load(self, offset: int) -> bytes:
        return nft.payload(NETWORK, offset, len(self.metadata))

    def name(self, what: str) -> str:
        return f"{what}{self._version}"


LAYOUTS: Final = tuple(map(Layout, Family))


def fill_mac_filter(batch: Batch, devices: Sequence[str]) -> None:
    batch.make_base_chain("ingress", nft.INGRESS, _BEFORE_OTHERS, devices)
    batch.make_base_chain("egress", nft.EGRESS, _AFTER_OTHERS, devices)
    batch.changes += _filter_rules()


@cache
def _filter_rules() -> tuple[Change, ...]:
    """Return the rules, which are the same for all filters; cached, because they take most of the time."""
    batch = Batch("")
    for ethertype in _VLANS:
        tagged = nft.meta(nft.PROTOCOL) + nft.compare(ethertype) + nft.payload(LINK, _VLAN_ID, 2)
        batch.make_rule("ingress", tagged, nft.bitwise(b"\x0f\xff"), nft.compare(b"\0\0"), _DROP)
    batch.make_counter(CLAIMS)
    for layout in LAYOUTS:
        _make_sets(batch, layout)
        for chain in ("pass", "free", "in", "back", "rest", "mark", "out", "claim"):
            batch.make_chain(layout.name(chain))
        is_ours = nft.meta(nft.PROTOCOL) + nft.compare(layout.ethertype)
        metadata = nft.compare(layout.metadata)
        inward = nft.verdict(nft.JUMP, layout.name("in"))
        outward = nft.verdict(nft.JUMP, layout.name("out"))
        claims = nft.verdict(nft.JUMP, layout.name("claim"))
        batch.make_rule("ingress", is_ours, layout.load(layout.target), metadata, inward)
        batch.make_rule("ingress", layout.claims, claims)
        batch.make_rule("egress", is_ours, layout.load(layout.source), metadata, outward)
        _inward(batch, layout)
        _outward(batch, layout)
    _count_claims(batch)
    return tuple(batch.changes)


def _make_sets(batch: Batch, layout: Layout) -> None:
    address, name, length = layout.kind, layout.name, len(layout.metadata)
    flow = ((address, _SERVICE), length + 4)
    own = ((address, _SERVICE, _ETHER), length + 12)
    mac, outlives = (_ETHER, _MAC_BYTES), _OPEN_MS + _SECOND_MS
    batch.make_set(name("good"), (address, _ETHER), length + 8)
    batch.make_set(name("macs"), (address,), length, value=mac)
    batch.make_set(name("free"), (address,), length)
    batch.make_set(name("begun"), *flow, size=_FLOWS, timeout_ms=_BEGUN_MS, dynamic=True)
    batch.make_set(name("from"), *flow, size=_FLOWS, timeout_ms=outlives, dynamic=True, value=mac)
    # `open` is larger than `from`, because each connection in `from` is also in `open`.
    batch.make_set(name("open"), *own, size=_MORE_FLOWS, timeout_ms=_OPEN_MS, dynamic=True)
    batch.make_set(name("confirmed"), *flow, size=_FLOWS, timeout_ms=_CONFIRMED_MS, value=mac)
    pair = (address, _ETHER), length + 8
    batch.make_set(name("claims"), *pair, size=_CLAIMANTS, timeout_ms=_CLAIMED_MS, dynamic=True)


class _Flow:
    """Connection of a packet in the registers: address and port, then a MAC.

    The registers are a key of `from` and `begun` as well as of `open`.

    Attributes:
        value: Register of the MAC.
    """

    def __init__(self, layout: Layout) -> None:
        self._name, words = layout.name, len(layout.metadata) // 4
        self.value = words + 1
        self.load = layout.load(layout.source) + nft.payload(TRANSPORT, _SPORT, 2, into=words)
        self.load += nft.payload(LINK, _SADDR_MAC, _MAC_BYTES, into=self.value)

    def keep(self, *, timeout_ms: int = _OPEN_MS) -> bytes:
        """Return expressions that assign the connection to the MAC, or refresh the assignment."""
        name, value = self._name, self.value
        whose = nft.remember(name("from"), value=value, timeout_ms=timeout_ms + _SECOND_MS)
        return whose + nft.remember(name("open"), timeout_ms=timeout_ms)

    def forget(self) -> bytes:
        whose = nft.remember(self._name("from"), value=self.value, delete=True)
        return whose + nft.remember(self._name("open"), delete=True)


def _is_in(name: str) -> bytes:
    """Return expressions that match only if a map has the key.

    Linux before 6.4 has no lookup in a map without its value, and nft(8) would not list one whose value is not used.
    """
    any_mac = nft.compare(bytes(_MAC_BYTES), differs=True, register=_SCRATCH)
    return nft.lookup(name, into=_SCRATCH) + any_mac


def _inward(batch: Batch, layout: Layout) -> None:
    name, words = layout.name, len(layout.metadata) // 4
    source = layout.load(layout.source)
    pair = source + nft.payload(LINK, _SADDR_MAC, _MAC_BYTES, into=words)
    port = _IS_TCP + nft.payload(TRANSPORT, _DPORT, 2)
    flow = _Flow(layout)
    begins, own = _BEGINS + flow.load, _IS_TCP + flow.load + nft.lookup(name("open"))
    taken = source + _is_in(name("macs"))
    whose = _IS_TCP + flow.load + _is_in(name("from"))
    begun = _IS_TCP + flow.load + nft.lookup(name("begun"))
    passed = nft.verdict(nft.GOTO, name("pass"))
    for chain, *rule in (
        ("in", layout.fragment, _DROP),
        ("in", port, nft.compare(_VERIFIED), _DROP),
        ("in", port, nft.compare(_GUESTS, differs=True), _RETURN),
        ("in", pair, nft.lookup(name("good")), passed),
        ("in", source, nft.lookup(name("free")), nft.verdict(nft.GOTO, name("free"))),
        ("in", begun, taken, _DROP),
        ("in", _RESETS, own, flow.forget(), _RETURN),
        ("in", _BEGINS, own, flow.keep(timeout_ms=_SYN_MS), _RETURN),
        ("in", own, flow.keep(), _RETURN),
        ("in", whose, _DROP),
        ("in", begins, flow.keep(timeout_ms=_SYN_MS), _RETURN),
        # TCP only: to refuse a guest, the host needs the guest's neighbour advertisements.
        ("in", _IS_TCP, taken, _DROP),
        # The MAC that began the connection stays.
        ("free", whose, nft.remember(name("from"), value=flow.value), passed),
        ("free", begins, nft.remember(name("from"), value=flow.value)),
        ("free", passed),
        ("pass", begins, nft.remember(name("open"), delete=True)),
        ("pass", begins, nft.remember(name("begun"), delete=True)),
        # The packet must return even if `from` is full.
        ("pass", own, flow.keep()),
        ("pass", own, _RETURN),
        ("pass", begun, nft.remember(name("begun")), _RETURN),
        ("pass", _IS_TCP, nft.rewrite(_DPORT, _VERIFIED, checksum=_CHECKSUM)),
    ):
        batch.make_rule(name(chain), *rule)


def _outward(batch: Batch, layout: Layout) -> None:
    name, words = layout.name, len(layout.metadata) // 4
    target = layout.load(layout.target)
    flow = _IS_TCP + target + nft.payload(TRANSPORT, _DPORT, 2, into=words)
    port = _IS_TCP + nft.payload(TRANSPORT, _SPORT, 2)
    dscp = nft.payload(NETWORK, 0, 2) + nft.bitwise(layout.dscp)
    marked = struct.pack(">H", ANSWER_DSCP << layout.bits)
    to = nft.store(LINK, _DADDR_MAC, _MAC_BYTES, register=words + 1)
    to_sender = flow + nft.lookup(name("from"), into=words + 1) + to
    to_owner = target + nft.lookup(name("macs"), into=words + 1) + to
    answer = nft.rewrite(_SPORT, _GUESTS, checksum=_CHECKSUM) + _RETURN
    for chain, *rule in (
        ("out", port, nft.compare(_VERIFIED), nft.verdict(nft.GOTO, name("back"))),
        ("out", port, nft.compare(_GUESTS, differs=True), _RETURN),
        ("out", _IS_TCP, dscp, nft.compare(marked), nft.verdict(nft.GOTO, name("mark"))),
        ("out", to_sender, _RETURN),
        ("out", _IS_TCP, nft.verdict(nft.GOTO, name("rest"))),
        ("rest", flow, nft.lookup(name("begun")), to_owner, _RETURN),
        ("rest", target, _is_in(name("macs")), _DROP),
        ("mark", to_sender),
        ("mark", target, nft.lookup(name("free")), _RETURN),
        ("mark", flow, nft.lookup(name("confirmed"), into=words + 1), to, _RETURN),
        ("mark", _DROP),
        ("back", to_owner, answer),
        ("back", to_sender),
        ("back", target, nft.lookup(name("free")), answer),
        ("back", _DROP),
    ):
        batch.make_rule(name(chain), *rule)


def _count_claims(batch: Batch) -> None:
    four, six = LAYOUTS
    arp = nft.payload(NETWORK, _ARP_ADDRESS, len(four.metadata))
    _count_claim(batch, four, arp, nft.payload(NETWORK, _ARP_MAC, _MAC_BYTES, into=1))
    for kind, options, target in _ND_OPTIONS:
        # Type of the option: link-layer address of the source or of the target.
        option = bytes((1 if target is None else 2,))
        is_it = nft.payload(TRANSPORT, 0, 1) + nft.compare(bytes((kind,)))
        is_it += nft.payload(TRANSPORT, options, 1) + nft.compare(option)
        length = len(six.metadata)
        address = six.load(six.source)
        if target is not None:
            address = nft.payload(TRANSPORT, target, length)
        mac = nft.payload(TRANSPORT, options + 2, _MAC_BYTES, into=length // 4)
        _count_claim(batch, six, is_it + address, mac)


def _count_claim(batch: Batch, layout: Layout, address: bytes, mac: bytes) -> None:
    name = layout.name
    taken = address + _is_in(name("macs"))
    forged = mac + nft.lookup(name("good"), absent=True)
    batch.make_rule(name("claim"), taken, forged, nft.count(CLAIMS), nft.remember(name("claims")))


def pass_by_new(batch: Batch) -> None:
    """Make new connections pass as unverified ones."""
    for layout in LAYOUTS:
        flow, chain = _Flow(layout), layout.name("pass")
        batch.insert_rule(chain, _BEGINS, _RETURN)
        batch.insert_rule(chain, _BEGINS, flow.load, flow.keep())
        # Answers of another process must not be redirected.
        batch.insert_rule(layout.name("rest"), _RETURN)


def keep_only(batch: Batch, flows: Mapping[Family, Sequence[bytes]]) -> None:
    for layout in LAYOUTS:
        words, kept = len(layout.metadata) // 4, layout.name("kept")
        kind = (layout.kind, _SERVICE)
        flow = layout.load(layout.source) + nft.payload(TRANSPORT, _SPORT, 2, into=words)
        batch.make_set(kept, kind, len(layout.metadata) + 4)
        batch.add_elements(kept, [(one,) for one in flows.get(layout.family, ())])
        redirected = nft.rewrite(_DPORT, _VERIFIED, checksum=_CHECKSUM)
        chain = layout.name("pass")
        batch.insert_rule(chain, _RETURN)
        batch.insert_rule(chain, _IS_TCP, flow, nft.lookup(kept), redirected, _RETURN)


def fill_hop_limit(batch: Batch) -> None:
    batch.make_base_chain("output", nft.OUTPUT, _BEFORE_OTHERS)
    for layout in LAYOUTS:
        jump = _make_limit_chain(batch, layout)
        from_metadata = layout.load(layout.source) + nft.compare(layout.metadata)
        for port in (_GUESTS, _VERIFIED):
            batch.make_rule("output", layout.is_tcp, from_metadata, _sent_by(port), jump)


def fill_redirected_hop_limit(batch: Batch) -> None:
    """Add the hop limit for answers to redirected requests, whose source address the kernel rewrites later."""
    batch.make_base_chain("output", nft.OUTPUT, _BEFORE_OTHERS)
    for layout in LAYOUTS:
        jump = _make_limit_chain(batch, layout)
        batch.make_rule("output", layout.is_tcp, _sent_by(_REDIRECTED), jump)


def _sent_by(port: bytes) -> bytes:
    return nft.payload(TRANSPORT, _SPORT, 2) + nft.compare(port)


def _make_limit_chain(batch: Batch, layout: Layout) -> bytes:
    chain, head = layout.name("limit"), nft.payload(NETWORK, 0, 2)
    batch.make_chain(chain)
    for ours in (0, ANSWER_DSCP):
        is_it = nft.compare(struct.pack(">H", ours << layout.bits))
        batch.make_rule(chain, head, nft.bitwise(layout.dscp), is_it, _RETURN)
    rest = bytes(0xFF ^ byte for byte in layout.dscp)
    for offset, word in ((layout.limit, layout.word), (0, head + nft.bitwise(rest))):
        batch.make_rule(chain, word, nft.store(NETWORK, offset, 2, checksum=layout.checksum))
    return nft.verdict(nft.JUMP, chain)


def elements_of(address: IpAddress, mac: MacAddress) -> Iterator[tuple[str, Element]]:
    """Yield the elements of a pair: the name of each set, and the element.

    The set that lets the guest's packets pass comes last: by then the path of the answers exists.
    """
    if mac == ANY_MAC:
        yield f"free{address.version}", (address.packed,)
        return
    packed = packed_mac(mac)
    yield f"macs{address.version}", (address.packed, packed)
    yield f"good{address.version}", (address.packed + packed + b"\0\0",)


def pair_of(name: str, key: bytes) -> tuple[IpAddress, MacAddress]:
    length = 4 if name.endswith("4") else 16
    address = ip_address(key[:length])
    if name.startswith("free"):
        return address, ANY_MAC
    return address, MacAddress(key[length : length + _MAC_BYTES].hex(":"))


def flow_of(address: IpAddress, port: int) -> bytes:
    """Return a connection as a key of `begun`, `from` and `confirmed`."""
    return address.packed + struct.pack(">Hxx", port)


def packed_mac(mac: MacAddress) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
