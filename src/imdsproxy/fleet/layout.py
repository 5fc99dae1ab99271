"""Keys of a fleet's records in etcd, and the encoding of their values.

Every hub watches all keys below `PREFIX`. Large values (user data), and values that are only compared (claims), have
other prefixes. A hub never deletes a record: it writes the removal, so that an absent key never means a removed record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, NewType, TypeAlias, cast

from imdsproxy.model.entities import ID_PATTERN, InstanceId, IpAddress, NetworkId
from imdsproxy.model.policy import OperatorOverride

HostId = NewType("HostId", str)
"""Name of a host in the fleet, as `model.ID_PATTERN`; the common name of its certificate."""

PREFIX: Final = "/imds/1/"
BLOBS: Final = "/imds/blob/"
BLOB_USES: Final = "/imds/use/"
CLAIMS: Final = "/imds/claim/"
IMPORTS: Final = "/imds/import/"

META: Final = f"{PREFIX}meta"
BEAT: Final = f"{PREFIX}beat"
SUSPECT: Final = f"{PREFIX}suspect"
"""Claims that etcd was restored from a backup (`fleet.suspicion`)."""

ENVELOPE: Final = f"{PREFIX}envelope"
"""Names the key with which hubs seal secrets; if absent, hubs use the first key in their file."""

NETWORKS: Final = f"{PREFIX}net/"
INSTANCES: Final = f"{PREFIX}inst/"
POLICIES: Final = f"{PREFIX}pol/"
"""Prefix of `fleet`, `host/ID` or `project/ID`; rules as `model.records.network.POLICY` encodes them."""

GRANTS: Final = f"{PREFIX}grant/"
"""Prefix of a project: resources that its operators may use, as `model.records.grant.GRANT` encodes them."""

GUARDS: Final = f"{PREFIX}guard/"
PASSWORDS: Final = f"{PREFIX}pass/"
"""Prefix of an instance: the sealed password that its guest posted."""

TOKEN_KEYS: Final = f"{PREFIX}key/tokens"
"""All keys of session tokens in one value, so that they change together."""

HOSTS: Final = f"{PREFIX}host/"
CERTIFICATES: Final = f"{PREFIX}cert/"
HUBS: Final = f"{PREFIX}live/"
"""Prefix of the name of a running hub; each key has a lease."""

KNOWN_HUBS: Final = f"{PREFIX}hub/"
"""Prefix of the name of a hub, running or not."""

CHUNK_BYTES: Final = 256 * 1024
"""Bytes of user data in one key: a request to etcd has at most 1.5 MiB."""

MOST_LEFT: Final = 32
ANYWHERE: Final = HostId("*")
"""In `StoredInstance.left`: the previous record was unreadable, so any host may have had the instance."""

FORMAT: Final = 1
"""Raise it when values change their meaning: a hub refuses to start with a format that it does not know."""

ID_SHAPE: Final = ID_PATTERN.removeprefix("^").removesuffix("$")
"""`ID_PATTERN` as a part of a longer expression."""

MOST_NUMBER: Final = 2**63 - 1
"""Largest number that etcd, SQLite and HAProxy take."""

MOST_TEXT: Final = 1000
"""Maximum characters of a text that a machine of the fleet reports."""

_ID: Final = re.compile(ID_PATTERN)

Json: TypeAlias = dict[str, Any]

View: TypeAlias = Callable[[str], tuple[bytes, int] | None]
"""Lookup of a key's value and the revision that wrote it; `None` for an absent key. Claims may be unknown."""


SHA256: Final = re.compile("[0-9a-f]{64}")
"""Hexadecimal, in lower case."""


class Unreadable(ValueError):
    """Value that another program than a hub wrote. Hubs never treat it as absent."""


