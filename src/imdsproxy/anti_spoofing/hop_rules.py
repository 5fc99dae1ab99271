"""The rule that turns DSCPs into hop limits (`core.wire`), in nf_tables of each namespace that needs it.

In nft(8)'s syntax, where M is the metadata address, for IPv4 (and the same for IPv6, with its hop limit):

    chain output                                  # hook output, before all other programs' chains
      ip saddr M tcp sport 80 jump limit4         # and 254, behind a MAC filter
    chain limit4
      ip dscp 0 return
      ip dscp 0x2f return                         # the MAC filter's own mark
      ip ttl set (ip dscp)                        # nft(8) has no syntax for it
      ip dscp set 0
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.hoststate import Family
from imdsproxy.core.model import METADATA_PORT
from imdsproxy.core.wire import ANSWER_DSCP, VERIFIED_PORT
from imdsproxy.host.nftables import (
    FAMILY,
    L4_PROTOCOL,
    NETWORK,
    TRANSPORT,
    Batch,
    Hook,
    Verdict,
    bitwise,
    compare,
    meta,
    payload,
    replace_bits,
    shift_right,
    store,
    swap_bytes,
    verdict,
)

_BEFORE_OTHERS: Final = -400
_TCP: Final = bytes((socket.IPPROTO_TCP,))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things are in a family's header.

    Attributes:
        protocol: The family's number (`NFPROTO_IPV4`, `NFPROTO_IPV6`).
        source: Where the source address is.
        dscp: Mask for the DSCP in the header's first two bytes.
        bits: How far it is above the lowest bit of these.
        limit: Where the two bytes are that have TTL and protocol, or next header and hop limit.
        word: Makes these two of the header, with the DSCP as the limit.
        checksum: Where the header's is, if it has one.
    """

    family: Family
    protocol: int
    source: int
    dscp: bytes
    bits: int
    limit: int
    word: bytes
    checksum: int | None


_LAYOUTS: Final = (
    _Layout(
        Family.IPV4,
        protocol=2,
        source=12,
        dscp=b"\x00\xfc",
        bits=2,
        limit=8,
        # The kernel updates a checksum for two bytes at least; the second one, the protocol, is TCP.
        word=payload(NETWORK, 1, 1) + shift_right(2) + replace_bits(b"\x3f\x00", b"\x00" + _TCP),
        checksum=10,
    ),
    _Layout(
        Family.IPV6,
        protocol=10,
        source=8,
        dscp=b"\x0f\xc0",
        bits=6,
        limit=6,
        word=payload(NETWORK, 0, 2)
        + (swap_bytes() + shift_right(6) + swap_bytes())
        + replace_bits(b"\x00\x3f", _TCP + b"\x00"),
        checksum=None,
    ),
)


def fill_hop_limit(batch: Batch) -> None:
    """Put chains and rules into a table that is new."""
    batch.make_base_chain("output", Hook.OUTPUT, _BEFORE_OTHERS)
    for layout in _LAYOUTS:
        chain = f"limit{layout.family.value}"
        address = layout.family.metadata_address.packed
        batch.make_chain(chain)
        for port in (METADATA_PORT, VERIFIED_PORT):
            batch.make_rule(
                "output",
                meta(FAMILY) + compare(bytes((layout.protocol,))),
                meta(L4_PROTOCOL) + compare(_TCP),
                payload(NETWORK, layout.source, len(address)) + compare(address),
                payload(TRANSPORT, 0, 2) + compare(struct.pack(">H", port)),
                verdict(Verdict.JUMP, chain),
            )
        _limit(batch, chain, layout)


def _limit(batch: Batch, chain: str, layout: _Layout) -> None:
    head = payload(NETWORK, 0, 2)
    for ours in (0, ANSWER_DSCP):
        is_it = bitwise(layout.dscp) + compare(struct.pack(">H", ours << layout.bits))
        batch.make_rule(chain, head, is_it, verdict(Verdict.RETURN))
    batch.make_rule(chain, layout.word, store(NETWORK, layout.limit, 2, checksum=layout.checksum))
    rest = bytes(0xFF ^ byte for byte in layout.dscp)
    batch.make_rule(chain, head, bitwise(rest), store(NETWORK, 0, 2, checksum=layout.checksum))
