"""Where guests come in, who they are, and whose answer they get: the rules that every request goes through."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from imdsproxy.core.haproxy.access_rules import (
    NOTE_CHECKS,
    READ_FORWARDING,
    READ_POLICY,
    REFUSE_FORWARDED_TOKEN,
    SHOW_TOKEN_LIFE,
    SKIP_CHECKS,
)
from imdsproxy.core.haproxy.backends import answer_plain, answer_short, ask_the_cache
from imdsproxy.core.haproxy.counting import READ_OPERATOR, sample_reads
from imdsproxy.core.haproxy.limits import (
    COUNT_CONNECTIONS,
    COUNT_NEWCOMERS,
    SHARE_BY_CONNECTION,
    SHARE_BY_REQUEST,
    SHARE_OF_FOUND,
)
from imdsproxy.core.haproxy.model import Bind, DataplaneSpec, UnixBind
from imdsproxy.core.haproxy.nova import use_nova
from imdsproxy.core.haproxy.request_log import NOTE_GOOD_TOKEN, log_rules
from imdsproxy.core.haproxy.text import Form, Option, Text, Word, quote, raw
from imdsproxy.core.model import ID_PATTERN, IpAddress

AGENTS: Final = "agents"
"""The frontend's name and the bind's."""

# The guest's address is a property of the connection; what that means is looked up for each request.
# As text: an address would be spelled anew for each request.
_PEER: Final = """
    tcp-request connection set-var(sess.address) src,concat()
    tcp-request connection set-var(sess.network) so_name
"""

LOOK_UP: Final = (
    """
    http-request set-var(txn.record) var(sess.key),map_str(<overlay_map>)
    http-request set-var(txn.record) var(sess.key),map_str(<base_map>) if !{ var(txn.record) -m found }
"""
    + READ_POLICY
)

_READ_FOUND: Final = (
    """
    # No second line in the audit log: here it is known who asks.
    [audited] http-after-response set-header <header_logged> yes
    http-request set-var(txn.record) req.fhdr(<header_record>)
    http-request set-var(sess.address) req.fhdr(<header_address>)
    http-request set-var(sess.network) req.fhdr(<header_network>)
"""
    + READ_POLICY
    + READ_FORWARDING
    + READ_OPERATOR
    + SHARE_OF_FOUND
    + """
    http-request set-var(sess.from_resolver) bool(true)
"""
)

# Neutron's agent protocol, as its proxies speak it (neutron/agent/metadata/driver_base.py). A proxy in a namespace
# names its network or router in one header, and the guest's address in `X-Forwarded-For`. Both are believed, because
# only processes with access to the socket can send them; but a guest's own header that a proxy let through shows as a
# second one, and such a request is refused.
_OCTET: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_QUAD: Final = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_MAPPED: Final = (
    "(?:(?:0{1,4}:){5}|(?:::|(?:0{1,4}:)+:)(?:0{1,4}:)*)[Ff]{4}:"
    f"(?:{_QUAD}|[0-9A-Fa-f]{{1,4}}:[0-9A-Fa-f]{{1,4}})"
)
_IPV4: Final = f"^(?:{_QUAD}|{_MAPPED})$"
_IPV6: Final = f"^[0-9A-Fa-f:]+(?:{_QUAD})?$"

_UNIX_BIND: Final = (
    "bind unix@<path> name agents mode <mode> uid <uid> gid <gid> proto h1 maxconn <maxconn>"
)

_AGENT_RULES: Final = """
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
"""
_AGENTS_ADDRESS: Final = """
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

_CHOOSE_DOCUMENTS: Final = """
    [counts_reads] use_backend documents.sampled if <is_sampled>
    use_backend documents.checked if <needs_check> <known>
    use_backend documents if <known>
    use_backend conflict if <in_conflict>
"""


def guests_frontend(spec: DataplaneSpec, form: Form) -> Text:
    """Where guests connect; a connection is one guest's."""
    return form.section(
        "frontend guests",
        _binds(spec.binds, spec),
        _PEER,
        "tcp-request connection set-var(sess.key) so_name,concat(/,sess.address)",
        COUNT_CONNECTIONS,
        log_rules(spec, form),
        LOOK_UP,
        SHARE_BY_CONNECTION,
        answer_plain(spec, form),
        _answer(spec, form),
    )


