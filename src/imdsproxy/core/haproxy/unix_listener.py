"""The listener `unix`: Neutron's agent protocol, as its proxies speak it (neutron/agent/metadata/driver_base.py).

A proxy in a namespace names its network or router in one header, and the guest's address in `X-Forwarded-For`. Both
are believed, because only processes with access to the socket can send them; but a guest's own header that a
proxy let through shows as a second one, and such a request is refused.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.haproxy.access_rules import REFUSE_FORWARDED_TOKEN
from imdsproxy.core.haproxy.model import UnixBind
from imdsproxy.core.haproxy.text import Form, Text, Value, Word
from imdsproxy.core.model import ID_PATTERN

AGENTS: Final = "agents"
"""The frontend's name and the bind's."""

_OCTET: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_QUAD: Final = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_MAPPED: Final = (
    "(?:(?:0{1,4}:){5}|(?:::|(?:0{1,4}:)+:)(?:0{1,4}:)*)[Ff]{4}:"
    f"(?:{_QUAD}|[0-9A-Fa-f]{{1,4}}:[0-9A-Fa-f]{{1,4}})"
)
_IPV4: Final = f"^(?:{_QUAD}|{_MAPPED})$"
_IPV6: Final = f"^[0-9A-Fa-f:]+(?:{_QUAD})?$"

UNIX_BIND: Final = """
    bind <agents_socket> name agents mode <mode> uid <uid> gid <gid> proto h1 maxconn <maxconn>
"""

AGENT_RULES: Final = """
    [audited] http-request set-var(txn.refused) str(unix-listener)
    # A connection may carry requests of several guests: nothing of the one before may remain.
    http-request unset-var(sess.network)
    http-request unset-var(sess.address)
    http-request set-var(txn.networks) req.fhdr_cnt(x-neutron-network-id)
    http-request set-var(txn.ovn) req.fhdr_cnt(x-ovn-network-id)
    http-request set-var(txn.routers) req.fhdr_cnt(x-neutron-router-id)
    http-request set-var(sess.network) req.fhdr(x-neutron-network-id) if { var(txn.networks) -m int 1 }
    http-request set-var(sess.network) req.fhdr(x-ovn-network-id) if { var(txn.ovn) -m int 1 }
    http-request set-var(sess.network) req.fhdr(x-neutron-router-id) if { var(txn.routers) -m int 1 }
    # `deny` and not `return`: it is counted.
    http-request deny status 400 content-type text/plain
        string 'exactly one of X-Neutron-Network-ID, X-Neutron-Router-ID and X-OVN-Network-ID is needed'
        unless { var(txn.networks),add(txn.ovn),add(txn.routers) -m int 1 } { var(sess.network) -m reg <id_pattern> }
    http-request set-var(sess.router) bool(false)
    http-request set-var(sess.router) bool(true) if { var(txn.routers) -m int 1 }
    http-request set-var(txn.peer) req.fhdr(x-forwarded-for) if { req.fhdr_cnt(x-forwarded-for) 1 }
    # As an address and back: however it was spelled, the map knows one spelling. HAProxy alone would take
    # `10.0.0.5, 10.0.0.6` for the first of the two, and the IPv6 address `::10.0.0.5` for the IPv4 one. Only
    # `::ffff:10.0.0.5` is that: a dual-stack socket's IPv4 peers come so.
    http-request set-var(sess.address) var(txn.peer),ipmask(32,128) if { var(txn.peer) -m reg <ipv4> }
    http-request set-var(txn.ipv6) var(txn.peer),ipmask(32,128)
        if !{ var(sess.address) -m found } { var(txn.peer) -m reg <ipv6> }
    # Of an address of 6to4 (2002::/16) HAProxy makes the IPv4 one that is in it. Proxies spell as the map does.
    http-request set-var(txn.ipv6) var(txn.peer),lower
        if { var(txn.ipv6) -m found } { var(txn.peer) -m beg 2002: }
    http-request set-var(sess.address) var(txn.ipv6) if { var(txn.ipv6) -m sub : }
    # Neutron's proxies add theirs: with two, one is the guest's.
    <refuse_forwarded_token>
    http-request deny status 400 content-type text/plain
        string 'exactly one X-Forwarded-For with one address is needed' unless { var(sess.address) -m found }
    http-request set-var(sess.key) var(sess.network),concat(/,sess.address)
    # No network may have more requests open than its share: slow senders and readers would keep the others out. Other
    # listeners' networks have a bind each, whose `maxconn` does that. Kept connections do not count here. Five networks
    # together would still fill the socket: once it is three quarters full, a share is an eighth of what it was.
    [audited] http-request set-var(txn.refused) str(share)
    stick-table type string len 64 size 20k expire 60s store conn_cur
    http-request track-sc1 var(sess.network)
    http-request return status 503 hdr Retry-After <retry_after_s>
        if { sc1_conn_cur gt <maxconn_per_network> } or { sc1_conn_cur gt <eighth> } { fe_conn gt <nearly_full> }
    [audited] http-request unset-var(txn.refused)
"""
"""From headers to `sess.network`, `sess.address`, `sess.router` and `sess.key`, or 400; 503 above a network's share."""


def names_of_agents(bind: UnixBind, per_network: int, form: Form) -> dict[str, Value]:
    """What the templates of this module name; a network may have `per_network` requests open."""
    return {
        "agents_socket": Word(f"unix@{bind.path}"),
        "mode": Word(bind.mode),
        "uid": bind.user,
        "gid": bind.group,
        "maxconn": bind.maxconn,
        "eighth": max(1, per_network // 8),
        "nearly_full": bind.maxconn * 3 // 4,
        "id_pattern": Word(ID_PATTERN),
        "ipv4": Word(_IPV4),
        "ipv6": Word(_IPV6),
        "refuse_forwarded_token": form.fill(
            REFUSE_FORWARDED_TOKEN, forwarded=Text(("{ req.fhdr_cnt(x-forwarded-for) gt 1 }",))
        ),
    }
