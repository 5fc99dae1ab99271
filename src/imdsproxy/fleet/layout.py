"""Keys of a fleet's records in etcd, and the form of their values.

Every hub watches all keys below `PREFIX`. Large values (user data), and values that are only compared (claims), have
other prefixes. A hub never deletes a record: it writes the removal, so that an absent key never means a removed record.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, NewType, TypeAlias

from imdsproxy.fleet.codec import (
    ANY_TEXT,
    DIGEST,
    ID,
    NUMBER,
    OBJECT,
    Codec,
    Json,
    Kind,
    Unreadable,
    checked,
    decode,
    is_id,
    list_of,
    nullable,
    omissible,
)
from imdsproxy.model.entities import InstanceId, IpAddress, NetworkId
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
"""Claims that etcd was restored from a backup (`fleet.restores`)."""

ENVELOPE: Final = f"{PREFIX}envelope"
"""Names the key with which hubs seal secrets; if absent, hubs use the first key in their file."""

NETWORKS: Final = f"{PREFIX}net/"
INSTANCES: Final = f"{PREFIX}inst/"
POLICIES: Final = f"{PREFIX}pol/"
"""Prefix of `fleet`, `host/ID` or `project/ID`; rules as `model.records.network.POLICY` encodes them."""

GRANTS: Final = f"{PREFIX}grant/"
"""Prefix of a project: resources that its operators may use, as `model.records.grant.GRANT` encodes them."""

OVERRIDES: Final = f"{PREFIX}override/"
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

View: TypeAlias = Callable[[str], tuple[bytes, int] | None]
"""Lookup of a key's value and the revision that wrote it; `None` for an absent key. Claims may be unknown."""


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


def override_key(instance: InstanceId) -> str:
    """Return the key of an instance's operator override."""
    return f"{OVERRIDES}{instance}"


def import_key(request: str) -> str:
    """Return the key of an unfinished import."""
    return f"{IMPORTS}{request}"


def blob_key(sha256: str, number: int) -> str:
    """Return the key of one chunk of user data."""
    return f"{BLOBS}{sha256}/{number:02}"


def blob_use_key(sha256: str) -> str:
    """Return the key that each record starting to use this user data also writes: no hub removes the data meanwhile."""
    return f"{BLOB_USES}{sha256}"


def removal_time(value: bytes) -> int | None:
    """Return the removal time of a record, Unix time; `None` if it was not removed."""
    # Almost none of hundreds of thousands of records is a removal: avoid decoding.
    if b'"removed_at":null' in value or b'"removed_at"' not in value:
        return None
    removed: int | None = _REMOVED.read(decode(value).get("removed_at"))
    return removed


def parse_claim(value: bytes) -> InstanceId:
    """Parse the owner of a claim; raises `Unreadable`."""
    holder = value.decode(errors="replace")
    if not is_id(holder):
        raise Unreadable("it names no instance")
    return InstanceId(holder)


def _read_record(value: object) -> Json:
    record: Json = OBJECT.read(value)
    if not _is_project(record.get("project")):
        raise Unreadable("has a `project` that is no id")
    return record


def _read_placed(value: object) -> Json:
    record = _read_record(value)
    ports = record.get("ports", [])
    if not (isinstance(ports, list) and all(map(_is_port, ports))):
        raise Unreadable("has `ports` that are no list of objects with a network")
    return record


def _is_port(port: object) -> bool:
    match port:
        case {"network": str(network), **rest}:
            return is_id(network) and _is_project(rest.get("project"))
        case _:
            return False


def _is_project(project: object) -> bool:
    return project is None or (isinstance(project, str) and is_id(project))


_HOSTS: Final = list_of(
    checked(lambda one: isinstance(one, str) and (is_id(one) or one == ANYWHERE), "host")
)
_REMOVED: Final = omissible(nullable(NUMBER))

_META: Final = Codec(Meta, fleet=ID, incarnation=NUMBER, format=NUMBER)
_OVERRIDE: Final = Codec(OperatorOverride, epoch=NUMBER, reopened_at=NUMBER)
_NETWORK: Final = Codec(
    StoredNetwork,
    record=Kind(_read_record),
    request=omissible(ANY_TEXT),
    removed_at=_REMOVED,
)
_INSTANCE: Final = Codec(
    StoredInstance,
    hosts=_HOSTS,
    record=Kind(_read_placed),
    user_data=omissible(nullable(Codec(UserData, sha256=DIGEST, size=NUMBER).kind)),
    request=omissible(ANY_TEXT),
    removed_at=_REMOVED,
    left=omissible(_HOSTS),
)
"""Without a check of the record itself."""

parse_meta, render_meta = _META.parse, _META.render
parse_override, render_override = _OVERRIDE.parse, _OVERRIDE.render
parse_network, render_network = _NETWORK.parse, _NETWORK.render
parse_instance, render_instance = _INSTANCE.parse, _INSTANCE.render
