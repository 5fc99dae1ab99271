"""Requests and answers of etcd's JSON gateway. Pure.

Bytes are base64, 64-bit integers are strings, and zero, empty or false values are absent (etcd's `rpc.proto`, the
mapping of protobuf to JSON). Errors have other fields in etcd 3.5 than in 3.6.
"""

from __future__ import annotations

import base64
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from imdsproxy.errors import EtcdUnavailable

Json: TypeAlias = dict[str, Any]


class Garbled(ValueError):
    """An answer is not etcd's: another program listens at the address."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """Existing key with its value, and the revisions of its last write and of its creation.

    `lease` is 0 without a lease. `version` counts the writes since the creation; it is 0 if unknown.
    """

    key: str
    value: bytes
    mod_revision: int
    create_revision: int
    lease: int = 0
    version: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Deleted:
    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Header:
    revision: int
    term: int


@dataclass(frozen=True, slots=True)
class Compare:
    """Condition of a write: a key, or all keys before `range_end`, have this revision; 0 stands for an absent key."""

    key: str
    target: Literal["MOD", "CREATE"]
    revision: int
    range_end: str = ""


def unchanged(key: str, mod_revision: int) -> Compare:
    """Require that the key was last written at this revision; 0 requires that it is absent."""
    return Compare(key, "MOD", mod_revision)


def absent(key: str) -> Compare:
    return Compare(key, "CREATE", 0)


def none_below(prefix: str) -> Compare:
    return Compare(prefix, "CREATE", 0, prefix_end(prefix))


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a range in order; `more` says whether further keys follow."""

    revision: int
    kvs: list[KeyValue]
    more: bool


class Kind(enum.Enum):
    """Kind of an etcd error, by the reaction of the client."""

    AUTHENTICATE = enum.auto()
    DENIED = enum.auto()
    REFUSED = enum.auto()
    FULL = enum.auto()
    COMPACTED = enum.auto()
    NO_LEASE = enum.auto()
    OUTAGE = enum.auto()
    """Outage of the member or of etcd; every unknown error counts as one."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Error in an answer of etcd; `certain` if it is certain that nothing was written."""

    kind: Kind
    message: str
    certain: bool


@dataclass(frozen=True, slots=True)
class WatchMessage:
    """Line of a watch.

    Attributes:
        created: Whether this is the first line; its revision is the member's, not an event's.
        fragment: Whether the next message belongs to the same revision.
        compacted: Oldest revision that etcd still has, if compaction ended the watch.
    """

    header: Header
    events: tuple[KeyValue | Deleted, ...] = ()
    created: bool = False
    fragment: bool = False
    fault: Fault | None = None
    compacted: int = 0


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """Status of a member that answers. Sizes are bytes; `in_use` is the used part of the database file.

    `quota` is 0 if the member does not report it, and `leader` 0 without a leader. `problems` are in etcd's words.
    """

    url: str
    id: int
    version: str
    db_size: int
    in_use: int
    quota: int
    problems: tuple[str, ...]
    leader: int
    header: Header

    @property
    def full(self) -> bool:
        """Return whether the member refuses writes until an operator acts."""
        return any("NOSPACE" in one for one in self.problems)


@dataclass(frozen=True, slots=True)
class Snapshot:
    revision: int
    kvs: list[KeyValue]


@dataclass(frozen=True, slots=True)
class Committed:
    revision: int


@dataclass(frozen=True, slots=True)
class Conflict:
    """Result of a write whose comparison failed; `kvs` has the current compared keys (ten of a range)."""

    revision: int
    kvs: list[KeyValue]


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes of one or several complete transactions, up to the revision of the last."""

    revision: int
    events: tuple[KeyValue | Deleted, ...]


@dataclass(frozen=True, slots=True)
class MemberSilent:
    """Member that failed to answer; `leaderless` if it reported that it knows no leader."""

    url: str
    reason: str
    leaderless: bool = False


class Compacted(Exception):
    """The revision was compacted; `oldest` is etcd's oldest revision, 0 if unknown."""

    def __init__(self, oldest: int = 0) -> None:
        super().__init__(f"compacted up to {oldest}")
        self.oldest = oldest


