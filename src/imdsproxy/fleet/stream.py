"""Lines of a host's stream: one JSON object each, in both directions, after `101 Switching Protocols`.

A host sends hello with its items, then receives the difference, then each change. It acknowledges a revision when
everything up to the revision is in force. It receives only items that are placed on it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Final, TypeAlias, cast

from imdsproxy.fleet.layout import ID_SHAPE, MOST_NUMBER, Json, is_number, plain
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import OperatorOverride

STREAM_PATH: Final = "/fleet/stream"
BLOB_PATH: Final = "/fleet/blob/"
"""Prefix of the SHA-256 of user data; returns the bytes to hosts of an instance that has the user data."""

ALIVE_PATH: Final = "/fleet/alive"
"""Answered at once by a running hub, even before it has read etcd."""

UPGRADE: Final = "imdsproxy-fleet"
FORMAT: Final = 1
MAX_LINE: Final = 4 * 1024 * 1024
"""In bytes; a longer line ends the stream."""

PING_S: Final = 5.0
"""Interval at which a hub pings each of its hosts. The host answers each ping."""

SILENCE_S: Final = 15.0
"""After this time without a line, host and hub regard each other as lost: two pings are unanswered."""

CONNECT_S: Final = 2.0
"""Time for a hub to accept a connection and answer that it runs; then the host tries another hub."""

ItemKey: TypeAlias = str
"""`network/ID`, `instance/ID`, `policy/fleet`, `policy/host/ID`, `policy/project/ID`; for an instance also `guard/ID`,
`keys/ID` and `password/ID`.
"""

_ITEM_KEY: Final = re.compile(
    f"(?:network|instance|guard|keys|password)/{ID_SHAPE}|policy/(?:fleet|(?:host|project)/{ID_SHAPE})"
)
_DIGEST: Final = re.compile("[0-9a-f]{32}|")
_STATUSES: Final = range(100, 600)


class Broken(ValueError):
    """Line that the other side must not send."""


class ByeCode(StrEnum):
    """Reason for which a hub ends a stream."""

    BEHIND = "behind"
    """The hub does not yet have the host's revision: another hub may have it."""

    AHEAD = "ahead"
    """The host has seen a later incarnation of the fleet: etcd was restored from an earlier backup."""

    REVOKED = "revoked"
    REPLACED = "replaced"
    """The host has a newer stream."""

    SLOW = "slow"
    """The host did not read for too long."""

    FORMAT = "format"
    """The host uses another format."""

    OTHER_FLEET = "other-fleet"
    STOPPING = "stopping"
    DIFFERS = "differs"
    """The host's items differ from the fleet's: it sends its items in a new hello and receives the difference."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Items and state of a host.

    Attributes:
        fleet: UUID of the fleet; `None` for a host without items.
        incarnation: Highest incarnation that the host has seen.
        revision: Highest revision that the host has applied; 0 for none.
        items: Revision of each of the host's items.
        level: Level of records that the host reads (`model.records.levels`).
        guards: Operator overrides in force on the host: a restored etcd may have lost them.
    """

    fleet: str | None = None
    incarnation: int = 0
    revision: int = 0
    items: Mapping[ItemKey, int] = field(default_factory=dict)
    format: int = FORMAT
    level: int = 1
    guards: Mapping[InstanceId, OperatorOverride] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ack:
    """Acknowledgement that everything up to `revision` is in force, except failed items, with the reasons.

    Attributes:
        digest: From time to time, `digest_items` of all of the host's items except failed ones; else empty.
    """

    revision: int
    failed: Mapping[ItemKey, str] = field(default_factory=dict)
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer of the host's admin API to an `Ask`."""

    number: int
    status: int
    body: Any = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes that are applied together.

    Attributes:
        revision: Revision up to which the host has all changes after this batch.
        put: Revision and value by item.
        remove: Items that the host must remove, because the record in the hub says so.
        held: Items of the host that the hub cannot confirm, with the reasons: they stay.
        unreadable: Items of the host whose values in etcd are unreadable, with the reasons: they stay even if
            `incarnation` is higher.
        more: Whether another batch belongs to these changes.
        fleet: UUID of the fleet.
        incarnation: If it is higher than the host's, the host removes held items and accepts older values.
    """

    revision: int
    fleet: str = ""
    incarnation: int = 0
    put: Mapping[ItemKey, tuple[int, Json]] = field(default_factory=dict)
    remove: tuple[ItemKey, ...] = ()
    held: Mapping[ItemKey, str] = field(default_factory=dict)
    unreadable: Mapping[ItemKey, str] = field(default_factory=dict)
    more: bool = False


@dataclass(frozen=True, slots=True)
class Ping:
    """Sign of life of the hub; the host answers with its last acknowledgement.

    Attributes:
        revision: Highest revision that the hub knows.
        time: The hub's clock, Unix time.
        age_s: Seconds since the hub last received data from etcd.
    """

    revision: int
    time: float
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ask:
    """Request to the host's admin API, without a body; the host decides which requests it answers."""

    number: int
    path: str
    method: str = "GET"