@dataclass(frozen=True, slots=True)
class Meta:
    """Identity of the fleet.

    Attributes:
        fleet: UUID, made with the fleet.
        incarnation: Number that an operator raises by accepting a restored backup.
    """

    fleet: str
    incarnation: int = 1
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class UserData:
    """Reference to an instance's user data.

    Attributes:
        sha256: Digest of the bytes, hexadecimal; part of the chunks' keys.
        size: In bytes.
    """

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """Instance as etcd stores it.

    Attributes:
        hosts: Hosts that serve the instance: two during a move, none after a removal.
        record: Output of `model.records.render_record`, without `user_data`; after a removal only the `project`.
        request: Id of the write; a hub recognises by it a write whose answer was lost.
        removed_at: Unix time of the removal.
        left: Hosts that had the instance before, the last `MOST_LEFT`. Only these hosts may learn that the instance was
            removed; other hosts get no answer about it.
    """

    hosts: tuple[HostId, ...]
    record: Json
    user_data: UserData | None = None
    request: str = ""
    removed_at: int | None = None
    left: tuple[HostId, ...] = ()

    def leaves(self, hosts: Collection[HostId]) -> tuple[HostId, ...]:
        """Return the `left` of a record that places the instance on these hosts."""
        before = dict.fromkeys((*self.left, *self.hosts))
        return tuple(one for one in before if one not in hosts)[-MOST_LEFT:]


@dataclass(frozen=True, slots=True)
class StoredNetwork:
    """Network as etcd stores it.

    Attributes:
        record: Output of `model.records.render_record`; after a removal only the `project`.
        request: As `StoredInstance.request`.
        removed_at: Unix time of the removal.
    """

    record: Json
    request: str = ""
    removed_at: int | None = None


def is_id(text: str) -> bool:
    """Return whether a text may be the id of a host or a project."""
    return _ID.fullmatch(text) is not None


def is_number(value: object) -> bool:
    """Return whether a JSON value is a whole number from 0 to `MOST_NUMBER`."""
    return type(value) is int and 0 <= value <= MOST_NUMBER


def is_count(value: object) -> bool:
    """Return whether a JSON value is a counter: far below `MOST_NUMBER`, so that no sum exceeds it."""
    return is_number(value) and cast("int", value) <= MOST_NUMBER // 2


def plain(text: str, most: int = MOST_TEXT) -> str:
    """Make a text of another machine fit to store and show: printable, one line, cut after `most` characters."""
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return cut if cut.isprintable() else "".join(one if one.isprintable() else "?" for one in cut)


def network_key(network: NetworkId) -> str:
    return f"{NETWORKS}{network}"


def instance_key(instance: InstanceId) -> str:
    return f"{INSTANCES}{instance}"


def claims_in(network: NetworkId) -> str:
    """Return the prefix of a network's claims; while a claim exists, the network cannot be removed."""
    return f"{CLAIMS}{network}/"


def address_claim(network: NetworkId, address: IpAddress) -> str:
    """Return the key whose value is the owner of an address; a MAC is claimed as its link-local address."""
    return f"{CLAIMS}{network}/addr/{address}"


def port_claim(network: NetworkId, instance: InstanceId) -> str:
    """Return the key that claims a network for an instance's port without MAC and address."""
    return f"{CLAIMS}{network}/port/{instance}"


def grant_key(project: str) -> str:
    """Return the key of a project's grant."""
    return f"{GRANTS}{project}"


def password_key(instance: InstanceId) -> str:
    """Return the key of the password that an instance's guest posted."""
    return f"{PASSWORDS}{instance}"


def guard_key(instance: InstanceId) -> str:
    """Return the key of an instance's operator override."""
    return f"{GUARDS}{instance}"


def import_key(request: str) -> str:
    """Return the key of an unfinished import."""
    return f"{IMPORTS}{request}"


def blob_key(sha256: str, number: int) -> str:
    """Return the key of one chunk of user data."""
    return f"{BLOBS}{sha256}/{number:02}"


def blob_use_key(sha256: str) -> str:
    """Return the key that each record starting to use this user data also writes: no hub removes the data meanwhile."""
    return f"{BLOB_USES}{sha256}"