class LeaseGone(EtcdUnavailable):
    """A lease has ended with its keys; the caller needs a new lease."""


class Behind(EtcdUnavailable):
    """More than half of the members answer with an older revision or raft term than known.

    etcd was restored from a backup: `Etcd.accept_older` makes it readable. One lagging member does not cause this.
    """


_INVALID: Final = 3
_NOT_FOUND: Final = 5
_DENIED: Final = 7
_EXHAUSTED: Final = 8
_PRECONDITION: Final = 9
_OUT_OF_RANGE: Final = 11
_UNAUTHENTICATED: Final = 16
_CERTAIN: Final = frozenset(
    (
        _INVALID,
        _NOT_FOUND,
        _DENIED,
        _EXHAUSTED,
        _PRECONDITION,
        _OUT_OF_RANGE,
        _UNAUTHENTICATED,
    )
)
"""gRPC status codes that etcd answers before a write or instead of it."""

_BY_WORDS: Final = (
    ("invalid auth token", Kind.AUTHENTICATE),
    ("revision of auth store is old", Kind.AUTHENTICATE),
    ("revision in header is old", Kind.AUTHENTICATE),
    ("user name is empty", Kind.AUTHENTICATE),
    ("permission denied", Kind.DENIED),
    ("authentication failed", Kind.DENIED),
    ("database space exceeded", Kind.FULL),
    ("revision has been compacted", Kind.COMPACTED),
    ("lease not found", Kind.NO_LEASE),
    ("larger than max", Kind.REFUSED),
)


def prefix_end(prefix: str) -> str:
    """Return the first key after all keys with this prefix, which must end in ASCII."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def encode(text: str | bytes) -> str:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return base64.b64encode(data).decode()


def render_range(key: str, range_end: str = "") -> Json:
    return {"key": encode(key)} | ({"range_end": encode(range_end)} if range_end else {})


def render_commit(
    compares: Iterable[Compare], puts: Mapping[str, bytes], deletes: Iterable[str], lease: int
) -> Json:
    """Return a transaction that writes if all comparisons hold, and otherwise reads the compared keys."""
    compared = tuple(compares)
    return {
        "compare": [
            render_range(one.key, one.range_end)
            | {
                "target": one.target,
                "result": "EQUAL",
                f"{one.target.lower()}_revision": str(one.revision),
            }
            for one in compared
        ],
        "success": [
            *(
                {
                    "request_put": {
                        "key": encode(key),
                        "value": encode(value),
                        "lease": str(lease),
                    }
                }
                for key, value in puts.items()
            ),
            *({"request_delete_range": render_range(key)} for key in deletes),
        ],
        "failure": [
            {"request_range": render_range(key, end) | {"limit": "10"}}
            for key, end in dict.fromkeys((one.key, one.range_end) for one in compared)
        ],
    }


def parse_header(answer: Json) -> Header:
    found = answer.get("header")
    if not isinstance(found, dict):
        raise Garbled("an answer without header")
    return Header(_int(found, "revision"), _int(found, "raft_term"))


def parse_page(answer: Json) -> Page:
    kvs = parse_keys(answer)
    return Page(parse_header(answer).revision, kvs, more=bool(answer.get("more") and kvs))


def parse_keys(answer: Json) -> list[KeyValue]:
    try:
        return [_key_value(one) for one in answer.get("kvs", ())]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Garbled(f"keys that cannot be read: {error!r}") from error


def parse_conflict(answer: Json) -> list[KeyValue]:
    parts = (one.get("response_range", {}) for one in answer.get("responses", ()))
    return [found for part in parts for found in parse_keys(part)]


def parse_fault(answer: Json) -> Fault:
    """Parse the error in a failed answer or in a line of a stream.

    etcd 3.5: `{error, code, message}`, and in a stream `{error: {grpc_code, message}}`; etcd 3.6: `{code, message}`,
    and in a stream `{error: {code, message}}`.
    """
    inner = answer.get("error")
    found = inner if isinstance(inner, dict) else answer
    code = found.get("code", found.get("grpc_code", 0))
    message = str(found.get("message") or inner or "an error without message")
    return _fault(code if isinstance(code, int) else 0, message)


def is_leaderless(fault: Fault) -> bool:
    """Return whether a member reports a lost quorum: no leader, or a request that timed out."""
    return "no leader" in fault.message or "etcdserver: request timed out" in fault.message


def parse_watch(line: Json) -> WatchMessage:
    """Parse a line of a watch; raise `Garbled`."""
    if "error" in line:
        return WatchMessage(Header(0, 0), fault=parse_fault(line))
    found = line.get("result")
    if not isinstance(found, dict):
        raise Garbled("a line without result")
    compacted = _int(found, "compact_revision")
    fault = None
    if compacted:
        fault = Fault(Kind.COMPACTED, f"compacted up to {compacted}", certain=True)
    elif found.get("canceled"):
        # Some releases put the whole text of a gRPC error here, including its number.
        fault = _fault(0, str(found.get("cancel_reason") or "canceled without a reason"))
    try:
        events = tuple(_event(one) for one in found.get("events", ()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Garbled(f"events that cannot be read: {error!r}") from error
    return WatchMessage(
        parse_header(found),
        events,
        created=bool(found.get("created")),
        fragment=bool(found.get("fragment")),
        fault=fault,
        compacted=compacted,
    )


def parse_status(url: str, answer: Json) -> MemberStatus:
    """Parse a member's status; raise `Garbled`. etcd 3.5 does not report the quota here."""
    header = answer.get("header")
    return MemberStatus(
        url,
        _int(header if isinstance(header, dict) else {}, "member_id"),
        str(answer.get("version", "")),
        _int(answer, "dbSize"),
        _int(answer, "dbSizeInUse"),
        _int(answer, "dbSizeQuota"),
        tuple(str(one).strip() for one in answer.get("errors", ())),
        _int(answer, "leader"),
        parse_header(answer),
    )


