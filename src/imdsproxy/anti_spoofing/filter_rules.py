"""The table of a MAC filter in nf_tables, rule by rule.

In nft(8)'s syntax, for IPv4 (and the same for IPv6), where M is the metadata address:

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
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from imdsproxy.anti_spoofing.plan import ANY_MAC
from imdsproxy.core.hoststate import Family
from imdsproxy.core.model import METADATA_PORT, IpAddress, MacAddress
from imdsproxy.core.wire import ANSWER_DSCP, VERIFIED_PORT
from imdsproxy.host.nftables import (
    L4_PROTOCOL,
    LINK,
    NETWORK,
    PROTOCOL,
    TRANSPORT,
    Batch,
    Hook,
    SetKind,
    Verdict,
    bitwise,
    compare,
    differs,
    lookup,
    meta,
    payload,
    present6,
    remember,
    rewrite,
    store,
    verdict,
)

FORMAT: Final = 2
"""In each table's comment: a table of another format is replaced."""

_OPEN_MS: Final = 600_000
_FROM_MS: Final = 30_000
_TOLD_MS: Final = 120_000
_FLOWS: Final = 8192

_TCP: Final = bytes((socket.IPPROTO_TCP,))
_GUESTS: Final = struct.pack(">H", METADATA_PORT)
_VERIFIED: Final = struct.pack(">H", VERIFIED_PORT)
_VLANS: Final = (b"\x81\x00", b"\x88\xa8")
_FRAGMENT_HEADER: Final = 44
_SPORT, _DPORT, _FLAGS, _CHECKSUM = 0, 2, 13, 16
_DADDR_MAC, _SADDR_MAC, _VLAN_ID = 0, 6, 14
_MAC_BYTES: Final = 6
_IPV4, _IPV6, _ETHER, _SERVICE = 7, 8, 9, 13
_BEFORE_OTHERS, _AFTER_OTHERS = -400, 400


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things are in a family's header; `words` are the address's registers."""

    family: Family
    ethertype: bytes
    source: int
    target: int
    length: int
    kind: int
    dscp: tuple[int, bytes, bytes]

    @property
    def words(self) -> int:
        return self.length // 4

    def name(self, what: str) -> str:
        return f"{what}{self.family.value}"


_LAYOUTS: Final = (
    _Layout(Family.IPV4, b"\x08\x00", 12, 16, 4, _IPV4, (1, b"\xfc", bytes((ANSWER_DSCP << 2,)))),
    _Layout(
        Family.IPV6,
        b"\x86\xdd",
        8,
        24,
        16,
        _IPV6,
        (0, b"\x0f\xc0", struct.pack(">H", ANSWER_DSCP << 6)),
    ),
)


SETS: Final = tuple(f"{what}{family.value}" for family in Family for what in ("good", "free"))
"""The sets that hold pairs."""


def fill_mac_filter(batch: Batch, devices: Iterable[str]) -> None:
    """Put chains, rules and empty sets into a table that is new."""
    names = tuple(devices)
    # All but the base chains is the same for each table name of one length, and takes most of the time.
    batch.take(_inner(len(batch.table)))
    batch.make_base_chain("ingress", Hook.INGRESS, _BEFORE_OTHERS, names)
    batch.make_base_chain("egress", Hook.EGRESS, _AFTER_OTHERS, names)
    batch.take(_outer(len(batch.table)))


@lru_cache(maxsize=8)
def _outer(length: int) -> Batch:
    batch = Batch("x" * length)
    for ethertype in _VLANS:
        tagged = meta(PROTOCOL) + compare(ethertype) + payload(LINK, _VLAN_ID, 2)
        batch.make_rule(
            "ingress", tagged, bitwise(b"\x0f\xff"), compare(b"\0\0"), verdict(Verdict.DROP)
        )
    for layout in _LAYOUTS:
        for chain, offset, to in (
            ("ingress", layout.target, "in"),
            ("egress", layout.source, "out"),
        ):
            batch.make_rule(
                chain,
                meta(PROTOCOL) + compare(layout.ethertype),
                payload(NETWORK, offset, layout.length)
                + compare(layout.family.metadata_address.packed),
                verdict(Verdict.JUMP, layout.name(to)),
            )
    return batch


@lru_cache(maxsize=8)
def _inner(length: int) -> Batch:
    batch = Batch("x" * length)
    for layout in _LAYOUTS:
        for number, kind in enumerate(_sets(layout), start=layout.family.value * 10):
            batch.make_set(kind, number)
        for chain in ("pass", "in", "back", "out"):
            batch.make_chain(layout.name(chain))
        _inward(batch, layout)
        _outward(batch, layout)
    return batch


def _sets(layout: _Layout) -> tuple[SetKind, ...]:
    address, name = layout.kind, layout.name
    flow = ((address, _SERVICE), layout.length + 4)
    mac = (_ETHER, _MAC_BYTES)
    return (
        SetKind(name("good"), (address, _ETHER), layout.length + 8),
        SetKind(name("free"), (address,), layout.length),
        SetKind(name("open"), *flow, size=_FLOWS, timeout_ms=_OPEN_MS, dynamic=True),
        SetKind(name("from"), *flow, size=_FLOWS, timeout_ms=_FROM_MS, dynamic=True, value=mac),
        SetKind(name("told"), *flow, size=_FLOWS, timeout_ms=_TOLD_MS, value=mac),
    )


def _port(offset: int) -> bytes:
    return meta(L4_PROTOCOL) + compare(_TCP) + payload(TRANSPORT, offset, 2)


def _inward(batch: Batch, layout: _Layout) -> None:
    name, words = layout.name, layout.words
    source = payload(NETWORK, layout.source, layout.length)
    pair = source + payload(LINK, _SADDR_MAC, _MAC_BYTES, into=words)
    flow = source + payload(TRANSPORT, _SPORT, 2, into=words)
    if layout.family is Family.IPV4:
        fragment = payload(NETWORK, 6, 2) + bitwise(b"\x3f\xff") + differs(b"\0\0")
    else:
        fragment = present6(_FRAGMENT_HEADER)
    chain = name("in")
    batch.make_rule(chain, fragment, verdict(Verdict.DROP))
    batch.make_rule(chain, _port(_DPORT), compare(_VERIFIED), verdict(Verdict.DROP))
    batch.make_rule(chain, _port(_DPORT), differs(_GUESTS), verdict(Verdict.RETURN))
    batch.make_rule(chain, pair, lookup(name("good")), verdict(Verdict.GOTO, name("pass")))
    batch.make_rule(chain, source, lookup(name("free")), verdict(Verdict.GOTO, name("pass")))
    tcp = meta(L4_PROTOCOL) + compare(_TCP)
    begins = tcp + payload(TRANSPORT, _FLAGS, 1) + bitwise(b"\x17") + compare(b"\x02")
    sender = flow + payload(LINK, _SADDR_MAC, _MAC_BYTES, into=words + 1)
    # An update alone would leave the MAC of an earlier connection.
    for what in ("delete", "update"):
        batch.make_rule(chain, begins, sender, remember(name("from"), what, value=words + 1))
    batch.make_rule(chain, tcp, flow, remember(name("open"), "update"))
    chain = name("pass")
    batch.make_rule(chain, begins, flow, remember(name("open"), "delete"))
    batch.make_rule(chain, tcp, flow, lookup(name("open")), verdict(Verdict.RETURN))
    batch.make_rule(chain, tcp, rewrite(_DPORT, _VERIFIED, checksum=_CHECKSUM))


def _outward(batch: Batch, layout: _Layout) -> None:
    name, words = layout.name, layout.words
    target = payload(NETWORK, layout.target, layout.length)
    pair = target + payload(LINK, _DADDR_MAC, _MAC_BYTES, into=words)
    flow = target + payload(TRANSPORT, _DPORT, 2, into=words)
    offset, mask, marked = layout.dscp
    dscp = payload(NETWORK, offset, len(mask)) + bitwise(mask)
    tcp = meta(L4_PROTOCOL) + compare(_TCP)
    chain = name("out")
    batch.make_rule(chain, _port(_SPORT), compare(_VERIFIED), verdict(Verdict.GOTO, name("back")))
    batch.make_rule(chain, _port(_SPORT), differs(_GUESTS), verdict(Verdict.RETURN))
    to = store(LINK, _DADDR_MAC, _MAC_BYTES, register=words + 1)
    batch.make_rule(chain, tcp, flow, lookup(name("from"), into=words + 1), to)
    batch.make_rule(chain, dscp, differs(marked), verdict(Verdict.RETURN))
    batch.make_rule(chain, target, lookup(name("free")), verdict(Verdict.RETURN))
    bound = flow + lookup(name("told"), into=words + 1) + to
    batch.make_rule(chain, tcp, bound, verdict(Verdict.RETURN))
    batch.make_rule(chain, tcp, verdict(Verdict.DROP))
    chain = name("back")
    answer = rewrite(_SPORT, _GUESTS, checksum=_CHECKSUM)
    batch.make_rule(chain, pair, lookup(name("good")), answer, verdict(Verdict.RETURN))
    batch.make_rule(chain, target, lookup(name("free")), answer, verdict(Verdict.RETURN))
    batch.make_rule(chain, verdict(Verdict.DROP))


def set_of(address: IpAddress, mac: MacAddress) -> str:
    """The set that a pair is in."""
    return f"{'free' if mac == ANY_MAC else 'good'}{address.version}"


def element_of(address: IpAddress, mac: MacAddress) -> bytes:
    """A pair as its set's key."""
    return address.packed if mac == ANY_MAC else address.packed + packed_mac(mac) + b"\0\0"


def pair_of(name: str, key: bytes) -> tuple[IpAddress, MacAddress]:
    """The reverse of both."""
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
