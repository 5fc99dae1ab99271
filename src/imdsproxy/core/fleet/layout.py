"""Where records of a fleet are in etcd, and how their values are written.

Everything below `PREFIX` is followed by every hub. What is large or only compared (user data, claims) is elsewhere.
A record is never deleted: its removal is written, so that a key that is absent never means one that was removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, NewType, TypeAlias, cast

from imdsproxy.core.model import ID_PATTERN, InstanceId, IpAddress, NetworkId
from imdsproxy.core.policy import OperatorOverride

HostId = NewType("HostId", str)
"""A host's name in the fleet, as `model.ID_PATTERN`; the common name of its certificate."""

PREFIX: Final = "/imds/1/"
BLOBS: Final = "/imds/blob/"
BLOB_USES: Final = "/imds/use/"
CLAIMS: Final = "/imds/claim/"
IMPORTS: Final = "/imds/import/"

META: Final = f"{PREFIX}meta"
BEAT: Final = f"{PREFIX}beat"
SUSPECT: Final = f"{PREFIX}suspect"
"""Claims that etcd was restored from a backup (`core.fleet.suspicion`)."""

ENVELOPE: Final = f"{PREFIX}envelope"
"""Which of their keys hubs seal secrets with; without it the first in their file."""

NETWORKS: Final = f"{PREFIX}net/"
INSTANCES: Final = f"{PREFIX}inst/"
POLICIES: Final = f"{PREFIX}pol/"
"""Followed by `fleet`, `host/ID` or `project/ID`; rules as `core.records.network.POLICY` has them."""

GRANTS: Final = f"{PREFIX}grant/"
"""Followed by a project; what its operators may use, as `core.records.grant.GRANT` has it."""

GUARDS: Final = f"{PREFIX}guard/"
PASSWORDS: Final = f"{PREFIX}pass/"
"""Followed by an instance: the password that its guest posted, sealed."""

TOKEN_KEYS: Final = f"{PREFIX}key/tokens"
"""All keys of session tokens in one value, so that they change together."""

HOSTS: Final = f"{PREFIX}host/"
CERTIFICATES: Final = f"{PREFIX}cert/"
HUBS: Final = f"{PREFIX}live/"
"""Followed by the name of a hub that runs; with a lease."""

KNOWN_HUBS: Final = f"{PREFIX}hub/"
"""Followed by the name of a hub, whether it runs or not."""

CHUNK_BYTES: Final = 256 * 1024
"""Of user data in one key: a request to etcd has at most 1.5 MiB."""

MOST_LEFT: Final = 32
ANYWHERE: Final = HostId("*")
"""In `StoredInstance.left`: the record before could not be read, so any host may have had the instance."""

FORMAT: Final = 1
"""Raise it when values mean something else: a hub that does not know it refuses to start."""

ID_SHAPE: Final = ID_PATTERN.removeprefix("^").removesuffix("$")
"""`ID_PATTERN` as a part of a longer expression."""

MOST_NUMBER: Final = 2**63 - 1
"""Largest number that etcd, SQLite and HAProxy take."""

MOST_TEXT: Final = 1000
"""Characters of a text that a machine of the fleet reports."""

_ID: Final = re.compile(ID_PATTERN)

Json: TypeAlias = dict[str, Any]

View: TypeAlias = Callable[[str], tuple[bytes, int] | None]
"""A key's value and the revision that wrote it; `None` for an absent key. Claims may be unknown."""


SHA256: Final = re.compile("[0-9a-f]{64}")
"""Hexadecimal, in lower case."""


class Unreadable(ValueError):
    """A value is not what hubs write: another program wrote it. It is never taken for one that is absent."""


@dataclass(frozen=True, slots=True)
class Meta:
    """The fleet.

    Attributes:
        fleet: A UUID, made with the fleet.
        incarnation: One more each time that an operator accepts a restored backup.
    """

    fleet: str
    incarnation: int = 1
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class UserData:
    """Where an instance's user data is.

    Attributes:
        sha256: Of the bytes, hexadecimal; names the chunks.
        size: In bytes.
    """

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """An instance as it is stored.

    Attributes:
        hosts: Where it is served; two while it moves, none when it was removed.
        record: As `core.records.render_record`, without `user_data`; when it was removed only its `project`.
        request: Names the write, so that one whose answer was lost is recognised.
        removed_at: Unix time of the removal.
        left: Hosts where it was before, the last `MOST_LEFT`: they may be answered that it went. To another host that
            asks for it nothing is answered of it.
    """

    hosts: tuple[HostId, ...]
    record: Json
    user_data: UserData | None = None
    request: str = ""
    removed_at: int | None = None
    left: tuple[HostId, ...] = ()

    def leaves(self, hosts: Collection[HostId]) -> tuple[HostId, ...]:
        """`left` of what places it on these hosts."""
        before = dict.fromkeys((*self.left, *self.hosts))
        return tuple(one for one in before if one not in hosts)[-MOST_LEFT:]


