"""Who answers a request behind a frontend: the document server, the resolver, or a rule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from imdsproxy.core.haproxy.audit import silence_told
from imdsproxy.core.haproxy.counting import COUNTED
from imdsproxy.core.haproxy.guard import (
    looked_at,
    send_forwarded,
    tell_forwarded,
)
from imdsproxy.core.haproxy.limits import bound_body
from imdsproxy.core.haproxy.model import DataplaneSpec, Section, Words
from imdsproxy.core.haproxy.nova import longest_s
from imdsproxy.core.haproxy.rules import (
    GUEST_HEADERS,
    KNOWN,
    READS,
    TOKEN_HEADERS,
    allow_methods,
    delete_guest_headers,
    negated,
    originate,
    refuse_lengths,
    retry_later,
    retry_later_slowly,
    tell_to_continue,
)
from imdsproxy.core.haproxy.short import (
    KEPT_SHORT,
    answer_counted,
    keep_short,
)
from imdsproxy.core.wire import (
    ANSWER_DSCP,
    HEADER_ADDRESS,
    HEADER_INSTANCE,
    HEADER_NETWORK,
    HEADER_REFUSED,
    HEADER_REVISION,
    HEADER_SCOPE,
    HEADER_TARGET,
    HEADER_UNVERIFIED,
)

__all__ = ["ask_the_cache", "conflict_backend", "documents_backend", "resolver_backend"]


_BEYOND_HOLD_S: Final = 3
"""How much longer than a request may be held HAProxy waits for the resolver."""

_LARGEST_HEAD: Final = 15_000
"""Bytes of what of a request's head goes to the resolver. A buffer has 16,384, and some are HAProxy's own."""

_ODD: Final = ("{", "var(txn.target)", "-m", "found", "}")


def _identity_headers() -> tuple[Words, ...]:
    return (
        ("http-request", "set-header", HEADER_NETWORK, "%[var(sess.network)]"),
        ("http-request", "set-header", HEADER_ADDRESS, "%[var(sess.address)]"),
    )


def _plain_request(kept: Iterable[str] = GUEST_HEADERS, *, nova: bool = False) -> tuple[Words, ...]:
    """What the document server and the resolver get: an allowed method, the path, our word on who asks."""
    return (
        *allow_methods(nova=nova),
        ("http-request", "set-uri", r"%[path,regsub(^/[^/]*/?,/)]", "if", *_ODD),
        refuse_lengths(),
        *bound_body(),
        tell_to_continue(),
        delete_guest_headers(kept),
        *_identity_headers(),
    )


def _cached(spec: DataplaneSpec, *rules: Words) -> tuple[Words, ...]:
    return rules if spec.limits.cache_mb else ()


def ask_the_cache(spec: DataplaneSpec, unless: Words = ()) -> tuple[Words, ...]:
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
            # The cache would answer 304 by the time at which it stored a document (ADR 39).
            ("http-request", "del-header", "if-", "-m", "beg"),
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


def documents_backend(spec: DataplaneSpec, kind: str = "") -> Section:
    """The document server's workers.

    Args:
        spec: What is to be built.
        kind: How the name ends of one that looks at requests first (`guard.GUARDED`, `counting.COUNTED`).
    """
    # One of the backends looks after the servers for all.
    checks = ("check", "inter", "1s", "fall", "2", "rise", "1")
    return Section(
        ("backend", f"documents{kind}"),
        (
            *looked_at(spec, kind),
            *(answer_counted(spec) if kind == COUNTED else ()),
            *(ask_the_cache(spec) if spec.nova or kind else ()),
            *_plain_request(),
            ("http-request", "set-header", HEADER_INSTANCE, "%[var(txn.record),field(1,|)]"),
            ("http-request", "set-header", HEADER_REVISION, "%[var(txn.record),field(2,|)]"),
            ("http-request", "disable-l7-retry", "if", *negated(READS)),
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


def resolver_backend(spec: DataplaneSpec) -> Section:
    """Who finds out who asks; it is told by headers, and what a guest says in such headers is deleted before."""
    return Section(
        ("backend", "resolver"),
        (
            ("timeout", "server", f"{_resolver_s(spec)}s"),
            # A guest that invents addresses may not keep Python busy.
            ("stick-table", "type", "string", "len", "64", "size", "20k", "expire", "10s", "store", "gpc0_rate(1s)"),
            ("http-request", "track-sc0", "var(sess.network)"),
            # Before it is counted: whoever is refused would else wait the longer the more often it asks.
            (*retry_later_slowly(), "if", "{", "sc0_gpc0_rate", "ge", str(spec.limits.misses_per_second), "}"),
            ("http-request", "sc-inc-gpc0(0)"),
            *((originate(),) if spec.nova else ()),
            *tell_forwarded(),
            *_plain_request((*GUEST_HEADERS, *TOKEN_HEADERS), nova=bool(spec.nova)),
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


def conflict_backend() -> Section:
    """For an address that two instances claim: never a guess."""
    return Section(
        ("backend", "conflict"),
        (retry_later(5),),
    )