def encode(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def decode(value: bytes) -> Json:
    """Parse a value as a JSON object; raises `Unreadable`."""
    try:
        found = json.loads(value.decode())
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Unreadable("it is no object")
    return cast("Json", found)


def render_meta(meta: Meta) -> bytes:
    """Render the value of `META`."""
    return encode({"fleet": meta.fleet, "incarnation": meta.incarnation, "format": meta.format})


def parse_meta(value: bytes) -> Meta:
    """Parse the value of `META`; raises `Unreadable`."""
    match decode(value):
        case {"fleet": str(fleet), "incarnation": incarnation, "format": form} if (
            is_id(fleet) and is_number(incarnation) and is_number(form)
        ):
            return Meta(fleet, incarnation, form)
        case _:
            raise Unreadable("`fleet`, `incarnation` and `format` are not an id and two numbers")


def render_instance(stored: StoredInstance) -> bytes:
    """Render the value of an instance's key."""
    data = stored.user_data
    return encode(
        {
            "hosts": list(stored.hosts),
            "record": stored.record,
            "user_data": data and {"sha256": data.sha256, "size": data.size},
            "request": stored.request,
            "removed_at": stored.removed_at,
            "left": list(stored.left),
        }
    )


def parse_instance(value: bytes) -> StoredInstance:
    """Parse the value of an instance's key, without checking the record; raises `Unreadable`."""
    found = decode(value)
    data, record = found.get("user_data"), _record(found)
    ports = record.get("ports", [])
    if not (isinstance(ports, list) and all(map(_is_port, ports))):
        raise Unreadable("`ports` is no list of objects with a network")
    return StoredInstance(
        _names(found, "hosts"),
        record,
        None if data is None else _parse_user_data(data),
        _request(found),
        _removed(found),
        _names(found, "left") if "left" in found else (),
    )


def render_network(stored: StoredNetwork) -> bytes:
    """Render the value of a network's key."""
    return encode(
        {"record": stored.record, "request": stored.request, "removed_at": stored.removed_at}
    )


def parse_network(value: bytes) -> StoredNetwork:
    """Parse the value of a network's key, without checking the record; raises `Unreadable`."""
    found = decode(value)
    return StoredNetwork(_record(found), _request(found), _removed(found))


def render_guard(override: OperatorOverride) -> bytes:
    """Render the value of an override's key."""
    return encode({"epoch": override.epoch, "reopened_at": override.reopened_at})


def parse_guard(value: bytes) -> OperatorOverride:
    """Parse the value of an override's key; raises `Unreadable`."""
    match decode(value):
        case {"epoch": epoch, "reopened_at": at} if is_number(epoch) and is_number(at):
            return OperatorOverride(epoch, at)
        case _:
            raise Unreadable("`epoch` and `reopened_at` are not two numbers")


def removal_time(value: bytes) -> int | None:
    """Return the removal time of a record, Unix time; `None` if it was not removed."""
    # Almost none of hundreds of thousands of records is a removal: avoid decoding.
    if b'"removed_at":null' in value or b'"removed_at"' not in value:
        return None
    return _removed(decode(value))


def parse_claim(value: bytes) -> InstanceId:
    """Parse the owner of a claim; raises `Unreadable`."""
    holder = value.decode(errors="replace")
    if not is_id(holder):
        raise Unreadable("it names no instance")
    return InstanceId(holder)


def _names(found: Json, field: str) -> tuple[HostId, ...]:
    names = found.get(field)
    if not (isinstance(names, list) and all(map(_is_host, names))):
        raise Unreadable(f"`{field}` is no list of names")
    return tuple(HostId(one) for one in names)


def _is_host(name: object) -> bool:
    return isinstance(name, str) and (is_id(name) or name == ANYWHERE)


def _is_port(port: object) -> bool:
    match port:
        case {"network": str(network), **rest}:
            return is_id(network) and _is_project(rest.get("project"))
        case _:
            return False


def _is_project(project: object) -> bool:
    return project is None or (isinstance(project, str) and is_id(project))


def _record(found: Json) -> Json:
    record = found.get("record")
    if not isinstance(record, dict):
        raise Unreadable("`record` is no object")
    if not _is_project(record.get("project")):
        raise Unreadable("`project` is no id")
    return cast("Json", record)


def _request(found: Json) -> str:
    request = found.get("request", "")
    if not isinstance(request, str):
        raise Unreadable("`request` is no text")
    return request


def _removed(found: Json) -> int | None:
    removed = found.get("removed_at")
    if removed is None or is_number(removed):
        return cast("int | None", removed)
    raise Unreadable("`removed_at` is no time")


def _parse_user_data(value: object) -> UserData:
    match value:
        case {"sha256": str(sha256), "size": size} if SHA256.fullmatch(sha256) and is_number(size):
            return UserData(sha256, size)
        case _:
            raise Unreadable("`user_data` does not say `sha256` and `size`")
