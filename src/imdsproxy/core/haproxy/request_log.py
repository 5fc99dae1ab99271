"""One line a request, in HAProxy's rules: who asked what, and what became of it; and the lines read into values.

A frontend has one log-format, for the audit log and for `imdsproxy watch`. HAProxy writes the line, as JSON, into a
ring in its own memory. That of the audit log it sends on to the controller (`app.audit`). It never waits: it drops
lines that find no room in the ring, and reports how many. A worker that is being replaced sends on no ring. The few
requests that it still answers it logs by datagrams.

A line has no query, no header but `User-Agent`, no body, no token, and of a record the instance alone. All that a line
of the audit log has of the request is HAProxy's copy of the request line, made before any rule, so that no rule has to
keep it.

HAProxy escapes what would end a JSON string. Guests may send other bytes that JSON does not take, control characters
and what is not UTF-8, and a session token where none belongs, in a path or in `User-Agent`. To look for those costs
HAProxy as much as the rest of a line, and `read_audit` next to nothing.

Lines to watch are read out of a ring of their own (`app.watching`). Their rules are in the configuration only while a
client watches: a switch that they looked at would cost every request a twentieth of its time, and they themselves a
sixth (measured on documents out of the cache).
"""

import json
import re
import string
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Final

from imdsproxy.core.haproxy.model import CHECKED, SAMPLED, DataplaneSpec
from imdsproxy.core.haproxy.text import Text, Value
from imdsproxy.core.tokens import TTL_LIMIT_S

AUDIT_LONGEST: Final = 4096
"""Bytes of a line. HAProxy's copy of a request line has 1,024, of which escapes can make twice as many; of
`User-Agent` 200 are kept, which can become 1,200. So a line is never cut off."""

WATCH_RING: Final = "watched"
_CHECKS: Final = '"token":"%[var(txn.auth,no)]","refused":"%[var(txn.refused)]",'

_CACHE: Final = "<CACHE>"
_FRONTENDS: Final = ("guests", "agents")
_NOTHING: Final = "-"
_NO_REQUEST: Final = "<BADREQ>"
_PLAIN: Final = (string.digits + string.ascii_letters + string.punctuation + " \n").encode()
_CONTROL: Final = re.compile("[\0-\x1f\x7f]")
_TOKEN: Final = re.compile(rb"[0-9A-Fa-f]{0,8}\.[0-9]{10}\.[A-Za-z0-9_-]+")
_NO_TOKEN: Final = b"(token)"
_ROUGHLY_S: Final = 100_000
_LEFT_OUT: Final = re.compile(rb"(\d+) events? dropped")


def names_of_log(spec: DataplaneSpec) -> dict[str, Value]:
    """What the templates of this module name."""
    # While requests are watched they have other lines as well, so that silence is no way to drop some.
    sampled = spec.audit > 1 and spec.watched
    return {
        "watched": spec.watched,
        "audited": spec.audit > 0,
        "logs": spec.watched or spec.audit > 0,
        "log_path": Text("capture.req.uri,field(1,?)" if spec.audit else "var(txn.watched)"),
        "log_checks": Text(_CHECKS if spec.audit else ""),
        "log_agent": Text(',"agent":%{+json}[capture.req.hdr(0)]' if spec.audit else ""),
        # Of a record `INSTANCE|REVISION` the first, of `@SET|SIGNATURE|INSTANCE|PROJECT` the third.
        "log_of_nova": Text('regsub("^@[^|]*.[^|]*.",),' if spec.nova else ""),
        "sample": Text(f"sample 1:{spec.audit}" if sampled else ""),
        "logs_all": spec.audit == 1 or sampled,
        "samples": spec.audit > 1 and not spec.watched,
        "by_audit_chance": Text(f"{{ rand({spec.audit}) 0 }}"),
        "audit_longest": AUDIT_LONGEST,
    }


class AnsweredBy(StrEnum):
    """Who gave the answer."""

    CACHE = "cache"
    DOCUMENTS = "documents"
    NOVA = "nova"
    RESOLVER = "resolver"
    CONFLICT = "conflict"
    HAPROXY = "haproxy"
    """Itself: a refusal, or nothing was there to answer."""


@dataclass(frozen=True, slots=True)
class Watched:
    """One request that was answered.

    Attributes:
        number: HAProxy's own, which no two requests of one worker share.
        at: When it was answered, Unix time.
        network: Empty where HAProxy refused the request before it looked.
        instance: `None` where HAProxy's maps had none: then the resolver answered.
        method: Empty where the request was no HTTP.
        path: Without the query.
        milliseconds: From its first byte to the end of the answer.
    """

    number: int
    at: float
    network: str
    address: str
    instance: str | None
    method: str
    path: str
    status: int
    answered_by: AnsweredBy
    milliseconds: int


@dataclass(frozen=True, slots=True)
class WatchReport:
    """What guests were answered since the question before.

    Attributes:
        cursor: To be given at the next question.
        requests: Oldest first.
        missed: There were so many that some are not among them.
    """

    cursor: int
    requests: tuple[Watched, ...]
    missed: bool = False


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


def parse_events(text: str) -> list[Watched]:
    """The answer of `show events WATCH_RING`, oldest first, without the lines of others (a proxy has stopped)."""
    found = (_parse(line) for line in text.splitlines() if line.startswith("{"))
    return [one for one in found if one is not None]


def _parse(line: str) -> Watched | None:
    try:
        found: dict[str, Any] = json.loads(line, strict=False)
        backend, _, server = found["by"].partition("/")
        method = found["method"]
        return Watched(
            number=found["number"],
            at=found["time"],
            network=_named(found["network"]) or "",
            address=_named(found["address"]) or "",
            instance=_instance(found["instance"]),
            method="" if method == _NO_REQUEST else method,
            path=_named(found["path"]) or "",
            status=found["status"],
            answered_by=_answered_by(backend, server, found["status"]),
            milliseconds=max(0, found["ms"]),
        )
    except (ValueError, KeyError):
        return None


def _named(word: str) -> str | None:
    return None if word in (_NOTHING, "") else word


def _instance(word: str) -> str | None:
    # A conflict is `!`; no instance's id begins so.
    return None if word[:1] in ("!", _NOTHING) else _named(word)


def _answered_by(backend: str, server: str, status: int) -> AnsweredBy:
    # A frontend itself gives nothing else but the short documents that are kept beside the cache.
    if server == _CACHE or (backend in _FRONTENDS and status == HTTPStatus.OK):
        return AnsweredBy.CACHE
    if backend.startswith(AnsweredBy.NOVA):
        return AnsweredBy.NOVA
    name = backend.removesuffix(SAMPLED).removesuffix(CHECKED)
    return next((one for one in AnsweredBy if name == one.value), AnsweredBy.HAPROXY)
