"""The backends behind a frontend, the document server and the resolver, and the documents that HAProxy keeps."""

import math
from typing import Final

from imdsproxy.core.haproxy.model import DataplaneSpec
from imdsproxy.core.haproxy.nova import longest_s
from imdsproxy.core.haproxy.text import Block, Value

_BEYOND_HOLD_S: Final = 3
"""How much longer than a request may be held HAProxy waits for the resolver."""

BACKENDS: Final = r"""
ask_the_cache:
    # Look a document up, and hide how HAProxy keeps it; another backend does it for what the argument does not let
    # pass.
    #
    # The cache's key is the Host and the URI, so the record makes the Host. Of a URI in absolute form it is the URI
    # alone: a guest's `GET http://anything/…` would share entries between instances, so there the record goes into the
    # URI as well; and a query, which no document looks at, goes. The cache would answer 304 by the time at which it
    # stored a document (ADR 39).
    [cache] http-request del-header if- -m beg
    [cache] http-request set-header host %[var(txn.record)] if <argument>
    [cache] http-request set-var(txn.original_target) pathq unless { url_beg / } !{ url_sub ? }
    [cache] http-request set-uri /%[var(txn.record)]%[path] if <rewritten> <argument>
    [cache] http-request cache-use documents if <argument> <known>
    # The lifetime is between the document server and the cache; a guest must not keep documents. `http-response` sees
    # nothing of what comes out of the cache, and what rules return has no lifetime.
    http-after-response del-header cache-control unless <has_short_document>
    http-after-response del-header age unless <has_short_document>
answer_plain:
    # Short documents for requests of which nothing is to be checked: no token, no policy or none but tokens off.
    # After the look-up and the limits, before all else. Of reads without tokens those go on that are to be counted
    # (`has_short_document` is true of them later); where all are, all.
    [!counts_all] [keeps_short] http-request set-var(txn.short_document) <short_document>
        if !<has_policy> <without_token> <reads> or <only_tokens_off> <without_own_limits> <without_token> <reads>
    [!counts_all] <return_short(unless_by_chance)>
answer_short:
    # Short documents for requests that were looked at, and that need no check.
    # With a token that was good before; reads without one were looked up before.
    [keeps_short] http-request set-var(txn.short_document) <short_document> if <good_token> !<needs_check> <reads>
    <return_short(unless_sampled)>
return_short:
    [keeps_short] http-request return status 200 content-type <text_plain> lf-string %[var(txn.short_document)]
        if <has_short_document> <argument>
document_methods:
    # A method that nothing here knows: CONNECT came back 200 from HAProxy itself. `Allow` names what the resource takes
    # (RFC 9110 section 10.2.1): of our documents only a password's place takes more than reads.
    http-request return status 405 hdr Allow 'GET, HEAD, POST'
        if !{ method <methods> } { path -m reg '^/openstack/[^/]+/password/*$' }
    http-request return status 405 hdr Allow 'GET, HEAD' if !{ method <methods> }
plain_request:
    # What the document server and the resolver get: an allowed method, the path, the guest's network and address.
    http-request set-uri %[path,regsub(^/[^/]*/?,/)] if <rewritten>
    # HAProxy 3.0.11 takes a length of `18446744073709551616` for 0 and one more for 1, and sends it on as it is: the
    # server waits for the rest, and takes the next guest's request on that connection for it.
    http-request return status 400 if { req.fhdr(content-length) -m len 19: }
    # 408 for a body that is not there in time.
    http-request wait-for-body time 10s if { method POST PUT PATCH }
    # `Expect` (RFC 9110 section 10.1.1) does not go on, so HAProxy asks for the body.
    http-request wait-for-body time 10s if { req.fhdr(expect) -m found }
    http-request del-header <argument> -m reg
    http-request set-header <header_network> %[var(sess.network)]
    http-request set-header <header_address> %[var(sess.address)]
serve_documents:
    <document_methods>
    <plain_request(other_than_guest_headers)>
    http-request set-header <header_instance> %[<instance>]
    http-request set-header <header_revision> %[var(txn.record),field(2,|)]
    http-request disable-l7-retry if !<reads>
    # Short documents are answered by a rule instead of by HAProxy's cache: an answer out of the cache is made by an
    # applet of HAProxy's and costs 17,000 instructions more than `http-request return`, and more than all that is
    # asked of a request before (docs/performance.md). What programs read again and again is one short line below
    # `/latest/`: those are kept beside the cache, in a map by path and record, by HAProxy itself, when the document
    # server has answered with them.
    #
    # What counts for the cache counts here: only what the document server marks with a lifetime is kept, the record is
    # part of the key, and a worker begins with nothing. The path comes first in the key, and a record has two fields,
    # so that no path makes one guest's key of another's.
    #
    # A map has no bounds of its own. So each document gets one of `short_slots` numbers, at random, and the document
    # that had that number before goes. Both are in one map, `NUMBER` leading to a path and record, and these to a
    # document. For a backend of the document server, when what it gets for a path is in the request.
    #
    # The pattern is the path as programs spell it: each other spelling would be another entry.
    [keeps_short] http-request set-var(txn.short_key) path,concat(|,txn.record)
        if { method GET } { path -m reg '^/latest(?:/[A-Za-z0-9_-][A-Za-z0-9._:-]*)+\z' } <known>
    # Lifetimes are on what depends on nothing but the record, and on nothing else. HAProxy writes a value letter by
    # letter, at 30 instructions each.
    [keeps_short] http-response unset-var(txn.short_key)
        unless { status 200 } { res.fhdr(cache-control) -m found } { res.fhdr(content-type) -m str <text_plain> }
        { res.fhdr(content-length) -m int 1:256 }
    [keeps_short] http-response wait-for-body time 2s if { var(txn.short_key) -m found }
    [keeps_short] http-response set-var(txn.length) res.fhdr(content-length),add(0) if { var(txn.short_key) -m found }
    # One line of ASCII, in hexadecimal: of bytes a pattern sees what is before the first NUL. HAProxy 3.0 encodes
    # others when it writes a value.
    [keeps_short] http-response set-var(txn.short_slot) rand(<short_slots>)
        if { var(txn.short_key) -m found } { res.body,length,sub(txn.length) -m int 0 }
        { res.body,hex -m reg '^(?:[2-6][0-9A-F]|7[0-9A-E])+\z' }
    [keeps_short] http-response set-var(txn.short_evicted) var(txn.short_slot),map_str(<short_map>)
        if { var(txn.short_slot) -m found }
    [keeps_short] http-response del-map(<short_map>) %[var(txn.short_evicted)] if { var(txn.short_evicted) -m found }
    [keeps_short] http-response set-map(<short_map>) %[var(txn.short_slot)] %[var(txn.short_key)]
        if { var(txn.short_slot) -m found }
    [keeps_short] http-response set-map(<short_map>) %[var(txn.short_key)] %[res.body]
        if { var(txn.short_slot) -m found }
    [cache] http-response cache-store documents
    # A worker that hangs is given up on before its check fails; the other one answers.
    timeout server 2s
    retries 3
    option redispatch 1
    retry-on conn-failure empty-response response-timeout

backend documents
    [nova] <ask_the_cache(always)>
    <serve_documents>
    # One of the backends checks the servers for all.
    option httpchk GET /livez
    http-reuse always
    <document_servers>

backend documents.checked
    <check>
    <ask_the_cache(always)>
    <serve_documents>
    http-reuse always
    <tracked_document_servers>

[counts_reads] backend documents.sampled
    <count_sampled(instance)>
    # A read that was just counted may have a short document.
    [keeps_short] http-request set-var(txn.short_document) <short_document> if <reads>
    <return_short(always)>
    <ask_the_cache(always)>
    <serve_documents>
    http-reuse always
    <tracked_document_servers>

backend resolver
    # The controller, which looks addresses up; what a guest sends in our headers is deleted before.
    timeout server <resolver_s>s
    # A guest that invents addresses may not keep Python busy.
    stick-table type string len 64 size 20k expire 10s store gpc0_rate(1s)
    http-request track-sc0 var(sess.network)
    # Before it is counted: a refused guest would otherwise wait the longer the more often it asks.
    http-request tarpit <status_503> if { sc0_gpc0_rate ge <misses_per_second> }
    http-request sc-inc-gpc0(0)
    [nova] <origin_form>
    <note_forwarding>
    [nova] <all_methods>
    [!nova] <document_methods>
    <plain_request(other_than_guest_and_token_headers)>
    <send_forwarding>
    [gated] http-request set-header <header_unverified> %[var(sess.unverified)] if { var(sess.unverified) -m found }
    # The kernel's filter lets what is so marked go to the instance only, against ARP spoofing.
    [gated] http-response set-fc-tos <answer_tos>
        if { var(sess.unverified) -m found } !{ res.fhdr(<header_refused>) -m found }
    [gated] http-response del-header <header_refused>
    <hide_logged>
    # The target is there twice, and a head that outgrows HAProxy's buffer by that would be 500. A buffer has 16,384
    # bytes, and some are HAProxy's own.
    http-request set-var(txn.header_bytes) req.hdrs,length
    http-request return status 431 if { url,length,mul(2),add(txn.header_bytes) -m int gt 15000 }
    http-request set-header <header_target> %[pathq]
    http-request set-header <header_target> %[var(txn.original_target)] if <rewritten>
    http-request set-header <header_scope> router if { var(sess.router) -m bool }
    option httpchk GET /livez
    # A connection that was used before and ends without an answer makes HAProxy close the guest's without an answer,
    # and so does `shutdown-sessions`. On one of its own each request gets its 503, of a resolver that hangs by the
    # time-out.
    option http-server-close
    # Checked ten times a second while it is away: until it counts as back, misses get 503.
    server resolver unix@<resolver_socket> check inter 1s downinter 100ms fall 2 rise 1

backend conflict
    # For an address that two instances claim: never a guess.
    http-request return status 503 hdr Retry-After 5
"""


def names_of_backends(spec: DataplaneSpec) -> dict[str, Value]:
    """What `BACKENDS` names beside what every template may."""
    # The resolver holds a request at first; then it may have to wait for Nova as long as HAProxy itself would.
    held_s = spec.limits.hold_s + _BEYOND_HOLD_S
    workers: list[dict[str, Value]] = [
        {"index": index, "socket": f"unix@{path}"}
        for index, path in enumerate(spec.paths.documents)
    ]
    return {
        "resolver_s": math.ceil(held_s + longest_s(spec.nova_times) if spec.nova else held_s),
        "document_servers": Block(
            "server documents-<index> <socket> check inter 1s fall 2 rise 1", workers
        ),
        "tracked_document_servers": Block(
            "server documents-<index> <socket> track documents/documents-<index>", workers
        ),
    }
