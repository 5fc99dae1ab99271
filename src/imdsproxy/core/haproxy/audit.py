"""One line a request, in HAProxy's rules: who asked what, and what became of it.

HAProxy writes the line, as JSON, into a ring in its own memory and sends the ring on to the controller
(`app.audit`). It never waits: what finds no room in the ring is left out, and HAProxy says how many those were. A
worker that is being replaced sends on no ring. What it still answers it tells by datagrams, which are few then.

A line has no query, no header but `User-Agent`, no body, no token, and of a record the instance alone. All that it
says of the request is HAProxy's copy of the request line, made before any rule, so that no rule has to keep it.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.haproxy.section import Section, Words
from imdsproxy.core.wire import HEADER_TOLD

__all__ = [
    "AUDIT_LONGEST",
    "TOKEN_HEARD",
    "audit_found",
    "audit_ring",
    "audit_rules",
    "hear_tokens",
    "marked",
    "passed",
    "silence_told",
    "without_marks",
]

_RING: Final = "audit"
_RING_BYTES: Final = 4 * 1024 * 1024
"""Some 15,000 lines: what may come while the controller writes to a slow disk, or is started anew."""

AUDIT_LONGEST: Final = 4096
"""Bytes of a line. HAProxy's copy of a request line has 1,024, of which escapes can make twice as many; of
`User-Agent` 200 are kept, which can become 1,200. So a line is never cut off."""

_AGENT_BYTES: Final = 200
TOKEN_HEARD: Final = "txn.heard"  # noqa: S105 - a variable's name
"""`yes` after a good token, `bad` after another one."""

_REFUSED: Final = "txn.refused"
_MARKS: Final = (
    f"set-var({TOKEN_HEARD})",
    f"unset-var({TOKEN_HEARD})",
    f"set-var({_REFUSED})",
    f"unset-var({_REFUSED})",
)
_TOLD_ONCE: Final = "txn.told"
_TOLD: Final = ("{", f"res.fhdr({HEADER_TOLD})", "-m", "found", "}")


def audit_ring(socket: str) -> Section:
    """Where lines are kept until the controller takes them.

    Args:
        socket: The controller's, as the worker sees it.
    """
    return Section(
        ("ring", _RING),
        (
            ("format", "raw"),
            ("maxlen", str(AUDIT_LONGEST)),
            ("size", str(_RING_BYTES)),
            ("timeout", "connect", "1s"),
            # The controller reads when it likes; whoever hangs up on it loses what is on its way.
            ("timeout", "server", "1h"),
            ("server", "controller", f"unix@{socket}"),
        ),
    )


def audit_rules(
    one_in: int, last: str, *, nova: bool = False, headers: bool = False, watched: bool = False
) -> tuple[Words, ...]:
    """For a frontend of guests, before its other rules; `one_in` of 0 is none.

    Args:
        one_in: Of so many requests one has a line.
        last: The socket for datagrams of a worker that is being replaced, as it sees it.
        nova: Records may be of Nova's kind, with the instance elsewhere.
        headers: Network and address come in headers, and may be anything.
        watched: Requests have other lines as well, so that silence is no way to leave some out.
    """
    if not one_in:
        return ()
    every = one_in == 1 or watched
    sample = () if one_in == 1 or not watched else ("sample", f"1:{one_in}")
    leaving = (
        ("log", last, "len", str(AUDIT_LONGEST), "format", "raw", *sample, "local0", "notice"),
        ("http-after-response", "set-log-level", "notice",
         "if", "{", "stopping", "}", "!{", f"var({_TOLD_ONCE})", "-m", "found", "}"),
    )  # fmt: skip
    return (
        ("log", f"ring@{_RING}", "len", str(AUDIT_LONGEST), "format", "raw", *sample, "local0"),
        ("log-format", _format(nova=nova, headers=headers)),
        # A connection without a byte is no request.
        ("option", "dontlognull"),
        ("capture", "request", "header", "User-Agent", "len", str(_AGENT_BYTES)),
        # In a sample, what few requests these are may be missing: another level would unsay the silence.
        *(leaving if every else ()),
        *(() if every else (_silent("unless", "{", f"rand({one_in})", "0", "}"),)),
    )


def audit_found(one_in: int) -> tuple[Words, ...]:
    """For the frontend of requests that come back from the resolver: the line is here, where it is known who asks."""
    if not one_in:
        return ()
    return (("http-after-response", "set-header", HEADER_TOLD, "yes"),)


def hear_tokens(one_in: int) -> tuple[Words, ...]:
    """After `guard.note_asked`: a token that was good before has none look at it again."""
    if not one_in:
        return ()
    return (("http-request", f"set-var({TOKEN_HEARD})", "str(yes)",
             "if", "{", "var(txn.left)", "-m", "int", "gt", "0", "}"),)  # fmt: skip


def silence_told(one_in: int) -> tuple[Words, ...]:
    """For the resolver's backend: no second line where a request has come back, and been answered."""
    if not one_in:
        return ()
    return (
        ("http-response", "set-log-level", "silent", "if", *_TOLD),
        ("http-response", f"set-var({_TOLD_ONCE})", "bool(true)", "if", *_TOLD),
        ("http-response", "del-header", HEADER_TOLD),
    )


def marked(rule: str, condition: Words = ()) -> Words:
    """From here on a refusal is this rule's, for requests that meet the condition.

    What a rule refuses goes through no other rule, so that this stays what the line says.
    """
    return ("http-request", f"set-var({_REFUSED})", f"str({rule})", *_when(condition))


def passed(condition: Words = ()) -> Words:
    """From here on a refusal is none of the rules'."""
    return ("http-request", f"unset-var({_REFUSED})", *_when(condition))


def without_marks(rules: tuple[Words, ...]) -> tuple[Words, ...]:
    """The rules for a configuration that writes no lines."""
    return tuple(rule for rule in rules if rule[1] not in _MARKS)


def _when(condition: Words) -> Words:
    return ("if", *condition) if condition else ()


def _silent(*condition: str) -> Words:
    return ("http-request", "set-log-level", "silent", *condition)


def _format(*, nova: bool, headers: bool) -> str:
    # Escaped by the log format itself, a third as dear as the converter `json`. What else JSON does not take, and a
    # guest may send, is seen to where lines are read (`core.haproxy.audit_lines`).
    network, address = (
        f"%{{+json}}[var(sess.{one}),bytes(0,64)]" if headers else f'"%[var(sess.{one})]"'
        for one in ("network", "address")
    )
    record = "txn.record"
    # Of a record `INSTANCE|REVISION` the first, of `@SET|SIGNATURE|INSTANCE|PROJECT` the third.
    instance = (
        f'%[var({record}),regsub("^@[^|]*.[^|]*.",),field(1,|)]'
        if nova
        else f"%[var({record}),field(1,|)]"
    )
    return (
        '{"time":%Ts.%ms,"number":%rt,'
        f'"network":{network},"address":{address},'
        f'"instance":"{instance}",'
        '"method":"%HM","path":%{+json}[capture.req.uri,field(1,?)],"status":%ST,'
        f'"token":"%[var({TOKEN_HEARD},no)]","refused":"%[var({_REFUSED})]","by":"%b/%s","ms":%Ta,'
        '"agent":%{+json}[capture.req.hdr(0)]}'
    )
