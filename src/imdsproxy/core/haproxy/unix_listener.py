"""The listener `unix`: Neutron's agent protocol, as its proxies speak it (neutron/agent/metadata/driver_base.py).

A proxy in a namespace says in one header which network or router it stands in, and in `X-Forwarded-For` who
asks. Both are believed, because only who may open the socket can send them; but a guest's own header that a
proxy let through shows as a second one, and such a request is refused.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.haproxy.model import UnixBind, Words
from imdsproxy.core.haproxy.rules import refuse_forwarded_token, retry_later
from imdsproxy.core.model import ID_PATTERN

__all__ = ["AGENTS", "agent_rules", "share_rules", "unix_bind"]

AGENTS: Final = "agents"
"""The frontend's name and the bind's."""


_NETWORKS: Final = ("x-neutron-network-id", "x-ovn-network-id")
_ROUTER: Final = "x-neutron-router-id"
_PEER: Final = "x-forwarded-for"

_OCTET: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_QUAD: Final = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_MAPPED: Final = (
    "(?:(?:0{1,4}:){5}|(?:::|(?:0{1,4}:)+:)(?:0{1,4}:)*)[Ff]{4}:"
    f"(?:{_QUAD}|[0-9A-Fa-f]{{1,4}}:[0-9A-Fa-f]{{1,4}})"
)
_IPV4: Final = f"^(?:{_QUAD}|{_MAPPED})$"
_IPV6: Final = f"^[0-9A-Fa-f:]+(?:{_QUAD})?$"


def unix_bind(bind: UnixBind) -> Words:
    """The socket."""
    return ("bind", f"unix@{bind.path}", "name", AGENTS, "mode", bind.mode,
            "uid", str(bind.user), "gid", str(bind.group), "proto", "h1", "maxconn", str(bind.maxconn))  # fmt: skip


def agent_rules() -> tuple[Words, ...]:
    """From headers to `sess.network`, `sess.address`, `sess.router` and `sess.key`, or 400."""
    first, second = _NETWORKS
    return (
        # A connection may carry requests of several guests: nothing of the one before may remain.
        ("http-request", "unset-var(sess.network)"),
        ("http-request", "unset-var(sess.address)"),
        ("http-request", "set-var(txn.networks)", f"req.fhdr_cnt({first})"),
        ("http-request", "set-var(txn.ovn)", f"req.fhdr_cnt({second})"),
        ("http-request", "set-var(txn.routers)", f"req.fhdr_cnt({_ROUTER})"),
        ("http-request", "set-var(sess.network)", f"req.fhdr({first})", "if", *_found("txn.networks")),
        ("http-request", "set-var(sess.network)", f"req.fhdr({second})", "if", *_found("txn.ovn")),
        ("http-request", "set-var(sess.network)", f"req.fhdr({_ROUTER})", "if", *_found("txn.routers")),
        (*_refuse("exactly one of X-Neutron-Network-ID, X-Neutron-Router-ID and X-OVN-Network-ID is needed"), "unless",
         "{", "var(txn.networks),add(txn.ovn),add(txn.routers)", "-m", "int", "1", "}",
         "{", "var(sess.network)", "-m", "reg", ID_PATTERN, "}"),
        ("http-request", "set-var(sess.router)", "bool(false)"),
        ("http-request", "set-var(sess.router)", "bool(true)", "if", *_found("txn.routers")),
        ("http-request", "set-var(txn.peer)", f"req.fhdr({_PEER})", "if", "{", f"req.fhdr_cnt({_PEER})", "1", "}"),
        # As an address and back: however it was spelled, the map knows one spelling. HAProxy alone would take
        # `10.0.0.5, 10.0.0.6` for the first of the two, and the IPv6 address `::10.0.0.5` for the IPv4 one. Only
        # `::ffff:10.0.0.5` is that: a dual-stack socket's IPv4 peers come so.
        ("http-request", "set-var(sess.address)", "var(txn.peer),ipmask(32,128)",
         "if", "{", "var(txn.peer)", "-m", "reg", _IPV4, "}"),
        ("http-request", "set-var(txn.ipv6)", "var(txn.peer),ipmask(32,128)",
         "if", "!{", "var(sess.address)", "-m", "found", "}", "{", "var(txn.peer)", "-m", "reg", _IPV6, "}"),
        # Of an address of 6to4 (2002::/16) HAProxy makes the IPv4 one that is in it. Proxies spell as the map does.
        ("http-request", "set-var(txn.ipv6)", "var(txn.peer),lower",
         "if", "{", "var(txn.ipv6)", "-m", "found", "}", "{", "var(txn.peer)", "-m", "beg", "2002:", "}"),
        ("http-request", "set-var(sess.address)", "var(txn.ipv6)", "if", "{", "var(txn.ipv6)", "-m", "sub", ":", "}"),
        # Neutron's proxies add theirs: with two, one is the guest's.
        *refuse_forwarded_token("{", f"req.fhdr_cnt({_PEER})", "gt", "1", "}"),
        (*_refuse("exactly one X-Forwarded-For with one address is needed"),
         "unless", "{", "var(sess.address)", "-m", "found", "}"),
        ("http-request", "set-var(sess.key)", "var(sess.network),concat(/,sess.address)"),
    )  # fmt: skip


def share_rules(per_network: int, in_all: int) -> tuple[Words, ...]:
    """No network may have more requests open than its share: slow senders and readers would keep the others out.

    Other listeners' networks have a bind each, whose `maxconn` does that. Kept connections do not count here. Five
    networks together would still fill the socket: once it is three quarters full, a share is an eighth of what it was.

    Args:
        per_network: Requests of one network.
        in_all: Connections of the socket.
    """
    eighth, most = max(1, per_network // 8), in_all * 3 // 4
    scarce = ("{", "sc1_conn_cur", "gt", str(eighth), "}", "{", "fe_conn", "gt", str(most), "}")
    return (
        ("stick-table", "type", "string", "len", "64", "size", "20k", "expire", "60s", "store", "conn_cur"),
        ("http-request", "track-sc1", "var(sess.network)"),
        (*retry_later(), "if", "{", "sc1_conn_cur", "gt", str(per_network), "}", "or", *scarce),
    )  # fmt: skip


def _found(variable: str) -> Words:
    return ("{", f"var({variable})", "-m", "int", "1", "}")


def _refuse(why: str) -> Words:
    # `deny` and not `return`: it is counted.
    return ("http-request", "deny", "status", "400", "content-type", "text/plain", "string", why)
