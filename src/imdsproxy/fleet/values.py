"""Schema of all values that hubs watch in etcd: each kind of key has one parser, and other values are `Unreadable`.

Another program can write to etcd, a disk can change bytes, and a newer hub may have other values. Code that uses this
module therefore relies on its checks of fields and types.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import (
    SHA256,
    Json,
    Meta,
    StoredInstance,
    StoredNetwork,
    Unreadable,
    decode,
    encode,
    is_count,
    is_id,
    is_number,
)
from imdsproxy.fleet.members import StoredHost, StoredOperator, parse_host, parse_operator
from imdsproxy.fleet.suspicion import Suspicion, parse_suspicion
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records import Refused
from imdsproxy.model.records.grant import GRANT, Grant

_URL: Final = re.compile(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}")
_MOST_URL: Final = 300


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


def render_beat(beat: Beat) -> bytes:
    """Render the value of `layout.BEAT`."""
    return encode({"count": beat.count, "hub": beat.hub})


def parse_beat(value: bytes) -> Beat:
    """Parse the value of `layout.BEAT`; raises `Unreadable`."""
    match decode(value):
        case {"count": count, "hub": str(hub)} if is_count(count):
            return Beat(count, hub)
        case _:
            raise Unreadable("it does not say `count` and `hub`")


def render_hub(place: HubPlace) -> bytes:
    """Render the value of a hub's key."""
    return encode({"url": place.url})


def parse_hub(value: bytes) -> HubPlace:
    """Parse the value of a hub's key; raises `Unreadable`."""
    match decode(value):
        case {"url": str(url)} if _is_url(url):
            return HubPlace(url)
        case _:
            raise Unreadable("`url` is none of a hub")


def render_known_hub(hub: KnownHub) -> bytes:
    """Render the record of a hub."""
    return encode({"url": hub.url, "absent_since": hub.absent_since})


def parse_known_hub(value: bytes) -> KnownHub:
    """Parse the record of a hub; raises `Unreadable`."""
    match decode(value):
        case {"url": str(url), "absent_since": since} if _is_url(url) and (
            since is None or is_number(since)
        ):
            return KnownHub(url, since)
        case _:
            raise Unreadable("it does not say `url` and `absent_since`")


def _is_url(url: str) -> bool:
    return len(url) <= _MOST_URL and _URL.fullmatch(url) is not None


def render_sealing(sealing: Sealing) -> bytes:
    """Render the value of `layout.ENVELOPE`."""
    return encode({"key": sealing.key, "sha256": sealing.sha256})


def parse_sealing(value: bytes) -> Sealing:
    """Parse the value of `layout.ENVELOPE`; raises `Unreadable`."""
    match decode(value):
        case {"key": str(key), "sha256": str(sha256)} if is_id(key) and SHA256.fullmatch(sha256):
            return Sealing(key, sha256)
        case _:
            raise Unreadable("it does not say `key` and `sha256`")


def render_sealed_keys(keys: SealedKeys) -> bytes:
    """Render the value of `layout.TOKEN_KEYS`."""
    return encode({"sealed": base64.b64encode(keys.sealed).decode()})


def parse_sealed_keys(value: bytes) -> SealedKeys:
    """Parse the value of `layout.TOKEN_KEYS` without opening it; raises `Unreadable`."""
    match decode(value):
        case {"sealed": str(sealed)}:
            try:
                return SealedKeys(base64.b64decode(sealed, validate=True))
            except ValueError as error:
                raise Unreadable("`sealed` is no base64") from error
        case _:
            raise Unreadable("it does not say `sealed`")


def render_password(stored: StoredPassword) -> bytes:
    """Render the value of a password's key."""
    sealed = None if stored.sealed is None else base64.b64encode(stored.sealed).decode()
    return encode({"sealed": sealed, "request": stored.request, "removed_at": stored.removed_at})


def parse_password(value: bytes) -> StoredPassword:
    """Parse the value of a password's key without opening it; raises `Unreadable`."""
    match decode(value):
        case {"sealed": None, "request": str(request), "removed_at": removed_at} if is_number(
            removed_at
        ):
            return StoredPassword(None, request, removed_at)
        case {"sealed": str(sealed), "request": str(request), "removed_at": None}:
            try:
                return StoredPassword(base64.b64decode(sealed, validate=True), request)
            except ValueError as error:
                raise Unreadable("`sealed` is no base64") from error
        case _:
            raise Unreadable("it does not say `sealed`, `request` and `removed_at`")


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


def render_journal(journal: Journal) -> bytes:
    """Render the value of an import's key."""
    return encode({"done": journal.done, "of": journal.of, "at": journal.at})


def parse_journal(value: bytes) -> Journal:
    """Parse the value of an import's key; raises `Unreadable`."""
    found = decode(value)
    numbers = [found.get(one) for one in ("done", "of", "at")]
    if not all(map(is_number, numbers)):
        raise Unreadable("`done`, `of` and `at` are not three numbers")
    return Journal(found["done"], found["of"], found["at"])


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
    layout.GUARDS: layout.parse_guard,
    layout.PASSWORDS: parse_password,
    layout.POLICIES: parse_policy,
    layout.GRANTS: parse_grant,
    layout.HOSTS: parse_host,
    layout.CERTIFICATES: parse_operator,
    layout.HUBS: parse_hub,
    layout.KNOWN_HUBS: parse_known_hub,
}
