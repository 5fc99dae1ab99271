"""From `DataplaneSpec` to sections: the life of a request, in HAProxy's rules.

Each rule that guards something says what it guards. The order inside a frontend is the order of
evaluation; rules that cost time stand behind `cache-use`, where repeated reads never come.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final

from imdsproxy.core.gates import ANSWER_DSCP
from imdsproxy.core.haproxy.audit import (
    audit_found,
    audit_ring,
    audit_rules,
    hear_tokens,
    marked,
    passed,
    silence_told,
    without_marks,
)
from imdsproxy.core.haproxy.counting import (
    COUNTED,
    SAMPLED,
    STICK_COUNTERS,
    counting_tables,
    hear_operator,
    sample_reads,
)
from imdsproxy.core.haproxy.guard import (
    ASKED,
    GUARDED,
    hear_forwarded,
    looked_at,
    note_asked,
    pass_at_once,
    policy_rules,
    send_forwarded,
    tell_forwarded,
)
from imdsproxy.core.haproxy.limits import (
    bound_body,
    count_connections,
    count_newcomers,
    fair_share,
    has_said_share,
    limit_sections,
    local_peer,
)
from imdsproxy.core.haproxy.model import Bind, DataplaneSpec, Section, Words
from imdsproxy.core.haproxy.nova import (
    longest_s,
    nova_backends,
    nova_counters,
    use_nova,
)
from imdsproxy.core.haproxy.rules import (
    CONFLICT,
    GUEST_HEADERS,
    KNOWN,
    NOVA,
    TOKEN_HEADERS,
    allow_methods,
    delete_guest_headers,
    negated,
    originate,
    refuse_lengths,
    retry_later,
    tell_to_continue,
)
from imdsproxy.core.haproxy.short import (
    KEPT_SHORT,
    answer_counted,
    answer_plain,
    answer_short,
    keep_short,
)
from imdsproxy.core.haproxy.unix_listener import agent_rules, share_rules, unix_bind
from imdsproxy.core.haproxy.watching import watch_ring, watch_rules
from imdsproxy.core.model import IpAddress
from imdsproxy.core.wire import (
    HEADER_ADDRESS,
    HEADER_INSTANCE,
    HEADER_NETWORK,
    HEADER_RECORD,
    HEADER_REFUSED,
    HEADER_REVISION,
    HEADER_SCOPE,
    HEADER_TARGET,
    HEADER_UNVERIFIED,
)

__all__ = ["build_sections"]


_BEYOND_HOLD_S: Final = 3
"""How much longer than a request may be held HAProxy waits for the resolver."""

_LARGEST_HEAD: Final = 15_000
"""Bytes of what of a request's head goes to the resolver. A buffer has 16,384, and some are HAProxy's own."""

_ODD: Final = ("{", "var(txn.target)", "-m", "found", "}")


def build_sections(spec: DataplaneSpec) -> tuple[Section, ...]:
    """The whole configuration; the same spec always gives the same sections."""
    sections = [_global(spec), _defaults(spec)]
    sections += limit_sections(spec)
    if spec.limits.cache_mb:
        sections.append(_cache(spec))
    if spec.watched:
        sections.append(watch_ring(audited=bool(spec.audit)))
    if spec.audit:
        sections.append(audit_ring(spec.paths.audit))
    if spec.binds:
        sections.append(_guests(spec))
    if spec.unverified:
        sections.append(_unverified(spec))
    if spec.unix is not None:
        sections.append(_agents(spec))
    if not spec.binds and spec.unix is None:
        sections.append(_records(spec))
    sections += [_found(spec), _documents(spec), _documents(spec, GUARDED)]
    if spec.count_reads:
        sections.append(_documents(spec, COUNTED))
    sections += [_resolver(spec), _conflict(), _probe(spec)]
    sections += nova_backends(spec)
    sections += counting_tables()
    if spec.exporter is not None:
        sections.append(_exporter(spec.exporter))
    return tuple(sections)


def _global(spec: DataplaneSpec) -> Section:
    lines: list[Words] = [
        ("nbthread", str(spec.limits.nbthread)),
        ("maxconn", str(spec.limits.maxconn)),
        ("hard-stop-after", f"{spec.limits.hard_stop_after_s}s"),
        # Whoever is older is ended at once, requests that it still works on included (ADR 0022).
        ("mworker-max-reloads", "20"),
        ("tune.maxrewrite", "1024"),
        ("tune.stick-counters", str(STICK_COUNTERS)),
        *local_peer(spec),
        *nova_counters(spec),
    ]
    if spec.user is not None:
        lines.append(("user", spec.user))
    if spec.group is not None:
        lines.append(("group", spec.group))
    if spec.paths.jail is not None:
        lines.append(("chroot", spec.paths.jail))
    return Section(("global",), tuple(lines))


def _cache(spec: DataplaneSpec) -> Section:
    # HAProxy refuses an object size above half of the cache.
    largest = min(spec.limits.max_object_bytes, spec.limits.cache_mb * 1024 * 1024 // 2)
    return Section(
        ("cache", "documents"),
        (
            ("total-max-size", str(spec.limits.cache_mb)),
            ("max-object-size", str(largest)),
            ("max-age", "86400"),
        ),
    )


def _defaults(spec: DataplaneSpec) -> Section:
    return Section(
        ("defaults",),
        (
            ("mode", "http"),
            ("timeout", "connect", "2s"),
            ("timeout", "client", "30s"),
            ("timeout", "server", "30s"),
            ("timeout", "queue", "2s"),
            ("timeout", "http-request", "10s"),
            ("timeout", "tarpit", "1s"),
            ("timeout", "http-keep-alive", "15s"),
            # Without it a reload cuts kept connections off between two requests.
            ("option", "idle-close-on-response"),
            # WSGI upstreams read X_Instance_ID as X-Instance-ID.
            ("option", "http-restrict-req-hdr-names", "delete"),
            ("option", "socket-stats"),
            # A guest must never see 502 or 504: cloud-init's OpenStack source waits on 503 only.
            *(("errorfile", code, spec.paths.unavailable) for code in ("502", "503", "504")),
        ),
    )


@lru_cache(maxsize=64)
def _spelled(address: IpAddress) -> str:
    # There are two metadata addresses and thousands of binds; an IPv6 address takes 4 µs to spell.
    return str(address)


def _bind(bind: Bind, maxconn: int) -> Words:
    address = _spelled(bind.address)
    host = f"[{address}]" if bind.address.version == 6 else address  # noqa: PLR2004 - IP version
    words: list[str] = ["bind", f"{host}:{bind.port}", "name", bind.network]
    if bind.device is not None:
        words += ["interface", bind.device]
    if bind.namespace is not None:
        words += ["namespace", bind.namespace]
    return (*words, "proto", "h1", "maxconn", str(maxconn))


def _guests(spec: DataplaneSpec) -> Section:
    return Section(
        ("frontend", "guests"),
        (
            *_binds(spec.binds, spec),
            *_peer(),
            ("tcp-request", "connection", "set-var(sess.key)", "so_name,concat(/,sess.address)"),
            *count_connections(spec),
            *_told(spec),
            *_look_up(spec),
            *fair_share(spec, by_connection=True),
            *answer_plain(spec, unless=has_said_share(spec)),
            *note_asked(),
            *(
                ()
                if spec.nova
                else pass_at_once(spec.paths.token_keys, unless=has_said_share(spec))
            ),
            *hear_tokens(spec.audit),
            *_answer(spec),
        ),
    )


def _unverified(spec: DataplaneSpec) -> Section:
    """Whoever the kernel has not let through to `guests`: the resolver asks whose the address is now."""
    return Section(
        ("frontend", "unverified"),
        (
            *_binds(spec.unverified, spec),
            *_peer(),
            ("tcp-request", "connection", "set-var(sess.unverified)", "src_port"),
            *count_newcomers(spec),
            *_told(spec),
            # The next request comes verified, if it may.
            ("option", "httpclose"),
            ("default_backend", "resolver"),
        ),
    )


def _told(spec: DataplaneSpec, *, headers: bool = False) -> tuple[Words, ...]:
    """Whom the requests of a frontend are told: who watches, and the audit log."""
    audit = audit_rules(
        spec.audit,
        spec.paths.audit_last,
        nova=bool(spec.nova),
        headers=headers,
        watched=spec.watched,
    )
    return (*(watch_rules(audited=bool(audit)) if spec.watched else ()), *audit)


def _marks(spec: DataplaneSpec, rules: tuple[Words, ...]) -> tuple[Words, ...]:
    return rules if spec.audit else without_marks(rules)


def _binds(binds: Iterable[Bind], spec: DataplaneSpec) -> Iterator[Words]:
    for bind in sorted(binds, key=_bind_order):
        yield _bind(bind, spec.limits.maxconn_per_network)


def _peer() -> tuple[Words, ...]:
    # Who asks is a property of the connection; what that means is looked up for each request.
    # As text: an address would be spelled anew for each request.
    return (
        ("tcp-request", "connection", "set-var(sess.address)", "src,concat()"),
        ("tcp-request", "connection", "set-var(sess.network)", "so_name"),
    )


def _agents(spec: DataplaneSpec) -> Section:
    assert spec.unix is not None  # noqa: S101 - for the type checker; the caller has looked
    return Section(
        ("frontend", "agents"),
        (
            unix_bind(spec.unix),
            *_told(spec, headers=True),
            *_marks(spec, (marked("unix-listener"),)),
            *agent_rules(),
            *_marks(spec, (marked("share"),)),
            *share_rules(spec.limits.maxconn_per_network, spec.unix.maxconn),
            *_marks(spec, (passed(),)),
            *_look_up(spec),
            *fair_share(spec, by_connection=False),
            *answer_plain(spec, unless=has_said_share(spec)),
            *note_asked(),
            *(
                ()
                if spec.nova
                else pass_at_once(spec.paths.token_keys, unless=has_said_share(spec))
            ),
            *hear_tokens(spec.audit),
            *_answer(spec),
        ),
    )


def _found(spec: DataplaneSpec) -> Section:
    """Where the resolver hands in requests of guests that it has just found; only we can open it."""
    return Section(
        ("frontend", "found"),
        (
            ("bind", f"unix@{spec.paths.found}", "name", "found", "mode", "600", "proto", "h1"),
            *(_told(spec, headers=True) if spec.audit else ()),
            *audit_found(spec.audit),
            ("http-request", "set-var(txn.record)", f"req.fhdr({HEADER_RECORD})"),
            ("http-request", "set-var(sess.address)", f"req.fhdr({HEADER_ADDRESS})"),
            ("http-request", "set-var(sess.network)", f"req.fhdr({HEADER_NETWORK})"),
            *policy_rules(),
            *hear_forwarded(),
            hear_operator(),
            *fair_share(spec, by_connection=False, counted=False),
            ("http-request", "set-var(sess.found)", "bool(true)"),
            *note_asked(),
            *(
                ()
                if spec.nova
                else pass_at_once(spec.paths.token_keys, unless=has_said_share(spec))
            ),
            *hear_tokens(spec.audit),
            *_answer(spec, found=True),
        ),
    )


def _answer(spec: DataplaneSpec, *, found: bool = False) -> tuple[Words, ...]:
    """From `txn.record` to whoever answers."""
    return (
        *sample_reads(
            spec.count_reads, ASKED, chosen=() if spec.nova or found else KEPT_SHORT, found=found
        ),
        # In front of Nova most requests have nothing to do with the cache, and its filter would cost each of them
        # a tenth. Elsewhere all have, and a hit that first chose a backend takes a third more instructions.
        *(() if spec.nova or found else answer_short(spec, unless=ASKED)),
        *(() if spec.nova else _ask_the_cache(spec, unless=ASKED)),
        *(_choose_nova(spec, found=found) if spec.nova else ()),
        *((("use_backend", f"documents{COUNTED}", "if", *SAMPLED),) if spec.count_reads else ()),
        ("use_backend", f"documents{GUARDED}", "if", *ASKED, *KNOWN),
        ("use_backend", "documents", "if", *KNOWN),
        ("use_backend", "conflict", "if", *CONFLICT),
        # What comes from the resolver does not go back to it.
        ("default_backend", "conflict" if found else "resolver"),
    )


def _choose_nova(spec: DataplaneSpec, *, found: bool) -> tuple[Words, ...]:
    if found:
        # A set that a reload took away meanwhile.
        return (*use_nova(spec), ("use_backend", "conflict", "if", *NOVA))
    return (
        # Nova reads a body by its Content-Length, and HAProxy cannot add one.
        ("use_backend", "resolver", "if", "{", "req.fhdr(transfer-encoding)", "-m", "found", "}", *NOVA),
        *use_nova(spec),
        # An endpoint set that is not in this configuration yet, or not any more.
        ("use_backend", "resolver", "if", *NOVA),
    )  # fmt: skip


def _look_up(spec: DataplaneSpec) -> tuple[Words, ...]:
    return (
        ("http-request", "set-var(txn.record)", f"var(sess.key),map_str({spec.paths.overlay_map})"),
        ("http-request", "set-var(txn.record)", f"var(sess.key),map_str({spec.paths.base_map})",
         "if", "!{", "var(txn.record)", "-m", "found", "}"),
        *policy_rules(),
    )  # fmt: skip


def _records(spec: DataplaneSpec) -> Section:
    # Nobody can be listened to yet. HAProxy knows a map only by a rule that uses it, and records come before
    # listeners: without this, none could be taken in.
    return Section(("backend", "records"), _look_up(spec))


def _bind_order(bind: Bind) -> tuple[str, int, str, int, str, str]:
    return (
        bind.network,
        bind.address.version,
        _spelled(bind.address),
        bind.port,
        bind.device or "",
        bind.namespace or "",
    )


def _identity_headers() -> tuple[Words, ...]:
    return (
        ("http-request", "set-header", HEADER_NETWORK, "%[var(sess.network)]"),
        ("http-request", "set-header", HEADER_ADDRESS, "%[var(sess.address)]"),
    )


def _plain_request(kept: Iterable[str] = GUEST_HEADERS) -> tuple[Words, ...]:
    """What the document server and the resolver get: an allowed method, the path, our word on who asks."""
    return (
        allow_methods(),
        ("http-request", "set-uri", r"%[path,regsub(^/[^/]*/?,/)]", "if", *_ODD),
        refuse_lengths(),
        *bound_body(),
        tell_to_continue(),
        delete_guest_headers(kept),
        *_identity_headers(),
    )


def _cached(spec: DataplaneSpec, *rules: Words) -> tuple[Words, ...]:
    return rules if spec.limits.cache_mb else ()


def _ask_the_cache(spec: DataplaneSpec, unless: Words = ()) -> tuple[Words, ...]:
    """Look a document up, and hide how HAProxy keeps it.

    The cache's key is the Host and the URI, so the record makes the Host. Of a URI in absolute form it is the URI
    alone: a guest's `GET http://anything/…` would share entries between instances, so there the record goes into
    the URI as well; and a query, which no document looks at, goes.

    Args:
        spec: What is to be built.
        unless: A condition under which another backend does all of it.
    """
    plain = ("{", "url_beg", "/", "}", "!{", "url_sub", "?", "}")
    passing = negated(unless) if unless else ()
    return (
        *_cached(
            spec,
            ("http-request", "set-header", "host", "%[var(txn.record)]", *(("if", *passing) if passing else ())),
            ("http-request", "set-var(txn.target)", "pathq", "unless", *plain),
            ("http-request", "set-uri", "/%[var(txn.record)]%[path]", "if", *_ODD, *passing),
            ("http-request", "cache-use", "documents", "if", *passing, *KNOWN),
        ),
        *_hide_lifetime(),
    )  # fmt: skip


def _hide_lifetime() -> tuple[Words, ...]:
    # It is between the document server and the cache; a guest must not keep documents. `http-response` sees nothing of
    # what comes out of the cache, and what rules return has no lifetime.
    other = ("unless", *KEPT_SHORT)
    return (
        ("http-after-response", "del-header", "cache-control", *other),
        ("http-after-response", "del-header", "age", *other),
    )


def _documents(spec: DataplaneSpec, kind: str = "") -> Section:
    # One of the backends looks after the servers for all.
    checks = ("check", "inter", "1s", "fall", "2", "rise", "1")
    return Section(
        ("backend", f"documents{kind}"),
        (
            *looked_at(spec, kind),
            *(answer_counted(spec) if kind == COUNTED else ()),
            *(_ask_the_cache(spec) if spec.nova or kind else ()),
            *_plain_request(),
            ("http-request", "set-header", HEADER_INSTANCE, "%[var(txn.record),field(1,|)]"),
            ("http-request", "set-header", HEADER_REVISION, "%[var(txn.record),field(2,|)]"),
            ("http-request", "disable-l7-retry", "if", "!{", "method", "GET", "HEAD", "}"),
            *keep_short(spec),
            *_cached(spec, ("http-response", "cache-store", "documents")),
            # A worker that hangs is given up on before its check says so; the other one answers.
            ("timeout", "server", "2s"),
            ("retries", "3"),
            ("option", "redispatch", "1"),
            ("retry-on", "conn-failure", "empty-response", "response-timeout"),
            *(() if kind else (("option", "httpchk", "GET", "/livez"),)),
            ("http-reuse", "always"),
            *(
                ("server", f"documents-{index}", f"unix@{path}",
                 *(("track", f"documents/documents-{index}") if kind else checks))
                for index, path in enumerate(spec.paths.documents)
            ),
        ),
    )  # fmt: skip


def _resolver_s(spec: DataplaneSpec) -> int:
    """The resolver holds a request at first; then it may have to wait for Nova as long as HAProxy itself would."""
    held = spec.limits.hold_s + _BEYOND_HOLD_S
    return math.ceil(held + longest_s(spec.nova_times) if spec.nova else held)


def _resolver(spec: DataplaneSpec) -> Section:
    return Section(
        ("backend", "resolver"),
        (
            ("timeout", "server", f"{_resolver_s(spec)}s"),
            # A guest that invents addresses may not keep Python busy.
            ("stick-table", "type", "string", "len", "64", "size", "20k", "expire", "10s", "store", "gpc0_rate(1s)"),
            ("http-request", "track-sc0", "var(sess.network)"),
            # Before it is counted: whoever is refused would else wait the longer the more often it asks.
            (*retry_later(), "if", "{", "sc0_gpc0_rate", "ge", str(spec.limits.misses_per_second), "}"),
            ("http-request", "sc-inc-gpc0(0)"),
            *((originate(),) if spec.nova else ()),
            *tell_forwarded(),
            *_plain_request((*GUEST_HEADERS, *TOKEN_HEADERS)),
            *send_forwarded(),
            *(_tell_unverified() if spec.unverified else ()),
            *silence_told(spec.audit),
            # The target is there twice, and a head that outgrows HAProxy's buffer by that would be 500.
            ("http-request", "set-var(txn.head)", "req.hdrs,length"),
            ("http-request", "return", "status", "431",
             "if", "{", "url,length,mul(2),add(txn.head)", "-m", "int", "gt", str(_LARGEST_HEAD), "}"),
            ("http-request", "set-header", HEADER_TARGET, "%[pathq]"),
            ("http-request", "set-header", HEADER_TARGET, "%[var(txn.target)]",
             "if", *_ODD),
            ("http-request", "set-header", HEADER_SCOPE, "router", "if", "{", "var(sess.router)", "-m", "bool", "}"),
            ("option", "httpchk", "GET", "/livez"),
            # A connection that was used before and ends without an answer makes HAProxy close the guest's
            # without a word, and so does `shutdown-sessions`. On one of its own each request gets its 503, of a
            # resolver that hangs by the time-out.
            ("option", "http-server-close"),
            # Looked for ten times a second while it is away: until it counts as back, misses get 503.
            ("server", "resolver", f"unix@{spec.paths.resolver}", "check", "inter", "1s",
             "downinter", "100ms", "fall", "2", "rise", "1"),
        ),
    )  # fmt: skip


def _tell_unverified() -> tuple[Words, ...]:
    unverified = ("{", "var(sess.unverified)", "-m", "found", "}")
    refused = ("!{", f"res.fhdr({HEADER_REFUSED})", "-m", "found", "}")
    return (
        ("http-request", "set-header", HEADER_UNVERIFIED, "%[var(sess.unverified)]", "if", *unverified),
        # The gate lets what is so marked go to the instance only, whoever makes us believe what of ARP.
        ("http-response", "set-fc-tos", str(ANSWER_DSCP << 2), "if", *unverified, *refused),
        ("http-response", "del-header", HEADER_REFUSED),
    )  # fmt: skip


def _conflict() -> Section:
    return Section(
        ("backend", "conflict"),
        (retry_later(5),),
    )


def _probe(spec: DataplaneSpec) -> Section:
    return Section(
        ("frontend", "probe"),
        (
            ("bind", f"unix@{spec.paths.probe}", "name", "probe", "mode", "600", "proto", "h1"),
            (
                "http-request",
                "return",
                "status",
                "200",
                "content-type",
                "text/plain",
                "string",
                "ok",
            ),
        ),
    )


def _exporter(listen: str) -> Section:
    return Section(
        ("frontend", "exporter"),
        (
            ("bind", listen, "name", "exporter", "proto", "h1", "maxconn", "16"),
            # All listeners of 5,000 networks are 8 MB and 0.3 s of the only thread.
            ("http-request", "set-query", "scope=global&scope=frontend&scope=backend"),
            (
                "http-request",
                "use-service",
                "prometheus-exporter",
                "if",
                "{",
                "path",
                "/metrics",
                "}",
            ),
            ("http-request", "return", "status", "404"),
        ),
    )
