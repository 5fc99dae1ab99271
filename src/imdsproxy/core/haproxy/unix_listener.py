"""The listener `unix`: Neutron's agent protocol, as its proxies speak it (neutron/agent/metadata/driver_base.py).

A proxy in a namespace says in one header which network or router it stands in, and in `X-Forwarded-For` who
asks. Both are believed, because only who may open the socket can send them; but a guest's own header that a
proxy let through shows as a second one, and such a request is refused.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.haproxy.model import UnixBind, Words

__all__ = ["agent_rules", "unix_bind"]

_NETWORKS: Final = ("x-neutron-network-id", "x-ovn-network-id")
_ROUTER: Final = "x-neutron-router-id"
_ID: Final = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_REFUSE: Final[Words] = ("http-request", "return", "status", "400")


def unix_bind(bind: UnixBind) -> Words:
    """The socket."""
    return ("bind", f"unix@{bind.path}", "name", "agents", "mode", bind.mode,
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
        (*_REFUSE, "unless", "{", "var(txn.networks),add(txn.ovn),add(txn.routers)", "-m", "int", "1", "}",
         "{", "req.fhdr_cnt(x-forwarded-for)", "1", "}"),
        ("http-request", "set-var(sess.network)", f"req.fhdr({first})", "if", *_found("txn.networks")),
        ("http-request", "set-var(sess.network)", f"req.fhdr({second})", "if", *_found("txn.ovn")),
        ("http-request", "set-var(sess.network)", f"req.fhdr({_ROUTER})", "if", *_found("txn.routers")),
        ("http-request", "set-var(sess.router)", "bool(false)"),
        ("http-request", "set-var(sess.router)", "bool(true)", "if", *_found("txn.routers")),
        # As an address and back: however it was spelled, the map knows one spelling. A dual-stack socket's
        # IPv4 peers come as ::ffff:a.b.c.d.
        ("http-request", "set-var(sess.address)", "req.fhdr(x-forwarded-for),ipmask(32,128),regsub(^::ffff:,)"),
        (*_REFUSE, "unless", "{", "var(sess.network)", "-m", "reg", _ID, "}",
         "{", "var(sess.address)", "-m", "found", "}"),
        ("http-request", "set-var(sess.key)", "var(sess.network),concat(/,sess.address)"),
    )  # fmt: skip


def _found(variable: str) -> Words:
    return ("{", f"var({variable})", "-m", "int", "1", "}")