def unverified_frontend(spec: DataplaneSpec, form: Form) -> Text:
    """Connections that the kernel has not let through to `guests`: the resolver looks up whose each address is now."""
    return form.section(
        "frontend unverified",
        _binds(spec.unverified, spec),
        _PEER,
        "tcp-request connection set-var(sess.unverified) src_port",
        COUNT_NEWCOMERS,
        log_rules(spec, form),
        # The next request comes verified, if it may.
        "option httpclose",
        "default_backend resolver",
    )


def agents_frontend(spec: DataplaneSpec, bind: UnixBind, form: Form) -> Text:
    """The listener `unix`, where Neutron's proxies connect; each request names its guest."""
    return form.section(
        "frontend agents",
        _UNIX_BIND,
        log_rules(spec, form, headers=True),
        _AGENT_RULES,
        REFUSE_FORWARDED_TOKEN,
        _AGENTS_ADDRESS,
        LOOK_UP,
        SHARE_BY_REQUEST,
        answer_plain(spec, form),
        _answer(spec, form),
        path=Word(bind.path),
        mode=Word(bind.mode),
        uid=bind.user,
        gid=bind.group,
        maxconn=bind.maxconn,
        eighth=max(1, spec.limits.maxconn_per_network // 8),
        nearly_full=bind.maxconn * 3 // 4,
        id_pattern=Word(ID_PATTERN),
        ipv4=Word(_IPV4),
        ipv6=Word(_IPV6),
        forwarded=raw("{ req.fhdr_cnt(x-forwarded-for) gt 1 }"),
    )


def found_frontend(spec: DataplaneSpec, form: Form) -> Text:
    """Where the resolver hands in requests of guests that it has just found; only we can open it."""
    return form.section(
        "frontend found",
        "bind unix@<found> name found mode 600 proto h1",
        log_rules(spec, form, headers=True) if spec.audit else "",
        _READ_FOUND,
        _answer(spec, form, found=True),
    )


def _answer(spec: DataplaneSpec, form: Form, *, found: bool = False) -> Text:
    """From `txn.record` to the backend that answers."""
    # What comes from the resolver does not go back to it.
    default = "default_backend conflict" if found else "default_backend resolver"
    if spec.nova:
        return form.fill(
            NOTE_CHECKS,
            NOTE_GOOD_TOKEN,
            sample_reads(spec, form, found=found),
            use_nova(spec, form, found=found),
            _CHOOSE_DOCUMENTS,
            default,
        )
    # In front of Nova most requests have nothing to do with the cache, and its filter would cost each of them
    # a tenth. Elsewhere all have, and a hit that first chose a backend takes a third more instructions.
    return form.fill(
        NOTE_CHECKS,
        SKIP_CHECKS,
        SHOW_TOKEN_LIFE,
        NOTE_GOOD_TOKEN,
        sample_reads(spec, form, found=found),
        "" if found else answer_short(spec, form),
        ask_the_cache(form, checked_elsewhere=True),
        _CHOOSE_DOCUMENTS,
        default,
    )


@lru_cache(maxsize=64)
def _host(address: IpAddress) -> str:
    # There are two metadata addresses and thousands of binds; an IPv6 address takes 4 µs to spell.
    return f"[{address}]" if address.version == 6 else str(address)  # noqa: PLR2004 - IP version


def _binds(binds: Iterable[Bind], spec: DataplaneSpec) -> Text:
    # Not by a template: there may be 20,000, and each is a few microseconds of every change of a network.
    end = f"proto h1 maxconn {spec.limits.maxconn_per_network}"
    return Text(tuple(f"{_bind(bind)} {end}" for bind in sorted(binds, key=_bind_order)))


def _bind(bind: Bind) -> str:
    words = [f"bind {_host(bind.address)}:{bind.port} name {quote(bind.network)}"]
    options = (Option("interface", bind.device), Option("namespace", bind.namespace))
    return " ".join((*words, *(str(one) for one in options if one.word is not None)))


def _bind_order(bind: Bind) -> tuple[str, int, str, int, str, str]:
    return (
        bind.network,
        bind.address.version,
        _host(bind.address),
        bind.port,
        bind.device or "",
        bind.namespace or "",
    )
