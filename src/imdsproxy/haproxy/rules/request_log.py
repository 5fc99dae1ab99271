"""Request log: rules that make HAProxy log one line per request, and parsers of the lines.

A frontend has one log-format, for the audit log and for `imdsproxy watch`. HAProxy writes each line as JSON into a ring
in its own memory, and sends the audit log's lines on to the controller (`controller.audit`). HAProxy never waits: it
drops lines that do not fit into the ring, and reports their number. A worker that is being replaced sends on no ring.
It logs its few remaining requests by datagrams.

A line has no query, no header but `User-Agent`, no body and no token. Of the record it has only the instance. The audit
log takes all request data from HAProxy's copy of the request line, which HAProxy makes before any rule, so that no rule
has to store it.

HAProxy escapes characters that would end a JSON string. Guests may send bytes that JSON forbids (control characters,
bytes that are not UTF-8), and a session token in a path or in `User-Agent`. A search for them would cost HAProxy as
much as the rest of the line. `read_audit` does it almost for free.

`imdsproxy watch` reads its lines from a second ring (`controller.watching`). The configuration has the rules for that
ring only while a client watches. A switch in the rules would add a twentieth to every request's time, and the rules
themselves a sixth (measured on cached documents).
"""

import json
import re
import string
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Final

from imdsproxy.haproxy.rules.model import CHECKED, SAMPLED, DataplaneSpec
from imdsproxy.haproxy.rules.text import Text, Value
from imdsproxy.model.tokens import TTL_LIMIT_S

AUDIT_LONGEST: Final = 4096
"""Maximum bytes of a line, so that no line is cut. HAProxy's copy of a request line has 1,024, which escapes at most
double; `User-Agent` keeps 200, which can become 1,200.
"""

WATCH_RING: Final = "watched"
_CHECKS: Final = '"token":"%[var(txn.auth,no)]","refused":"%[var(txn.refused)]",'

_IDENTITY: Final = '"audience":%{+json}[var(txn.audience)],"jti":"%[var(txn.token_id)]",'

_CACHE: Final = "<CACHE>"
_FRONTENDS: Final = ("guests", "agents")
_NOTHING: Final = "-"
_NO_REQUEST: Final = "<BADREQ>"
_PLAIN: Final = (string.digits + string.ascii_letters + string.punctuation + " \n").encode()
_CONTROL: Final = re.compile("[\0-\x1f\x7f]")
_TOKEN: Final = re.compile(rb"[0-9A-Fa-f]{0,8}\.[0-9]{10}\.[A-Za-z0-9_-]+")
_JWT_BEGIN: Final = b"eyJ"
_JWT: Final = re.compile(rb"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?")
_NO_TOKEN: Final = b"(token)"
_ROUGHLY_S: Final = 100_000
_LEFT_OUT: Final = re.compile(rb"(\d+) events? dropped")


def names_of_log(spec: DataplaneSpec) -> dict[str, Value]:
    # While a client watches, every request needs a line in the watch ring: silencing requests would drop that line too.
    sampled = spec.audit > 1 and spec.watched
    return {
        "watched": spec.watched,
        "audited": spec.audit > 0,
        "logs": spec.watched or spec.audit > 0,
        "log_path": Text("capture.req.uri,field(1,?)" if spec.audit else "var(txn.watched)"),
        "log_checks": Text(_CHECKS if spec.audit else ""),
        "log_identity": Text(_IDENTITY if spec.audit and spec.identity else ""),
        "log_agent": Text(',"agent":%{+json}[capture.req.hdr(0)]' if spec.audit else ""),
        # The instance is the first field of `INSTANCE|REVISION`, and the third of `@SET|SIGNATURE|INSTANCE|PROJECT`.
        "log_of_nova": Text('regsub("^@[^|]*.[^|]*.",),' if spec.nova else ""),
        "sample": Text(f"sample 1:{spec.audit}" if sampled else ""),
        "logs_all": spec.audit == 1 or sampled,
        "samples": spec.audit > 1 and not spec.watched,
        "by_audit_chance": Text(f"{{ rand({spec.audit}) 0 }}"),
        "audit_longest": AUDIT_LONGEST,
    }


