"""Where guests come in, who they are, and whose answer they get: the rules that every request goes through."""

from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache
from typing import Final

from imdsproxy.core.haproxy.model import Bind, DataplaneSpec, UnixBind
from imdsproxy.core.haproxy.text import Text, Value, name_values, option, quote
from imdsproxy.core.model import ID_PATTERN, IpAddress

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

FRONTENDS: Final = """
peer:
    # The guest's address is a property of the connection; what that means is looked up for each request.
    # As text: an address would be spelled anew for each request.
    tcp-request connection set-var(sess.address) src,concat()
    tcp-request connection set-var(sess.network) so_name
look_up:
    http-request set-var(txn.record) var(sess.key),map_str(<overlay_map>)
    http-request set-var(txn.record) var(sess.key),map_str(<base_map>) if !{ var(txn.record) -m found }
    <read_policy>
answer:
    # From `txn.record` to the backend that answers.
    # In front of Nova most requests have nothing to do with the cache, and its filter would cost each of them a tenth.
    # Elsewhere all have, and a hit that first chose a backend takes a third more instructions.
    <note_checks>
    [!nova] <skip_checks>
    [!nova] <show_token_life>
    <note_good_token>
    <sample_reads>
    # Nova reads a body by its Content-Length, and HAProxy cannot add one.
    [nova] use_backend resolver if { req.fhdr(transfer-encoding) -m found } <of_nova>
    [nova] <use_nova>
    # An endpoint set that is not in this configuration yet, or not any more.
    [nova] use_backend resolver if <of_nova>
    [!nova] <answer_short>
    [!nova] <ask_the_cache(unless_checked)>
    <choose_documents>
    default_backend resolver
choose_documents:
    [counts_reads] use_backend documents.sampled if <is_sampled>
    use_backend documents.checked if <needs_check> <known>
    use_backend documents if <known>
    use_backend conflict if <in_conflict>

[guests] frontend guests
    # Where guests connect; a connection is one guest's.
    <binds>
    <peer>
    tcp-request connection set-var(sess.key) so_name,concat(/,sess.address)
    <count_connections>
    <log_rules(log_guest)>
    <look_up>
    <share_by_connection>
    <answer_plain>
    <answer>

[gated] frontend unverified
    # Connections that the kernel has not let through to `guests`: the resolver looks up whose each address is now.
    <unverified_binds>
    <peer>
    tcp-request connection set-var(sess.unverified) src_port
    <count_newcomers>
    <log_rules(log_guest)>
    # The next request comes verified, if it may.
    option httpclose
    default_backend resolver

[agents] frontend agents
    # Neutron's agent protocol, as its proxies speak it (neutron/agent/metadata/driver_base.py). A proxy in a namespace
    # names its network or router in one header, and the guest's address in `X-Forwarded-For`. Both are believed,
    # because only processes with access to the socket can send them; but a guest's own header that a proxy let through
    # shows as a second one, and such a request is refused.
    #
    # From headers to `sess.network`, `sess.address`, `sess.router` and `sess.key`, or 400; 503 above a network's
    # share.
    bind unix@<agents_path> name agents mode <agents_mode> uid <agents_user> gid <agents_group>
        proto h1 maxconn <agents_maxconn>
    <log_rules(log_headers)>
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
    http-request set-var(txn.ipv6) var(txn.peer),lower if { var(txn.ipv6) -m found } { var(txn.peer) -m beg 2002: }
    http-request set-var(sess.address) var(txn.ipv6) if { var(txn.ipv6) -m sub : }
    # Neutron's proxies add theirs: with two, one is the guest's.
    <refuse_forwarded_token(forwarded_twice)>
    http-request deny status 400 content-type text/plain
        string 'exactly one X-Forwarded-For with one address is needed' unless { var(sess.address) -m found }
    http-request set-var(sess.key) var(sess.network),concat(/,sess.address)
    # No network may have more requests open than its share: slow senders and readers would keep the others out. Other
    # listeners' networks have a bind each, whose `maxconn` does that. Kept connections do not count here. Five networks
    # together would still fill the socket: once it is three quarters full, a share is an eighth of what it was.
    [audited] http-request set-var(txn.refused) str(share)
    stick-table type string len 64 size 20k expire 60s store conn_cur
    http-request track-sc1 var(sess.network)
    http-request return <status_503>
        if { sc1_conn_cur gt <maxconn_per_network> } or { sc1_conn_cur gt <eighth> } { fe_conn gt <nearly_full> }
    [audited] http-request unset-var(txn.refused)
    <look_up>
    <share_by_request>
    <answer_plain>
    <answer>

[unbound] backend records
    # HAProxy knows a map only by a rule that uses it, and records come before listeners: without this, none could
    # be taken in.
    <look_up>

frontend found
    # Where the resolver hands in requests of guests that it has just found; only we can open it.
    bind unix@<found_socket> name found mode 600 proto h1
    [audited] <log_rules(log_headers)>
    # No second line in the audit log: here it is known who asks.
    [audited] http-after-response set-header <header_logged> yes
    http-request set-var(txn.record) req.fhdr(<header_record>)
    http-request set-var(sess.address) req.fhdr(<header_address>)
    http-request set-var(sess.network) req.fhdr(<header_network>)
    <read_policy>
    <read_forwarding>
    <read_operator>
    <track_by_request(always)>
    <count_request>
    http-request set-var(sess.from_resolver) bool(true)
    <note_checks>
    [!nova] <skip_checks>
    [!nova] <show_token_life>
    <note_good_token>
    <sample_found>
    [nova] <use_nova>
    # What comes from the resolver does not go back to it.
    [nova] use_backend conflict if <of_nova>
    [!nova] <ask_the_cache(unless_checked)>
    <choose_documents>
    default_backend conflict
"""


