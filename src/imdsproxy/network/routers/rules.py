"""Tables of nf_tables in the namespace of a Neutron router, rule by rule. Pure.

The rules are shown in nft(8)'s syntax, for IPv4 (IPv6 is the same), where M is the metadata address. The first table
exists as long as the namespace, so that no request ever reaches another router:

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

import struct
from typing import Final

from imdsproxy.host import nftables as nft
from imdsproxy.host.nftables import NETWORK, TRANSPORT, Batch
from imdsproxy.model.entities import METADATA_PORT
from imdsproxy.model.wire import REDIRECTED_PORT
from imdsproxy.network.anti_spoofing.rules import LAYOUTS, fill_redirected_hop_limit

FORMAT: Final = 1
"""Format number in each table's comment: a table with another number is replaced."""

_GUEST_DEVICES: Final = b"qr-"
_DPORT: Final = 2
_BEFORE_IPTABLES: Final = -101
_AFTER_NAT: Final = -90
_FILTER: Final = 0
_DROP: Final = nft.verdict(nft.DROP)


def fill_drop(batch: Batch) -> None:
    """Add the rules to a new table that keep packets for the metadata addresses from reaching another router."""
    batch.make_base_chain("arriving", nft.PREROUTING, _AFTER_NAT)
    batch.make_base_chain("input", nft.INPUT, _FILTER)
    for layout in LAYOUTS:
        batch.make_rule(
            "arriving", *_to_metadata(layout.protocol, layout.metadata, layout.target), _DROP
        )
        to_ours = _to_port(REDIRECTED_PORT)
        batch.make_rule("input", layout.is_tcp, to_ours, nft.is_redirected(differs=True), _DROP)


def fill_redirect(batch: Batch) -> None:
    """Add the rules to a new table that redirect guests' requests to HAProxy."""
    batch.make_base_chain("redirect", nft.PREROUTING, _BEFORE_IPTABLES, kind="nat")
    inward = nft.meta(nft.INPUT_DEVICE) + nft.compare(_GUEST_DEVICES)
    for layout in LAYOUTS:
        metadata = layout.load(layout.target) + nft.compare(layout.metadata)
        port = _to_port(METADATA_PORT)
        rule = (inward, layout.is_tcp, metadata, port, nft.redirect(REDIRECTED_PORT))
        batch.make_rule("redirect", *rule)
    fill_redirected_hop_limit(batch)


def _to_metadata(protocol: int, metadata: bytes, offset: int) -> tuple[bytes, ...]:
    family = nft.meta(nft.FAMILY) + nft.compare(bytes((protocol,)))
    return family, nft.payload(NETWORK, offset, len(metadata)) + nft.compare(metadata)


def _to_port(port: int) -> bytes:
    return nft.payload(TRANSPORT, _DPORT, 2) + nft.compare(struct.pack(">H", port))
