"""Lines of a host's stream: one JSON object each, in both directions, after `101 Switching Protocols`.

A host sends hello with its items, then receives the difference, then each change. It acknowledges a revision when
everything up to the revision is in force. It receives only items that are placed on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, Final, TypeAlias, cast

from imdsproxy.fleet.codec import (
    ANY,
    ANY_TEXT,
    ID,
    ID_SHAPE,
    NUMBER,
    OBJECT,
    SECONDS,
    SWITCH,
    TEXT,
    Codec,
    Json,
    Unreadable,
    checked,
    decode,
    is_number,
    list_of,
    mapping_of,
    matching,
    nullable,
    omissible,
    row_of,
    word_of,
)
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
"""`network/ID`, `instance/ID`, `policy/fleet`, `policy/host/ID`, `policy/project/ID`, `issuer/keys`; for an instance
also `override/ID`, `keys/ID` and `password/ID`.
"""


class Broken(ValueError):
    """Line that the other side must not send."""


class ByeCode(StrEnum):
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
    """Items of a host with their revisions, the highest incarnation that the host has seen, and its applied revision.

    Attributes:
        fleet: UUID of the fleet; `None` for a host without items.
        level: Level of records that the host reads (`model.records.levels`).
        overrides: Operator overrides in force on the host: a restored etcd may have lost them.
    """

    fleet: str | None = None
    incarnation: int = 0
    revision: int = 0
    items: Mapping[ItemKey, int] = field(default_factory=dict)
    format: int = FORMAT
    level: int = 1
    overrides: Mapping[InstanceId, OperatorOverride] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ack:
    """Acknowledgement that everything up to `revision` is in force, except failed items, with the reasons.

    From time to time it has `digest_items` of all of the host's items except failed ones.
    """

    revision: int
    failed: Mapping[ItemKey, str] = field(default_factory=dict)
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    number: int
    status: int
    body: Any = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes that are applied together; afterwards the host has all changes up to `revision`.

    Attributes:
        remove: Items that the host must remove, because the record in the hub says so.
        held: Items of the host that the hub cannot confirm, with the reasons: they stay.
        unreadable: Items whose values in etcd are unreadable, with the reasons: they stay in any incarnation.
        more: Whether another batch belongs to these changes.
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
    """Sign of life of the hub, with its highest revision, its clock (Unix time) and the age of its last data from etcd.

    The host answers with its last acknowledgement.
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


_ITEM: Final = matching(
    re.compile(
        f"(?:network|instance|override|keys|password)/{ID_SHAPE}"
        f"|policy/(?:fleet|(?:host|project)/{ID_SHAPE})|issuer/keys"
    ),
    "name of an item",
)
_REASONS: Final = omissible(mapping_of(ANY_TEXT, TEXT))

_CODECS: Final[dict[type, tuple[str, Codec[Any]]]] = {
    Hello: (
        "hello",
        Codec(
            Hello,
            fleet=omissible(nullable(TEXT)),
            incarnation=NUMBER,
            revision=omissible(NUMBER),
            items=omissible(mapping_of(_ITEM, NUMBER)),
            format=NUMBER,
            level=omissible(NUMBER),
            overrides=omissible(mapping_of(ID, row_of(OperatorOverride, NUMBER, NUMBER))),
        ),
    ),
    Ack: (
        "ack",
        Codec(
            Ack,
            sparse=True,
            ack=NUMBER,
            failed=omissible(mapping_of(_ITEM, TEXT)),
            digest=omissible(matching(re.compile("[0-9a-f]{32}|"), "digest")),
        ),
    ),
    Answer: (
        "answer",
        Codec(
            Answer,
            answer=NUMBER,
            status=checked(lambda one: is_number(one) and one in range(100, 600), "status of HTTP"),
            body=ANY,
        ),
    ),
    Batch: (
        "batch",
        Codec(
            Batch,
            sparse=True,
            revision=NUMBER,
            fleet=omissible(TEXT),
            incarnation=omissible(NUMBER),
            put=omissible(mapping_of(ANY_TEXT, row_of(lambda *one: one, NUMBER, OBJECT))),
            remove=omissible(list_of(ANY_TEXT)),
            held=_REASONS,
            unreadable=_REASONS,
            more=omissible(SWITCH),
        ),
    ),
    Ping: ("ping", Codec(Ping, revision=NUMBER, time=SECONDS, age_s=omissible(SECONDS))),
    Ask: ("ask", Codec(Ask, ask=NUMBER, path=ANY_TEXT, method=omissible(TEXT))),
    Bye: ("bye", Codec(Bye, bye=word_of(ByeCode), reason=omissible(TEXT))),
}
"""First key and codec of each message. The first key has the whole message if the codec does not know the key."""


def render_line(message: FromHost | FromHub) -> bytes:
    first, codec = _CODECS[type(message)]
    shape = codec.write(message)
    line = shape if first in shape else {first: shape}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def parse_from_host(line: bytes) -> FromHost:
    """Parse a line of a host; numbers have at most 64 bits, texts are short, and item names are valid. Raises `Broken`.

    A host may be compromised, so the hub relies only on what this function checks.
    """
    return cast("FromHost", _parse(line, (Hello, Ack, Answer)))


def parse_from_hub(line: bytes) -> FromHub:
    """Parse a line of a hub; raises `Broken`."""
    return cast("FromHub", _parse(line, (Batch, Ping, Ask, Bye)))


def _parse(line: bytes, messages: Collection[type]) -> object:
    try:
        shape = decode(line)
        for first, codec in map(_CODECS.__getitem__, messages):
            if first in shape:
                known = any(first == key for key, _, _ in codec.keys)
                return codec.read(shape if known else OBJECT.read(shape[first]))
    except Unreadable as error:
        raise Broken(str(error)) from error
    raise Broken(f"the line has none of {', '.join(_CODECS[one][0] for one in messages)}")