def names_of_frontends(spec: DataplaneSpec) -> dict[str, Value]:
    """What `FRONTENDS` names beside what every template may."""
    bind = spec.unix or UnixBind("", "", 0, 0)
    return {
        "guests": bool(spec.binds),
        "binds": _bind_lines(spec.binds, spec),
        "gated": bool(spec.unverified),
        "unverified_binds": _bind_lines(spec.unverified, spec),
        "unbound": not spec.binds and spec.unix is None,
        "agents": spec.unix is not None,
        **name_values(asdict(bind), "agents_"),
        "eighth": max(1, spec.limits.maxconn_per_network // 8),
        "nearly_full": bind.maxconn * 3 // 4,
        "id_pattern": ID_PATTERN,
        "ipv4": _IPV4,
        "ipv6": _IPV6,
        "forwarded_twice": Text("{ req.fhdr_cnt(x-forwarded-for) gt 1 }"),
    }


@lru_cache(maxsize=64)
def _host(address: IpAddress) -> str:
    # There are two metadata addresses and thousands of binds; an IPv6 address takes 4 µs to spell.
    return f"[{address}]" if address.version == 6 else str(address)  # noqa: PLR2004 - IP version


def _bind_lines(binds: Iterable[Bind], spec: DataplaneSpec) -> Text:
    # Not by a template: there may be 20,000, and each is a few microseconds of every change of a network.
    end = f"proto h1 maxconn {spec.limits.maxconn_per_network}"
    return Text("\n".join(f"{_bind(bind)} {end}" for bind in sorted(binds, key=_bind_order)))


def _bind(bind: Bind) -> str:
    device, namespace = option("interface", bind.device), option("namespace", bind.namespace)
    start = f"bind {_host(bind.address)}:{bind.port} name {quote(bind.network)}"
    return " ".join(filter(None, (start, device, namespace)))


def _bind_order(bind: Bind) -> tuple[str, int, str, int, str, str]:
    device, namespace = bind.device or "", bind.namespace or ""
    host = _host(bind.address)
    return bind.network, bind.address.version, host, bind.port, device, namespace