def parse_quota(metrics: bytes) -> int:
    """Parse the database quota in bytes from a member's metrics; 0 if absent."""
    name = b"etcd_server_quota_backend_bytes "
    for line in metrics.splitlines():
        if line.startswith(name):
            return int(float(line.removeprefix(name)))
    return 0


def parse_lease(answer: Json) -> int:
    return _int(answer, "ID")


def parse_keep_alive(answer: Json) -> int:
    """Parse the remaining seconds of a lease, 0 if it has ended; raise `Garbled`."""
    found = answer.get("result")
    if not isinstance(found, dict):
        raise Garbled("an answer without result")
    return _int(found, "TTL")


def _fault(code: int, message: str) -> Fault:
    kind = next((kind for words, kind in _BY_WORDS if words in message), None)
    if kind is None:
        kind = {_UNAUTHENTICATED: Kind.AUTHENTICATE, _DENIED: Kind.DENIED}.get(code)
    if kind is None:
        kind = Kind.REFUSED if code == _INVALID else Kind.OUTAGE
    # A member without a leader refuses a write before it starts.
    return Fault(kind, message, certain=code in _CERTAIN or message.endswith("no leader"))


def _int(found: Json, name: str) -> int:
    try:
        return int(found.get(name, 0))
    except (TypeError, ValueError) as error:
        raise Garbled(f"`{name}` is no number") from error


def _text(found: Json, name: str) -> str:
    return base64.b64decode(found.get(name, "")).decode("utf-8", "surrogateescape")


def _key_value(found: Json) -> KeyValue:
    return KeyValue(
        _text(found, "key"),
        base64.b64decode(found.get("value", "")),
        int(found["mod_revision"]),
        int(found["create_revision"]),
        int(found.get("lease", 0)),
        int(found.get("version", 0)),
    )


def _event(found: Json) -> KeyValue | Deleted:
    kv = found["kv"]
    if found.get("type", "PUT") == "DELETE":
        return Deleted(_text(kv, "key"), int(kv["mod_revision"]))
    return _key_value(kv)
