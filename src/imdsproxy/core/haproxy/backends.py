"""The backends behind a frontend: the document server, the resolver, or a rule."""

from __future__ import annotations

import math
from typing import Final

from imdsproxy.core.haproxy.access_rules import NOTE_FORWARDING, SEND_FORWARDING, first_rules
from imdsproxy.core.haproxy.model import DataplaneSpec
from imdsproxy.core.haproxy.names import SAMPLED
from imdsproxy.core.haproxy.nova import ALL_METHODS, ORIGIN_FORM, longest_s
from imdsproxy.core.haproxy.request_log import HIDE_LOGGED
from imdsproxy.core.haproxy.short_documents import KEEP_SHORT, answer_sampled
from imdsproxy.core.haproxy.text import Form, Text, Word

_BEYOND_HOLD_S: Final = 3
"""How much longer than a request may be held HAProxy waits for the resolver."""

_LARGEST_HEAD: Final = 15_000
"""Bytes of what of a request's head goes to the resolver. A buffer has 16,384, and some are HAProxy's own."""

_ASK_THE_CACHE: Final = """
    # The cache would answer 304 by the time at which it stored a document (ADR 39).
    [cache] http-request del-header if- -m beg
    [cache] http-request set-header host %[var(txn.record)] if <unchecked>
    [cache] http-request set-var(txn.original_target) pathq unless { url_beg / } !{ url_sub ? }
    [cache] http-request set-uri /%[var(txn.record)]%[path] if <rewritten> <unchecked>
    [cache] http-request cache-use documents if <unchecked> <known>
    # The lifetime is between the document server and the cache; a guest must not keep documents. `http-response` sees
    # nothing of what comes out of the cache, and what rules return has no lifetime.
    http-after-response del-header cache-control unless <has_short_document>
    http-after-response del-header age unless <has_short_document>
"""

_DOCUMENT_METHODS: Final = """
    # A method that nothing here knows: CONNECT came back 200 from HAProxy itself. `Allow` names what the resource takes
    # (RFC 9110 section 10.2.1): of our documents only a password's place takes more than reads.
    http-request return status 405 hdr Allow 'GET, HEAD, POST'
        if !{ method <methods> } { path -m reg '^/openstack/[^/]+/password/*$' }
    http-request return status 405 hdr Allow 'GET, HEAD' if !{ method <methods> }
"""

_PLAIN_REQUEST: Final = """
    http-request set-uri %[path,regsub(^/[^/]*/?,/)] if <rewritten>
    # HAProxy 3.0.11 takes a length of `18446744073709551616` for 0 and one more for 1, and sends it on as it is: the
    # server waits for the rest, and takes the next guest's request on that connection for it.
    http-request return status 400 if { req.fhdr(content-length) -m len 19: }
    # 408 for a body that is not there in time.
    http-request wait-for-body time 10s if { method POST PUT PATCH }
    # `Expect` (RFC 9110 section 10.1.1) does not go on, so HAProxy asks for the body.
    http-request wait-for-body time 10s if { req.fhdr(expect) -m found }
    http-request del-header <other_headers> -m reg
    http-request set-header <header_network> %[var(sess.network)]
    http-request set-header <header_address> %[var(sess.address)]
"""
"""What the document server and the resolver get: an allowed method, the path, the guest's network and address."""

_DOCUMENTS: Final = """
    http-request set-header <header_instance> %[<instance>]
    http-request set-header <header_revision> %[<revision>]
    http-request disable-l7-retry if !<reads>
    <keep_short>
    [cache] http-response cache-store documents
    # A worker that hangs is given up on before its check fails; the other one answers.
    timeout server 2s
    retries 3
    option redispatch 1
    retry-on conn-failure empty-response response-timeout
    # One of the backends checks the servers for all.
    [checks] option httpchk GET /livez
    http-reuse always
"""

_LIMIT_MISSES: Final = """
    timeout server <resolver_s>s
    # A guest that invents addresses may not keep Python busy.
    stick-table type string len 64 size 20k expire 10s store gpc0_rate(1s)
    http-request track-sc0 var(sess.network)
    # Before it is counted: a refused guest would otherwise wait the longer the more often it asks.
    http-request tarpit status 503 hdr Retry-After <retry_after_s> if { sc0_gpc0_rate ge <misses_per_second> }
    http-request sc-inc-gpc0(0)
"""

