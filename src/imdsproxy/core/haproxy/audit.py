"""One line a request, in HAProxy's rules: who asked what, and what became of it.

HAProxy writes the line, as JSON, into a ring in its own memory and sends the ring on to the controller
(`app.audit`). It never waits: it drops lines that find no room in the ring, and reports how many. A worker that is
being replaced sends on no ring. The few requests that it still answers it logs by datagrams.

A line has no query, no header but `User-Agent`, no body, no token, and of a record the instance alone. All that it
has of the request is HAProxy's copy of the request line, made before any rule, so that no rule has to keep it.

HAProxy escapes what would end a JSON string. Guests may send other bytes that JSON does not take, control characters
and what is not UTF-8, and a session token where none belongs, in a path or in `User-Agent`. To look for those costs
HAProxy as much as the rest of a line, and `read_audit` next to nothing.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.haproxy.model import DataplaneSpec
from imdsproxy.core.haproxy.text import Form, Text, Word
from imdsproxy.core.tokens import TTL_LIMIT_S

AUDIT_LONGEST: Final = 4096
"""Bytes of a line. HAProxy's copy of a request line has 1,024, of which escapes can make twice as many; of
`User-Agent` 200 are kept, which can become 1,200. So a line is never cut off."""

_RING: Final = """
    format raw
    maxlen <audit_longest>
    # Some 15,000 lines: what may come while the controller writes to a slow disk, or is started anew.
    size 4194304
    timeout connect 1s
    # The controller reads when it likes; lines on their way are lost if it hangs up.
    timeout server 1h
    server controller <audit_socket>
"""

_RULES: Final = """
    log ring@audit len <audit_longest> format raw <sample> local0
    log-format <audit_format>
    # A connection without a byte is no request.
    option dontlognull
    capture request header User-Agent len 200
    # In a sample, these few requests may be missing: another level would undo the silence.
    [logs_all] log <audit_last> len <audit_longest> format raw <sample> local0 notice
    [logs_all] http-after-response set-log-level notice if { stopping } !{ var(txn.logged) -m found }
    [!logs_all] http-request set-log-level silent unless <by_audit_chance>
"""

NOTE_GOOD_TOKEN: Final = """
    [audited] http-request set-var(txn.auth) str(yes) if { var(txn.seconds_left) -m int gt 0 }
"""
"""After `access_rules.NOTE_CHECKS`: a token that was good before goes to no checked backend."""

HIDE_LOGGED: Final = """
    [audited] http-response set-log-level silent if { res.fhdr(<header_logged>) -m found }
    [audited] http-response set-var(txn.logged) bool(true) if { res.fhdr(<header_logged>) -m found }
    [audited] http-response del-header <header_logged>
"""
"""For the resolver's backend: no second line where a request has come back, and been answered."""

_PLAIN: Final = (string.digits + string.ascii_letters + string.punctuation + " \n").encode()
_CONTROL: Final = re.compile("[\0-\x1f\x7f]")
_TOKEN: Final = re.compile(rb"[0-9A-Fa-f]{0,8}\.[0-9]{10}\.[A-Za-z0-9_-]+")
_NO_TOKEN: Final = b"(token)"
_ROUGHLY_S: Final = 100_000
_LEFT_OUT: Final = re.compile(rb"(\d+) events? dropped")


def audit_ring(form: Form) -> Text:
    """Where lines are kept until the controller takes them."""
    return form.section("ring audit", _RING)


def audit_rules(spec: DataplaneSpec, form: Form, *, headers: bool = False) -> Text:
    """For a frontend of guests, before its other rules; nothing where there is no audit log.

    Args:
        spec: What is to be built.
        form: Its values.
        headers: Network and address come in headers, and may be anything.
    """
    if not spec.audit:
        return Text()
    # While requests are watched they have other lines as well, so that silence is no way to drop some.
    sampled = spec.audit > 1 and spec.watched
    return form.fill(
        _RULES,
        audit_format=Word(_format(nova=bool(spec.nova), headers=headers)),
        sample=Text((f"sample 1:{spec.audit}",) if sampled else ()),
        logs_all=spec.audit == 1 or spec.watched,
        by_audit_chance=Text((f"{{ rand({spec.audit}) 0 }}",)),
    )


def _format(*, nova: bool, headers: bool) -> str:
    # Escaped by the log format itself, a third as dear as the converter `json`.
    network, address = (
        f"%{{+json}}[var(sess.{one}),bytes(0,64)]" if headers else f'"%[var(sess.{one})]"'
        for one in ("network", "address")
    )
    # Of a record `INSTANCE|REVISION` the first, of `@SET|SIGNATURE|INSTANCE|PROJECT` the third.
    of_nova = 'regsub("^@[^|]*.[^|]*.",),' if nova else ""
    return (
        '{"time":%Ts.%ms,"number":%rt,'
        f'"network":{network},"address":{address},'
        f'"instance":"%[var(txn.record),{of_nova}field(1,|)]",'
        '"method":"%HM","path":%{+json}[capture.req.uri,field(1,?)],"status":%ST,'
        '"token":"%[var(txn.auth,no)]","refused":"%[var(txn.refused)]","by":"%b/%s","ms":%Ta,'
        '"agent":%{+json}[capture.req.hdr(0)]}'
    )


@dataclass(frozen=True, slots=True)
class AuditLines:
    """Whole lines, each of them JSON.

    Attributes:
        requests: How many of them are of a request.
        left_out: How many requests HAProxy had no room for.
    """

    text: bytes
    requests: int
    left_out: int = 0


def read_audit(read: bytes, now: float) -> AuditLines:
    """The lines of requests, valid and without tokens; of HAProxy's own messages, how many are missing.

    Args:
        read: Whole lines.
        now: Unix time, for the lines that stand for what is missing.
    """
    if any(begin in read for begin in _begins_of_expiries(now)):
        read = _TOKEN.sub(_NO_TOKEN, read)
    count = read.count(b"}\n")
    # The many: a loop over lines would cost the controller ten times as much.
    if (
        read.startswith(b"{")
        and read.endswith(b"}\n")
        and read.count(b"}\n{") == count - 1
        and not read.translate(None, _PLAIN)
    ):
        return AuditLines(read, count)
    lines: list[bytes] = []
    requests = left_out = 0
    for line in read.split(b"\n"):
        if line.startswith(b"{"):
            requests += 1
            lines.append(_valid(line))
        # Else a message of HAProxy's own: `Proxy guests stopped`.
        elif (dropped := _LEFT_OUT.search(line)) is not None:
            left_out += int(dropped[1])
            lines.append(left_out_line(int(dropped[1]), now))
    return AuditLines(b"".join(line + b"\n" for line in lines), requests, left_out)


def left_out_line(count: int, now: float) -> bytes:
    """What stands for `count` lines that are not there, without its line end."""
    return b'{"time":%.3f,"left_out":%d}' % (now, count)


def _begins_of_expiries(now: float) -> set[bytes]:
    """What every token that is still good has in its middle: to find that is ten times as fast as to match."""
    return {b".%d" % (int(second) // _ROUGHLY_S) for second in (now, now + TTL_LIMIT_S)}


def _valid(line: bytes) -> bytes:
    text = line.decode("utf-8", "replace")
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()
