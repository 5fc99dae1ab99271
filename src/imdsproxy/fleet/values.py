"""Schema of all values that hubs watch in etcd: each kind of key has one parser, and other values are `Unreadable`.

Another program can write to etcd, a disk can change bytes, and a newer hub may have other values. Code that uses this
module therefore relies on its checks of fields and types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from imdsproxy.fleet import layout
from imdsproxy.fleet.codec import (
    ANY_TEXT,
    BYTES,
    COUNT,
    DIGEST,
    ID,
    NUMBER,
    URL,
    Codec,
    Json,
    Unreadable,
    decode,
    is_id,
    nullable,
)
from imdsproxy.fleet.layout import Meta, StoredInstance, StoredNetwork
from imdsproxy.fleet.members import StoredHost, StoredOperator, parse_host, parse_operator
from imdsproxy.fleet.restores import Suspicion, parse_suspicion
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records import Refused
from imdsproxy.model.records.grant import GRANT, Grant


@dataclass(frozen=True, slots=True)
class Beat:
    """Value of `layout.BEAT`: the number of writes by hubs, and the hub of the last write."""

    count: int
    hub: str


@dataclass(frozen=True, slots=True)
class HubPlace:
    """Value of a key below `layout.HUBS`: the URL at which others reach the hub."""

    url: str


@dataclass(frozen=True, slots=True)
class KnownHub:
    """Value of a key below `layout.KNOWN_HUBS`.

    Attributes:
        url: Last URL at which others reached the hub.
        absent_since: Time at which another hub noticed the end of the hub, Unix time; `None` while it runs.
    """

    url: str
    absent_since: int | None = None


@dataclass(frozen=True, slots=True)
class Sealing:
    """Value of `layout.ENVELOPE`: the key with which hubs seal secrets.

    Attributes:
        key: Name of the key.
        sha256: Fingerprint of the key; a hub compares it with its own key of this name.
    """

    key: str
    sha256: str


@dataclass(frozen=True, slots=True)
class SealedKeys:
    """Value of `layout.TOKEN_KEYS`: data that the hubs' envelope opens."""

    sealed: bytes


@dataclass(frozen=True, slots=True)
class StoredPassword:
    """Value of a key below `layout.PASSWORDS`.

    Attributes:
        sealed: Password that the hubs' envelope opens; `None` after a clearing, or the removal of the instance.
        request: As `StoredInstance.request`.
        removed_at: Time of the clearing or removal, Unix time.
    """

    sealed: bytes | None
    request: str = ""
    removed_at: int | None = None


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """Value of a key below `layout.POLICIES`. Hosts check the rules: a newer hub may know more of them."""

    rules: Json


@dataclass(frozen=True, slots=True)
class Journal:
    """Value of a key below `layout.IMPORTS`: the number of stored records of an import, and its start."""

    done: int
    of: int
    at: int


Value: TypeAlias = (
    Meta | Suspicion | Grant | Beat | HubPlace | KnownHub | Sealing | SealedKeys | StoredPolicy | StoredInstance
    | StoredNetwork | StoredPassword | OperatorOverride | StoredHost | StoredOperator
)  # fmt: skip


def parse_value(key: str, value: bytes) -> Value:
    """Parse the value of a key below `layout.PREFIX`.

    Raises:
        Unreadable: No hub of this version writes such a value, or such a key.
    """
    single = _SINGLE.get(key)
    if single is not None:
        return single(value)
    for prefix, parse in _BELOW.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            if not (is_id(name) or (prefix == layout.POLICIES and _is_scope(name))):
                raise Unreadable("its key has no id that may be one")
            return parse(value)
    raise Unreadable("no hub of this version writes this key")


def _is_scope(place: str) -> bool:
    scope, _, name = place.partition("/")
    return scope in {"host", "project"} and is_id(name)


def _check_password(stored: StoredPassword) -> str | None:
    if (stored.sealed is None) is (stored.removed_at is None):
        return "it has not either `sealed` or `removed_at`"
    return None


_BEAT: Final = Codec(Beat, count=COUNT, hub=ANY_TEXT)
_HUB: Final = Codec(HubPlace, url=URL)
_KNOWN_HUB: Final = Codec(KnownHub, url=URL, absent_since=nullable(NUMBER))
_SEALING: Final = Codec(Sealing, key=ID, sha256=DIGEST)
_SEALED_KEYS: Final = Codec(SealedKeys, sealed=BYTES)
_PASSWORD: Final = Codec(
    StoredPassword,
    _check_password,
    sealed=nullable(BYTES),
    request=ANY_TEXT,
    removed_at=nullable(NUMBER),
)
_JOURNAL: Final = Codec(Journal, done=NUMBER, of=NUMBER, at=NUMBER)
parse_beat, render_beat = _BEAT.parse, _BEAT.render
parse_hub, render_hub = _HUB.parse, _HUB.render
parse_known_hub, render_known_hub = _KNOWN_HUB.parse, _KNOWN_HUB.render
parse_sealing, render_sealing = _SEALING.parse, _SEALING.render
parse_sealed_keys, render_sealed_keys = _SEALED_KEYS.parse, _SEALED_KEYS.render
parse_password, render_password = _PASSWORD.parse, _PASSWORD.render
parse_journal, render_journal = _JOURNAL.parse, _JOURNAL.render


def is_cleared(value: bytes) -> bool:
    """Return whether a password was cleared, or removed with its instance; false if the value is unreadable."""
    try:
        return parse_password(value).sealed is None
    except Unreadable:
        return False


def parse_policy(value: bytes) -> StoredPolicy:
    """Parse the rules of a scope; raises `Unreadable`."""
    layout.removal_time(value)
    return StoredPolicy(decode(value))


def parse_grant(value: bytes) -> Grant:
    """Parse the grant of a project; raises `Unreadable`."""
    grant = GRANT.read(decode(value))
    if isinstance(grant, Refused):
        raise Unreadable("; ".join(map(str, grant.problems)))
    return grant


_SINGLE: Final[dict[str, Callable[[bytes], Value]]] = {
    layout.META: layout.parse_meta,
    layout.BEAT: parse_beat,
    layout.SUSPECT: parse_suspicion,
    layout.ENVELOPE: parse_sealing,
    layout.TOKEN_KEYS: parse_sealed_keys,
    f"{layout.POLICIES}fleet": parse_policy,
}
_BELOW: Final[dict[str, Callable[[bytes], Value]]] = {
    layout.INSTANCES: layout.parse_instance,
    layout.NETWORKS: layout.parse_network,
    layout.OVERRIDES: layout.parse_override,
    layout.PASSWORDS: parse_password,
    layout.POLICIES: parse_policy,
    layout.GRANTS: parse_grant,
    layout.HOSTS: parse_host,
    layout.CERTIFICATES: parse_operator,
    layout.HUBS: parse_hub,
    layout.KNOWN_HUBS: parse_known_hub,
}