@dataclass(frozen=True, slots=True)
class Bye:
    """The hub ends the stream."""

    code: ByeCode
    reason: str = ""


FromHost: TypeAlias = Hello | Ack | Answer
FromHub: TypeAlias = Batch | Ping | Ask | Bye


def digest_items(items: Mapping[ItemKey, int]) -> str:
    """Return an order-independent digest of items and their revisions."""
    lines = sorted(f"{item} {revision}" for item, revision in items.items())
    return blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def render_line(message: FromHost | FromHub) -> bytes:
    """Render a line, with its end."""
    match message:
        case Hello():
            shape: Json = {
                "hello": {
                    "format": message.format,
                    "fleet": message.fleet,
                    "incarnation": message.incarnation,
                    "revision": message.revision,
                    "items": dict(message.items),
                    "level": message.level,
                    "guards": {
                        instance: [guard.epoch, guard.reopened_at]
                        for instance, guard in message.guards.items()
                    },
                }
            }
        case Ack():
            shape = {"ack": message.revision}
            if message.failed:
                shape["failed"] = dict(message.failed)
            if message.digest:
                shape["digest"] = message.digest
        case Answer():
            shape = {"answer": message.number, "status": message.status, "body": message.body}
        case Batch():
            shape = {"batch": _render_batch(message)}
        case Ping():
            shape = {
                "ping": {
                    "revision": message.revision,
                    "time": message.time,
                    "age_s": message.age_s,
                }
            }
        case Ask():
            shape = {"ask": message.number, "path": message.path, "method": message.method}
        case Bye():
            shape = {"bye": message.code.value, "reason": message.reason}
    return json.dumps(shape, separators=(",", ":")).encode() + b"\n"


def _render_batch(batch: Batch) -> Json:
    shape: Json = {
        "revision": batch.revision,
        "fleet": batch.fleet,
        "incarnation": batch.incarnation,
        "put": {key: list(one) for key, one in batch.put.items()},
        "remove": list(batch.remove),
        "held": dict(batch.held),
        "unreadable": dict(batch.unreadable),
        "more": batch.more,
    }
    return {key: one for key, one in shape.items() if key == "revision" or one}


