"""Short documents, answered by a rule instead of by HAProxy's cache.

An answer out of the cache is made by an applet of HAProxy's and costs 17,000 instructions more than `http-request
return`, and more than all that is asked of a request before (docs/performance.md). What programs read again and again
is one short line below `/latest/`: those are kept beside the cache, in a map by path and record, by HAProxy itself,
when the document server has answered with them.

What counts for the cache counts here: only what the document server marks with a lifetime is kept, the record is part
of the key, and a worker begins with nothing. The path comes first in the key, and a record has two fields, so that no
path makes one guest's key of another's.

A map has no bounds of its own. So each document gets one of `short_slots` numbers, at random, and the document that had
that number before goes. Both are in one map, `NUMBER` leading to a path and record, and these to a document.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.haproxy.model import DataplaneSpec
from imdsproxy.core.haproxy.text import Form, Text

KEEP_SHORT: Final = r"""
    [keeps_short] http-request set-var(txn.short_key) path,concat(|,txn.record)
        if { method GET } { path -m reg '^/latest(?:/[A-Za-z0-9_-][A-Za-z0-9._:-]*)+\z' } <known>
    # Lifetimes are on what depends on nothing but the record, and on nothing else.
    [keeps_short] http-response unset-var(txn.short_key)
        unless { status 200 } { res.fhdr(cache-control) -m found } { res.fhdr(content-type) -m str <text_plain> }
        { res.fhdr(content-length) -m int 1:<longest_short> }
    [keeps_short] http-response wait-for-body time 2s if { var(txn.short_key) -m found }
    [keeps_short] http-response set-var(txn.length) res.fhdr(content-length),add(0) if { var(txn.short_key) -m found }
    # One line of ASCII, in hexadecimal: of bytes a pattern sees what is before the first NUL. HAProxy 3.0 encodes
    # others when it writes a value.
    [keeps_short] http-response set-var(txn.short_slot) rand(<short_slots>)
        if { var(txn.short_key) -m found } { res.body,length,sub(txn.length) -m int 0 }
        { res.body,hex -m reg '^(?:[2-6][0-9A-F]|7[0-9A-E])+\z' }
    [keeps_short] http-response set-var(txn.short_evicted) var(txn.short_slot),map_str(<short>)
        if { var(txn.short_slot) -m found }
    [keeps_short] http-response del-map(<short>) %[var(txn.short_evicted)] if { var(txn.short_evicted) -m found }
    [keeps_short] http-response set-map(<short>) %[var(txn.short_slot)] %[var(txn.short_key)]
        if { var(txn.short_slot) -m found }
    [keeps_short] http-response set-map(<short>) %[var(txn.short_key)] %[res.body] if { var(txn.short_slot) -m found }
"""
"""For a backend of the document server, when what it gets for a path is in the request.

The pattern is the path as programs spell it: each other spelling would be another entry.
"""

_LOOK_UP: Final = """
    [keeps_short] http-request set-var(txn.short_document) path,concat(|,txn.record),map_str(<short>) if <condition>
    [keeps_short] http-request return status 200 content-type <text_plain> lf-string %[var(txn.short_document)]
        if <has_short_document> <passing>
"""


def answer_plain(spec: DataplaneSpec, form: Form) -> Text:
    """For requests of which nothing is to be checked: no token, no policy or none but that tokens are off.

    After the look-up and the limits, before all else. Of reads without tokens those go on that are to be counted
    (`has_short_document` is true of them later); where all are, all.
    """
    if spec.count_reads == 1:
        return Text()
    return form.fill(
        _LOOK_UP,
        condition=form.fill(
            """
            !<has_policy> !{ req.fhdr(<token_header>) -m found } <reads>
                or <only_tokens_off> <without_own_limits> !{ req.fhdr(<token_header>) -m found } <reads>
            """
        ),
        passing=form.fill("!<by_chance>") if spec.count_reads else Text(),
    )


def answer_short(spec: DataplaneSpec, form: Form) -> Text:
    """For requests that were looked at, and that need no check.

    With a token that was good before; reads without one were looked up before.
    """
    unchecked = form.fill("!<needs_check>")
    return form.fill(
        _LOOK_UP,
        condition=form.fill("<good_token> !<needs_check> <reads>"),
        passing=unchecked if spec.count_reads else Text(),
    )


def answer_sampled(form: Form) -> Text:
    """For the backend of reads that were just counted."""
    return form.fill(_LOOK_UP, condition=form.values["reads"], passing=Text())