@dataclass(frozen=True, slots=True)
class StoredNetwork:
    """A network as it is stored.

    Attributes:
        record: As `core.records.render_record`; when it was removed only its `project`.
        request: As `StoredInstance.request`.
        removed_at: Unix time of the removal.
    """

    record: Json
    request: str = ""
    removed_at: int | None = None


def is_id(text: str) -> bool:
    """Whether a text may be the id of a host or a project."""
    return _ID.fullmatch(text) is not None


def is_number(value: object) -> bool:
    """Whether a JSON value is a whole number from 0 to `MOST_NUMBER`."""
    return type(value) is int and 0 <= value <= MOST_NUMBER


def is_count(value: object) -> bool:
    """Whether a JSON value is a number to which hubs add: far below `MOST_NUMBER`, so that no sum is unreadable."""
    return is_number(value) and cast("int", value) <= MOST_NUMBER // 2


def plain(text: str, most: int = MOST_TEXT) -> str:
    """Make a text of another machine fit to store and show: printable, one line, cut after `most` characters."""
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return cut if cut.isprintable() else "".join(one if one.isprintable() else "?" for one in cut)


def network_key(network: NetworkId) -> str:
    """Of a network's record."""
    return f"{NETWORKS}{network}"


def instance_key(instance: InstanceId) -> str:
    """Of an instance's record."""
    return f"{INSTANCES}{instance}"


def claims_in(network: NetworkId) -> str:
    """What the claims of a network begin with; while there is one, the network cannot be removed."""
    return f"{CLAIMS}{network}/"


def address_claim(network: NetworkId, address: IpAddress) -> str:
    """Whose value is the instance that has the address there; a MAC is claimed as its link-local address."""
    return f"{CLAIMS}{network}/addr/{address}"


def port_claim(network: NetworkId, instance: InstanceId) -> str:
    """Of an instance with a port there that has neither MAC nor address."""
    return f"{CLAIMS}{network}/port/{instance}"


def grant_key(project: str) -> str:
    """Of what a project's operators may use."""
    return f"{GRANTS}{project}"


def password_key(instance: InstanceId) -> str:
    """Of the password that an instance's guest posted."""
    return f"{PASSWORDS}{instance}"


def guard_key(instance: InstanceId) -> str:
    """Of what operators did about an instance."""
    return f"{GUARDS}{instance}"


def import_key(request: str) -> str:
    """Of an import that is under way, or was broken off."""
    return f"{IMPORTS}{request}"


def blob_key(sha256: str, number: int) -> str:
    """Of one chunk of user data."""
    return f"{BLOBS}{sha256}/{number:02}"


def blob_use_key(sha256: str) -> str:
    """Written with each record that begins to have this user data, so that no hub removes it at the same time."""
    return f"{BLOB_USES}{sha256}"


def encode(value: Json) -> bytes:
    """A value as it is written."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def decode(value: bytes) -> Json:
    """The reverse of `encode`; `Unreadable` where it is no JSON object."""
    try:
        found = json.loads(value.decode())
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise Unreadable("it is no object")
    return cast("Json", found)


def render_meta(meta: Meta) -> bytes:
    """The value of `META`."""
    return encode({"fleet": meta.fleet, "incarnation": meta.incarnation, "format": meta.format})


def parse_meta(value: bytes) -> Meta:
    """The reverse of `render_meta`; raises `Unreadable`."""
    match decode(value):
        case {"fleet": str(fleet), "incarnation": incarnation, "format": form} if (
            is_id(fleet) and is_number(incarnation) and is_number(form)
        ):
            return Meta(fleet, incarnation, form)
        case _:
            raise Unreadable("`fleet`, `incarnation` and `format` are not an id and two numbers")


def render_instance(stored: StoredInstance) -> bytes:
    """The value of an instance's key."""
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
    """The reverse of `render_instance`; raises `Unreadable`. The record itself is not checked."""
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
    """The value of a network's key."""
    return encode(
        {"record": stored.record, "request": stored.request, "removed_at": stored.removed_at}
    )


def parse_network(value: bytes) -> StoredNetwork:
    """The reverse of `render_network`; raises `Unreadable`. The record itself is not checked."""
    found = decode(value)
    return StoredNetwork(_record(found), _request(found), _removed(found))


def render_guard(override: OperatorOverride) -> bytes:
    """The value of a guard's key."""
    return encode({"epoch": override.epoch, "reopened_at": override.reopened_at})


def parse_guard(value: bytes) -> OperatorOverride:
    """The reverse of `render_guard`; raises `Unreadable`."""
    match decode(value):
        case {"epoch": epoch, "reopened_at": at} if is_number(epoch) and is_number(at):
            return OperatorOverride(epoch, at)
        case _:
            raise Unreadable("`epoch` and `reopened_at` are not two numbers")


def removal_time(value: bytes) -> int | None:
    """When a record was removed, Unix time; `None` where it was not."""
    # Of hundreds of thousands next to none is one.
    if b'"removed_at":null' in value or b'"removed_at"' not in value:
        return None
    return _removed(decode(value))


def parse_claim(value: bytes) -> InstanceId:
    """Parse who holds a claim; raises `Unreadable`."""
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
