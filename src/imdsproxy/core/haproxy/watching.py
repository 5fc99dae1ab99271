"""Who asks what, told by HAProxy while somebody watches: its rules, and its lines read into values.

HAProxy writes a line a request into a ring in its own memory. The rules are in the configuration only while somebody
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
from imdsproxy.core.haproxy.counting import COUNTED
from imdsproxy.core.haproxy.guard import GUARDED
from imdsproxy.core.haproxy.section import Section, Words
from imdsproxy.core.wire import MAP_NOVA

__all__ = [
    "RING",
    "AnsweredBy",
    "WatchReport",
    "Watched",
    "parse_events",
    "watch_ring",
    "watch_rules",
]

RING: Final = "watched"
_RING_BYTES: Final = 131_072
_LONGEST: Final = 1024
"""Bytes of a line; what is beyond is cut off, and that is of the path."""

_CACHE: Final = "<CACHE>"
_FRONTENDS: Final = ("guests", "agents")
_NOBODY: Final = "-"
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


class AnsweredBy(StrEnum):
    """Who gave the answer."""

    CACHE = "cache"
    DOCUMENTS = "documents"
    NOVA = "nova"
    RESOLVER = "resolver"
    CONFLICT = "conflict"
    HAPROXY = "haproxy"
    """Itself: a refusal, or nobody was there to answer."""


@dataclass(frozen=True, slots=True)
class Watched:
    """One request that was answered.

    Attributes:
        number: HAProxy's own, which no two requests of one worker share.
        at: When it was answered, Unix time.
        network: Empty where HAProxy refused the request before it looked.
        instance: `None` where HAProxy's maps had nobody: then the resolver answered.
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
    """What guests were answered since somebody asked before.

    Attributes:
        cursor: To be given at the next question.
        requests: Oldest first.
        missed: There were so many that some are not among them.
    """

    cursor: int
    requests: tuple[Watched, ...]
    missed: bool = False


def watch_ring(*, audited: bool = False) -> Section:
    """Where lines are kept until they are read, the oldest overwritten first."""
    return Section(
        ("ring", RING),
        (
            ("format", "raw"),
            ("maxlen", str(AUDIT_LONGEST if audited else _LONGEST)),
            ("size", str(_RING_BYTES)),
        ),
    )


def watch_rules(*, audited: bool = False) -> tuple[Words, ...]:
    """For a frontend of guests; before any rule that changes the path."""
    if audited:
        return (("log", f"ring@{RING}", "len", str(AUDIT_LONGEST), "format", "raw", "local0"),)
    return (
        ("log", f"ring@{RING}", "len", str(_LONGEST), "format", "raw", "local0"),
        ("log-format", " ".join(_FIELDS)),
        # A connection without a byte is no request.
        ("option", "dontlognull"),
        ("http-request", "set-var-fmt(txn.watched)", "%[method] %[path]"),
    )


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
        told: dict[str, Any] = json.loads(line, strict=False)
        backend, _, server = told["by"].partition("/")
        method = told["method"]
        return Watched(
            number=told["number"],
            at=told["time"],
            network=_named(told["network"]) or "",
            address=_named(told["address"]) or "",
            instance=_instance(told["instance"]),
            method="" if method == _NO_REQUEST else method,
            path=_named(told["path"]) or "",
            status=told["status"],
            answered_by=_answered_by(backend, server, told["status"]),
            milliseconds=max(0, told["ms"]),
        )
    except (ValueError, KeyError):
        return None


def _numbers(*words: str) -> bool:
    return all(word.removeprefix("-").isdecimal() for word in words)


def _named(word: str) -> str | None:
    return None if word in (_NOBODY, "") else word


def _instance(word: str) -> str | None:
    # A conflict is `!`; no instance's id begins so.
    return None if word[:1] in ("!", _NOBODY) else _named(word)


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
    name = backend.removesuffix(COUNTED).removesuffix(GUARDED)
    return next((one for one in known if name == one.value), AnsweredBy.HAPROXY)
