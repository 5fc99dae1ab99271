"""Requests as `imdsproxy watch` shows them: HAProxy's rules for it, and its lines read into values.

HAProxy writes a line a request into a ring in its own memory. The rules are in the configuration only while a client
watches: a switch that they looked at would cost every request a twentieth of its time, and they themselves a sixth
(measured on documents out of the cache). A line has no query, no header and no body of a request, and of a record
neither revision nor signature.

A frontend has one log-format. Where there is an audit log (`core.haproxy.audit`) its lines are read here, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Final

from imdsproxy.core.haproxy.audit import AUDIT_LONGEST
from imdsproxy.core.haproxy.names import CHECKED, SAMPLED
from imdsproxy.core.haproxy.text import Form, Text, Value, Word
from imdsproxy.core.wire import MAP_NOVA

RING: Final = "watched"
_LONGEST: Final = 1024
"""Bytes of a line; what is beyond is cut off, and that is of the path."""

_CACHE: Final = "<CACHE>"
_FRONTENDS: Final = ("guests", "agents")
_NOTHING: Final = "-"
_NO_REQUEST: Final = "<BADREQ>"
_FIELDS: Final = (
    "%rt",
    "%[date(0,ms)]",
    "%[var(sess.network)]",
    "%[var(sess.address)]",
    # Of a record `INSTANCE|REVISION` the first, of `@SET|SIGNATURE|INSTANCE|PROJECT` the third.
    "%[var(txn.record),field(1,|)]",
    "%[var(txn.record),field(3,|)]",
    "%ST",
    "%Ta",
    "%b",
    "%s",
    "%[var(txn.watched)]",
)


_RULES: Final = """
    log ring@watched len <watch_longest> format raw local0
    [!audited] log-format <watch_format>
    # A connection without a byte is no request.
    [!audited] option dontlognull
    [!audited] http-request set-var-fmt(txn.watched) '%[method] %[path]'
"""


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


def watch_ring(form: Form) -> Text:
    """Where lines are kept until they are read, the oldest overwritten first."""
    return form.section(
        "ring watched", "format raw\nmaxlen <watch_longest>\nsize 131072", **_names(form)
    )


def watch_rules(form: Form) -> Text:
    """For a frontend of guests; before any rule that changes the path."""
    return form.fill(_RULES, **_names(form))


def _names(form: Form) -> dict[str, Value]:
    return {
        "watch_longest": AUDIT_LONGEST if form.values["audited"] else _LONGEST,
        "watch_format": Word(" ".join(_FIELDS)),
    }


def parse_events(text: str) -> list[Watched]:
    """The answer of `show events RING`, oldest first, without the lines of others (a proxy has stopped)."""
    found = (_parse(line) for line in text.splitlines())
    return [one for one in found if one is not None]


def _parse(line: str) -> Watched | None:
    if line.startswith("{"):
        return _parse_audited(line)
    words = line.split(" ")
    if len(words) < len(_FIELDS) or not _numbers(words[0], words[1], words[6], words[7]):
        return None
    number, at, network, address, first, third, status, took, backend, server = words[:10]
    method, _, path = " ".join(words[10:]).partition(" ")
    return Watched(
        number=int(number),
        at=int(at) / 1000,
        network=_named(network) or "",
        address=_named(address) or "",
        instance=_named(third) if first.startswith(MAP_NOVA) else _instance(first),
        method=_named(method) or "",
        path=path,
        status=int(status),
        answered_by=_answered_by(backend, server, int(status)),
        milliseconds=max(0, int(took)),
    )


def _parse_audited(line: str) -> Watched | None:
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


def _numbers(*words: str) -> bool:
    return all(word.removeprefix("-").isdecimal() for word in words)


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
    known: Iterable[AnsweredBy] = (
        AnsweredBy.DOCUMENTS,
        AnsweredBy.RESOLVER,
        AnsweredBy.CONFLICT,
    )
    name = backend.removesuffix(SAMPLED).removesuffix(CHECKED)
    return next((one for one in known if name == one.value), AnsweredBy.HAPROXY)