def parse_from_host(line: bytes) -> FromHost:
    """Parse a line of a host; numbers have at most 64 bits, texts are short, and item names are valid.

    Raises:
        Broken: A host must not send this line. A host may be compromised, so the hub relies only on what this function
            checks.
    """
    match _decode(line):
        case {"hello": {"format": form, "incarnation": incarnation, **rest}}:
            fleet, items = rest.get("fleet"), _object(cast("Json", rest), "items")
            if not (fleet is None or isinstance(fleet, str)):
                raise Broken("`fleet` is no text")
            return Hello(
                None if fleet is None else plain(fleet),
                _number(incarnation),
                _number(rest.get("revision", 0)),
                {_item(key): _number(one) for key, one in items.items()},
                _number(form),
                _number(rest.get("level", 1)),
                _guards(_object(cast("Json", rest), "guards")),
            )
        case {"ack": revision, **rest}:
            why = {_item(key): _text(one) for key, one in _object(rest, "failed").items()}
            digest = _text(rest.get("digest", ""))
            if _DIGEST.fullmatch(digest) is None:
                raise Broken("`digest` is none")
            return Ack(_number(revision), why, digest)
        case {"answer": number, "status": status, "body": body}:
            if _number(status) not in _STATUSES:
                raise Broken("`status` is none of HTTP")
            return Answer(_number(number), status, body)
        case _:
            raise Broken("a host sends `hello`, `ack` or `answer`")


def _guards(shape: Json) -> dict[InstanceId, OperatorOverride]:
    guards: dict[InstanceId, OperatorOverride] = {}
    for instance, guard in shape.items():
        _item(f"guard/{instance}")
        match guard:
            case [epoch, reopened_at]:
                override = OperatorOverride(_number(epoch), _number(reopened_at))
                guards[InstanceId(instance)] = override
            case _:
                raise Broken("a guard is two numbers")
    return guards


def parse_from_hub(line: bytes) -> FromHub:
    """Parse a line of a hub; raises `Broken`."""
    match _decode(line):
        case {"batch": {"revision": revision, **rest}}:
            return _parse_batch(_number(revision), cast("Json", rest))
        case {"ping": {"revision": revision, "time": time, **rest}}:
            return Ping(_number(revision), _seconds(time), _seconds(rest.get("age_s", 0.0)))
        case {"ask": number, "path": str(path), **rest}:
            return Ask(_number(number), path, _text(rest.get("method", "GET")))
        case {"bye": str(code), **rest}:
            try:
                return Bye(ByeCode(code), _text(rest.get("reason", "")))
            except ValueError as error:
                raise Broken(str(error)) from error
        case _:
            raise Broken("a hub sends `batch`, `ping`, `ask` or `bye`")


def _parse_batch(revision: int, shape: Json) -> Batch:
    put: dict[ItemKey, tuple[int, Json]] = {}
    remove = shape.get("remove", [])
    if not (isinstance(remove, list) and all(isinstance(one, str) for one in remove)):
        raise Broken("`remove` is no list of names")
    for key, one in _object(shape, "put").items():
        match one:
            case [number, dict(value)]:
                put[key] = _number(number), value
            case _:
                raise Broken(f"{key} has no revision and value")
    return Batch(
        revision,
        _text(shape.get("fleet", "")),
        _number(shape.get("incarnation", 0)),
        put,
        tuple(remove),
        {key: _text(why) for key, why in _object(shape, "held").items()},
        {key: _text(why) for key, why in _object(shape, "unreadable").items()},
        shape.get("more") is True,
    )


def _object(shape: Mapping[str, Any], field_name: str) -> Json:
    found = shape.get(field_name, {})
    if not isinstance(found, dict):
        raise Broken(f"`{field_name}` is no object")
    return cast("Json", found)


def _item(key: str) -> ItemKey:
    if _ITEM_KEY.fullmatch(key) is None:
        raise Broken("a name is no item's")
    return key


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Broken("a text is none")
    return plain(value)


def _number(value: object) -> int:
    if is_number(value):
        return cast("int", value)
    raise Broken(f"a number is none from 0 to {MOST_NUMBER}")


def _seconds(value: object) -> float:
    if type(value) is int and abs(value) <= MOST_NUMBER:
        return float(value)
    if type(value) is float and math.isfinite(value):
        return value
    raise Broken("a time is no number")


def _decode(line: bytes) -> Json:
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise Broken("it is no JSON") from error
    if not isinstance(found, dict):
        raise Broken("it is no object")
    return cast("Json", found)