_RESOLVER: Final = """
    [gated] http-request set-header <header_unverified> %[var(sess.unverified)] if { var(sess.unverified) -m found }
    # The kernel's filter lets what is so marked go to the instance only, against ARP spoofing.
    [gated] http-response set-fc-tos <answer_tos>
        if { var(sess.unverified) -m found } !{ res.fhdr(<header_refused>) -m found }
    [gated] http-response del-header <header_refused>
    <hide_logged>
    # The target is there twice, and a head that outgrows HAProxy's buffer by that would be 500.
    http-request set-var(txn.header_bytes) req.hdrs,length
    http-request return status 431 if { url,length,mul(2),add(txn.header_bytes) -m int gt <largest_head> }
    http-request set-header <header_target> %[pathq]
    http-request set-header <header_target> %[var(txn.original_target)] if <rewritten>
    http-request set-header <header_scope> router if { var(sess.router) -m bool }
    option httpchk GET /livez
    # A connection that was used before and ends without an answer makes HAProxy close the guest's without an answer,
    # and so does `shutdown-sessions`. On one of its own each request gets its 503, of a resolver that hangs by the
    # time-out.
    option http-server-close
    # Checked ten times a second while it is away: until it counts as back, misses get 503.
    server resolver <resolver_socket> check inter 1s downinter 100ms fall 2 rise 1
"""


def ask_the_cache(form: Form, *, checked_elsewhere: bool = False) -> Text:
    """Look a document up, and hide how HAProxy keeps it.

    The cache's key is the Host and the URI, so the record makes the Host. Of a URI in absolute form it is the URI
    alone: a guest's `GET http://anything/…` would share entries between instances, so there the record goes into
    the URI as well; and a query, which no document looks at, goes.

    Args:
        form: The configuration's values.
        checked_elsewhere: Another backend does all of it for requests that need a check.
    """
    unchecked = form.fill("!<needs_check>") if checked_elsewhere else Text()
    return form.fill(_ASK_THE_CACHE, unchecked=unchecked)


def documents_backend(spec: DataplaneSpec, form: Form, kind: str = "") -> Text:
    """The document server's workers; `kind` as of `access_rules.first_rules`."""
    return form.section(
        "backend documents<kind>",
        first_rules(spec, form, kind),
        answer_sampled(form) if kind == SAMPLED else Text(),
        ask_the_cache(form) if spec.nova or kind else Text(),
        _DOCUMENT_METHODS,
        _PLAIN_REQUEST,
        _DOCUMENTS,
        *(
            form.fill(
                "[checks] server documents-<index> <socket> check inter 1s fall 2 rise 1\n"
                "[!checks] server documents-<index> <socket> track documents/documents-<index>",
                index=index,
                socket=Word(f"unix@{path}"),
                checks=not kind,
            )
            for index, path in enumerate(spec.paths.documents)
        ),
        kind=Text((kind,)),
        checks=not kind,
        keep_short=form.fill(KEEP_SHORT),
        other_headers=form.values["other_than_guest_headers"],
    )


def resolver_backend(spec: DataplaneSpec, form: Form) -> Text:
    """The controller, which looks addresses up; what a guest sends in our headers is deleted before."""
    # The resolver holds a request at first; then it may have to wait for Nova as long as HAProxy itself would.
    held_s = spec.limits.hold_s + _BEYOND_HOLD_S
    return form.section(
        "backend resolver",
        _LIMIT_MISSES,
        ORIGIN_FORM if spec.nova else Text(),
        NOTE_FORWARDING,
        ALL_METHODS if spec.nova else _DOCUMENT_METHODS,
        _PLAIN_REQUEST,
        SEND_FORWARDING,
        _RESOLVER,
        resolver_s=math.ceil(held_s + longest_s(spec.nova_times) if spec.nova else held_s),
        misses_per_second=spec.limits.misses_per_second,
        other_headers=form.values["other_than_guest_and_token_headers"],
        gated=bool(spec.unverified),
        hide_logged=form.fill(HIDE_LOGGED),
        largest_head=_LARGEST_HEAD,
    )
