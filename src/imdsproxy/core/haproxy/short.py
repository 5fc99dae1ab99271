"""Short documents, answered by a rule instead of by HAProxy's cache.

An answer out of the cache is made by an applet of HAProxy's and costs 17,000 instructions more than `http-request
return`, and more than all that is asked of a request before (docs/performance.md). What programs read again and again
is one short line below `/latest/`: those are kept beside the cache, in a map by path and record, by HAProxy itself,
when the document server has told them.

What counts for the cache counts here: only what the document server marks with a lifetime is kept, the record is part
of the key, and a worker begins with nothing. The path comes first in the key, and a record has two fields, so that no
path makes one guest's key of another's.

A map has no bounds of its own. So each document gets one of `_slots` numbers, at random, and whichever had that number
before goes. Both are in one map, `NUMBER` leading to a path and record, and these to a document.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.documents.tree import TEXT
from imdsproxy.core.haproxy.counting import thrown
from imdsproxy.core.haproxy.guard import TOKENS_OFF
from imdsproxy.core.haproxy.model import DataplaneSpec, Words
from imdsproxy.core.haproxy.rules import HAS_POLICY, KNOWN, READS, TOKEN_HEADERS, negated

__all__ = ["KEPT_SHORT", "answer_counted", "answer_plain", "answer_short", "keep_short"]

_SLOTS_PER_MB: Final = 256
"""For each MiB of the cache: with its key an entry is below 1 kB."""

_LONGEST: Final = 256
"""Bytes of a document. HAProxy writes a value letter by letter, at 30 instructions each."""

_PLAIN_PATH: Final = r"^/latest(?:/[A-Za-z0-9_-][A-Za-z0-9._:-]*)+\z"
"""As programs spell it: each other spelling would be another entry."""

_PRINTABLE: Final = r"^(?:[2-6][0-9A-F]|7[0-9A-E])+\z"
"""One line of ASCII, in hexadecimal: of bytes a pattern sees what is before the first NUL. Others HAProxy 3.0 encodes
when it writes a value."""

KEPT_SHORT: Final = ("{", "var(txn.short)", "-m", "found", "}")
"""There is a short document for the request, which `answer_plain` has not answered with: it is to be counted."""


def answer_plain(spec: DataplaneSpec, unless: Words) -> tuple[Words, ...]:
    """For requests of which nothing is to be looked at: no token, no policy or none but that tokens are off.

    After the look-up and the limits, before all else. Of reads without tokens those go on that are to be counted
    (`KEPT_SHORT`); where all are, all.

    Args:
        spec: What is to be built.
        unless: A condition under which a policy has something else to look at.
    """
    if spec.count_reads == 1 or not _kept(spec):
        return ()
    no_token = ("!{", f"req.fhdr({TOKEN_HEADERS[0]})", "-m", "found", "}")
    may = (*no_token, *READS)
    off = (*TOKENS_OFF, *(negated(unless) if unless else ()))
    passing = negated(thrown(spec.count_reads)) if spec.count_reads else ()
    return _answer(spec, *negated(HAS_POLICY), *may, "or", *off, *may, passing=passing)


def answer_short(spec: DataplaneSpec, unless: Words) -> tuple[Words, ...]:
    """For requests that were looked at, and that may be answered.

    Args:
        spec: What is to be built.
        unless: A condition under which a request has to be looked at elsewhere.
    """
    if not _kept(spec):
        return ()
    may = negated(unless)
    # With a token that was good before; whoever has none was looked up before.
    good = ("{", "var(txn.left)", "-m", "found", "}")
    return _answer(spec, *good, *may, *READS, passing=may if spec.count_reads else ())


def answer_counted(spec: DataplaneSpec) -> tuple[Words, ...]:
    """For the backend of reads that were just counted."""
    return _answer(spec, *READS) if _kept(spec) else ()


def keep_short(spec: DataplaneSpec) -> tuple[Words, ...]:
    """For a backend of the document server, when what it gets for a path is in the request."""
    if not _kept(spec):
        return ()
    place = ("{", "var(txn.place)", "-m", "found", "}")
    short = spec.paths.short
    kept = ("{", "var(txn.kept)", "-m", "found", "}")
    return (
        ("http-request", "set-var(txn.place)", "path,concat(|,txn.record)",
         "if", "{", "method", "GET", "}", "{", "path", "-m", "reg", _PLAIN_PATH, "}", *KNOWN),
        # Lifetimes are on what depends on nothing but the record, and on nothing else.
        ("http-response", "unset-var(txn.place)",
         "unless", "{", "status", "200", "}", "{", "res.fhdr(cache-control)", "-m", "found", "}",
         "{", "res.fhdr(content-type)", "-m", "str", TEXT.decode("ascii"), "}",
         "{", "res.fhdr(content-length)", "-m", "int", f"1:{_LONGEST}", "}"),
        ("http-response", "wait-for-body", "time", "2s", "if", *place),
        ("http-response", "set-var(txn.length)", "res.fhdr(content-length),add(0)", "if", *place),
        ("http-response", "set-var(txn.kept)", f"rand({_slots(spec)})",
         "if", *place, "{", "res.body,length,sub(txn.length)", "-m", "int", "0", "}",
         "{", "res.body,hex", "-m", "reg", _PRINTABLE, "}"),
        ("http-response", "set-var(txn.gone)", f"var(txn.kept),map_str({short})", "if", *kept),
        ("http-response", f"del-map({short})", "%[var(txn.gone)]",
         "if", "{", "var(txn.gone)", "-m", "found", "}"),
        ("http-response", f"set-map({short})", "%[var(txn.kept)]", "%[var(txn.place)]", "if", *kept),
        ("http-response", f"set-map({short})", "%[var(txn.place)]", "%[res.body]", "if", *kept),
    )  # fmt: skip


def _kept(spec: DataplaneSpec) -> bool:
    # In front of Nova most requests have nothing to do with documents of ours.
    return bool(spec.limits.cache_mb) and not spec.nova


def _slots(spec: DataplaneSpec) -> int:
    return spec.limits.cache_mb * _SLOTS_PER_MB


def _answer(spec: DataplaneSpec, *condition: str, passing: Words = ()) -> tuple[Words, ...]:
    return (
        ("http-request", "set-var(txn.short)", f"path,concat(|,txn.record),map_str({spec.paths.short})",
         "if", *condition),
        ("http-request", "return", "status", "200", "content-type", TEXT.decode("ascii"),
         "lf-string", "%[var(txn.short)]", "if", *KEPT_SHORT, *passing),
    )  # fmt: skip