class AnsweredBy(StrEnum):
    """Component that gave the answer."""

    CACHE = "cache"
    DOCUMENTS = "documents"
    NOVA = "nova"
    RESOLVER = "resolver"
    IDENTITY = "identity"
    """The process that gives identity tokens, or HAProxy with a token of it."""

    CONFLICT = "conflict"
    HAPROXY = "haproxy"
    """HAProxy itself: a refusal, or no server was available."""


@dataclass(frozen=True, slots=True)
class Watched:
    """Answered request.

    Attributes:
        number: HAProxy's number of the request, unique within one worker.
        network: Empty if HAProxy refused the request before it determined the network.
        instance: `None` if HAProxy's maps had no instance: then the resolver answered.
        method: Empty if the request was not HTTP.
        milliseconds: Time from the first byte of the request to the end of the answer.
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
    """Requests answered since the client's previous call, oldest first; too many are `missed`."""

    cursor: int
    requests: tuple[Watched, ...]
    missed: bool = False


@dataclass(frozen=True, slots=True)
class AuditLines:
    """Whole lines, each valid JSON, and the number of requests for which HAProxy had no room."""

    text: bytes
    requests: int
    lost: int = 0


def read_audit(read: bytes, now: float) -> AuditLines:
    """Return the lines of requests, made valid and without tokens, and the number of dropped lines.

    HAProxy reports dropped lines by messages of its own; lines with the time `now` replace these.
    """
    if any(begin in read for begin in _begins_of_expiries(now)):
        read = _TOKEN.sub(_NO_TOKEN, read)
    if _JWT_BEGIN in read:
        read = _JWT.sub(_NO_TOKEN, read)
    count = read.count(b"}\n")
    # The usual case: a loop over lines would take the controller ten times as long.
    if (
        read.startswith(b"{")
        and read.endswith(b"}\n")
        and read.count(b"}\n{") == count - 1
        and not read.translate(None, _PLAIN)
    ):
        return AuditLines(read, count)
    lines: list[bytes] = []
    requests = lost = 0
    for line in read.split(b"\n"):
        if line.startswith(b"{"):
            requests += 1
            lines.append(_valid(line))
        # Other lines are HAProxy's own messages, such as `Proxy guests stopped`.
        elif (dropped := _LEFT_OUT.search(line)) is not None:
            lost += int(dropped[1])
            lines.append(lost_line(int(dropped[1]), now))
    return AuditLines(b"".join(line + b"\n" for line in lines), requests, lost)


def lost_line(count: int, now: float) -> bytes:
    """Return the line that stands for `count` dropped lines, without its line end."""
    return b'{"time":%.3f,"lost":%d}' % (now, count)


def _begins_of_expiries(now: float) -> set[bytes]:
    """Return the prefixes of every valid token's expiry: searching for them is ten times as fast as the regex."""
    return {b".%d" % (int(second) // _ROUGHLY_S) for second in (now, now + TTL_LIMIT_S)}


def _valid(line: bytes) -> bytes:
    text = line.decode("utf-8", "replace")
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


def parse_events(text: str) -> list[Watched]:
    """Parse the answer of `show events WATCH_RING`, oldest first, without HAProxy's own messages."""
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
    # With status 200, a frontend itself answers only with the short documents that are kept beside the cache.
    if server == _CACHE or (backend in _FRONTENDS and status == HTTPStatus.OK):
        return AnsweredBy.CACHE
    for one in (AnsweredBy.NOVA, AnsweredBy.IDENTITY):
        if backend.startswith(one):
            return one
    name = backend.removesuffix(SAMPLED).removesuffix(CHECKED)
    return next((one for one in AnsweredBy if name == one.value), AnsweredBy.HAPROXY)
