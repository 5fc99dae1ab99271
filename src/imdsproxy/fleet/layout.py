"""Keys and values of a fleet's records in etcd.

Every hub watches all keys below `PREFIX`, and reads each value with one parser (`parse_value`): another program can
write to etcd, a disk can change bytes, and a newer hub may have other values. Large values (user data), and values that
are only compared (claims), have other prefixes. A hub never deletes a record: it writes the removal, so that an absent
key never means a removed record.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, NewType, TypeAlias

from imdsproxy.fleet.codec import (
    ANY_TEXT,
    BYTES,
    COUNT,
    DIGEST,
    ID,
    NUMBER,
    OBJECT,
    TEXT,
    URL,
    Codec,
    Json,
    Kind,
    Unreadable,
    attempt,
    checked,
    decode,
    is_id,
    list_of,
    mapping_of,
    nullable,
    omissible,
    row_of,
    word_of,
)
from imdsproxy.model.entities import InstanceId, IpAddress, NetworkId
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records import Refused
from imdsproxy.model.records.grant import GRANT, Grant

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

ISSUERS: Final = f"{PREFIX}issuer/"
ISSUER: Final = f"{ISSUERS}keys"
"""Keys of the issuer of identity tokens, all in one value, so that they change together."""

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

WITNESSES: Final = 2
"""Number of hosts that must agree before writes stop."""

MOST_CLAIMS: Final = 16
"""Maximum number of stored host claims: more than two have no effect."""

MOST_REGAINED: Final = 500
"""Maximum number of stored lines on restored values; the hubs' logs have all of them."""


# Values


@dataclass(frozen=True, slots=True)
class Meta:
    """Identity of the fleet: a UUID, and a number that an operator raises by accepting a restored backup."""

    fleet: str
    incarnation: int = 1
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class UserData:
    """Reference to user data: SHA-256 in hexadecimal, which is part of the chunks' keys, and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """Instance as etcd stores it. Times are Unix times.

    Attributes:
        hosts: Hosts that serve the instance: two during a move, none after a removal.
        record: Output of `model.records.render_record`, without `user_data`; after a removal only the `project`.
        request: Id of the write, by which a hub recognises a write whose answer was lost.
        left: Hosts that had the instance before, the last `MOST_LEFT`. Only they learn that the instance was removed.
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
    """Network as etcd stores it, in the form of `StoredInstance`."""

    record: Json
    request: str = ""
    removed_at: int | None = None


class HostState(StrEnum):
    INVITED = "invited"
    ENROLLED = "enrolled"
    REVOKED = "revoked"
    UNREADABLE = "unreadable"
    """Never stored: another program wrote the host's value. The host is refused; operators may invite or revoke it."""


@dataclass(frozen=True, slots=True)
class StoredHost:
    """Host as etcd stores it. The newest value has the most `revocations`, then the highest `version`.

    Revocations include new enrolments. After a restore, etcd's revisions do not show this order.

    Attributes:
        serials: Serial numbers of the valid certificates: the host's, and during a renewal also the next one's.
        token_sha256: Digest of the one-time token, hexadecimal; `None` after its use.
        expires_at: End of the token, Unix time.
        trusts: CAs that the host received with its newest certificate, as hubs name them together; empty if unknown.
    """

    state: HostState
    serials: tuple[str, ...] = ()
    token_sha256: str | None = None
    expires_at: int = 0
    trusts: str = ""
    revocations: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True)
class StoredOperator:
    """Operator or hub whose certificates are revoked (Unix time); others have no value."""

    revoked_at: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim of one host, with its highest incarnation, and its `StoredHost.revocations` at the time of the claim."""

    incarnation: int
    revocations: int = 0


@dataclass(frozen=True, slots=True)
class Suspicion:
    """All claims that etcd was restored, with the first evidence.

    `hubs` has the highest incarnation that each claiming hub has seen, `regained` the first `MOST_REGAINED` values that
    hubs restored in etcd, by their owner.
    """

    why: str
    hubs: Mapping[str, int] = field(default_factory=dict)
    hosts: Mapping[HostId, Claim] = field(default_factory=dict)
    regained: Mapping[str, str] = field(default_factory=dict)

    @property
    def refuses(self) -> bool:
        return bool(self.hubs) or len(self.hosts) >= WITNESSES

    @property
    def incarnation(self) -> int:
        """The highest incarnation of all claims; 0 without one."""
        hosts = (claim.incarnation for claim in self.hosts.values())
        return max((*self.hubs.values(), *hosts), default=0)

    def add_hub(self, hub: str, incarnation: int) -> Suspicion:
        highest = max(incarnation, self.hubs.get(hub, 0))
        return replace(self, hubs={**self.hubs, hub: highest})

    def add_host(self, host: HostId, claim: Claim) -> Suspicion:
        """Return the suspicion with a host's claim; of too many claims, those with the highest incarnations stay."""
        claims = sorted({**self.hosts, host: claim}.items(), key=lambda item: -item[1].incarnation)
        return replace(self, hosts=dict(sorted(claims[:MOST_CLAIMS])))

    def regain(self, regained: Mapping[str, str]) -> Suspicion:
        everything = sorted({**self.regained, **regained}.items())
        return replace(self, regained=dict(everything[:MOST_REGAINED]))

    def of_members(self, member: Callable[[HostId], StoredHost | None]) -> Suspicion | None:
        """Return the suspicion without claims of hosts that are no longer members; `None` if no claim is left."""

        def counts(host: HostId, claim: Claim) -> bool:
            stored = member(host)
            return (
                stored is not None
                and stored.state is HostState.ENROLLED
                and stored.revocations == claim.revocations
            )

        hosts = {host: claim for host, claim in self.hosts.items() if counts(host, claim)}
        return replace(self, hosts=hosts) if self.hubs or hosts else None


@dataclass(frozen=True, slots=True)
class Beat:
    """Value of `BEAT`: the number of writes by hubs, and the hub of the last write."""

    count: int
    hub: str


@dataclass(frozen=True, slots=True)
class HubPlace:
    """Value of a key below `HUBS`: the URL at which others reach the hub."""

    url: str


@dataclass(frozen=True, slots=True)
class KnownHub:
    """Value of a key below `KNOWN_HUBS`: the last URL, and the Unix time since which the hub is absent."""

    url: str
    absent_since: int | None = None


@dataclass(frozen=True, slots=True)
class Sealing:
    """Value of `ENVELOPE`: name and fingerprint of the key with which hubs seal secrets."""

    key: str
    sha256: str


@dataclass(frozen=True, slots=True)
class SealedKeys:
    """Value of `TOKEN_KEYS`: data that the hubs' envelope opens."""

    sealed: bytes


@dataclass(frozen=True, slots=True)
class StoredIssuer:
    """Value of `ISSUER`.

    Attributes:
        ring: States of the keys, as `issuer.ring.KeyRing` renders them.
        keys: Public keys by id, as JWKs.
        sealed: Private keys by id; the signers' own key opens them, and the hubs' envelope does not.
        replaced: Number of times that all keys were replaced at once, because a key was stolen.
    """

    ring: Json
    keys: Mapping[str, Json]
    sealed: Mapping[str, str]
    replaced: int = 0


@dataclass(frozen=True, slots=True)
class StoredPassword:
    """Value of a key below `PASSWORDS`. `sealed` is `None` after a clearing, or the removal of the instance."""

    sealed: bytes | None
    request: str = ""
    removed_at: int | None = None


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """Value of a key below `POLICIES`. Hosts check the rules: a newer hub may know more of them."""

    rules: Json


@dataclass(frozen=True, slots=True)
class Journal:
    """Value of a key below `IMPORTS`: the number of stored records of an import, and its start."""

    done: int
    of: int
    at: int


Value: TypeAlias = (
    Meta | Suspicion | Grant | Beat | HubPlace | KnownHub | Sealing | SealedKeys | StoredIssuer | StoredPolicy
    | StoredInstance
    | StoredNetwork | StoredPassword | OperatorOverride | StoredHost | StoredOperator
)  # fmt: skip


# Keys


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
    return f"{GRANTS}{project}"


def password_key(instance: InstanceId) -> str:
    return f"{PASSWORDS}{instance}"


def override_key(instance: InstanceId) -> str:
    return f"{OVERRIDES}{instance}"


def import_key(request: str) -> str:
    return f"{IMPORTS}{request}"


def blob_key(sha256: str, number: int) -> str:
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
        raise Unreadable("the value names no instance")
    return InstanceId(holder)


def host_key(host: HostId) -> str:
    return f"{HOSTS}{host}"


def operator_key(name: str) -> str:
    return f"{CERTIFICATES}{name}"


def read_host(value: bytes, revision: int) -> StoredHost:
    """Parse a host's value, which was written at a revision; an unreadable value gives the state `UNREADABLE`.

    etcd's revision is an upper bound of revocations and writes, so the next write is newer than every earlier value.
    """
    unread = StoredHost(HostState.UNREADABLE, revocations=revision, version=revision)
    return attempt(parse_host, value) or unread


# Parsers


def parse_value(key: str, value: bytes) -> Value:
    """Parse the value of a key below `PREFIX`; raise `Unreadable` if no hub of this version writes the value or key."""
    single = _SINGLE.get(key)
    if single is not None:
        return single(value)
    for prefix, parse in _BELOW.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            if not (is_id(name) or (prefix == POLICIES and _is_scope(name))):
                raise Unreadable("the key has no valid id")
            return parse(value)
    raise Unreadable("no hub of this version writes this key")


def _is_scope(place: str) -> bool:
    scope, _, name = place.partition("/")
    return scope in {"host", "project"} and is_id(name)


def _read_record(value: object) -> Json:
    record: Json = OBJECT.read(value)
    if not _is_project(record.get("project")):
        raise Unreadable("has an invalid `project`")
    return record


def _read_placed(value: object) -> Json:
    record = _read_record(value)
    ports = record.get("ports", [])
    if not (isinstance(ports, list) and all(map(_is_port, ports))):
        raise Unreadable("has invalid `ports`: each port needs a `network`")
    return record


def _is_port(port: object) -> bool:
    match port:
        case {"network": str(network), **rest}:
            return is_id(network) and _is_project(rest.get("project"))
        case _:
            return False


def _is_project(project: object) -> bool:
    return project is None or (isinstance(project, str) and is_id(project))


def _check_password(stored: StoredPassword) -> str | None:
    if (stored.sealed is None) is (stored.removed_at is None):
        return "exactly one of `sealed` and `removed_at` must be present"
    return None


def _read_ring(value: object) -> Json:
    ring: Json = OBJECT.read(value)
    match ring:
        case {"sequence": int(), "keys": [*keys]} if all(map(_is_key, keys)):
            return ring
        case _:
            raise Unreadable("has no `ring` of keys")


def _is_key(entry: object) -> bool:
    match entry:
        case {"id": str(), "state": str(), "since": int()}:
            return True
        case _:
            return False


def _check_issuer(stored: StoredIssuer) -> str | None:
    ids = {one["id"] for one in stored.ring["keys"]}
    return None if ids == stored.keys.keys() == stored.sealed.keys() else "keys are missing"


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
_HOST: Final = Codec(
    StoredHost,
    state=word_of(HostState, HostState.UNREADABLE),
    serials=list_of(ANY_TEXT),
    token_sha256=nullable(ANY_TEXT),
    expires_at=NUMBER,
    trusts=ANY_TEXT,
    revocations=COUNT,
    version=COUNT,
)
_OPERATOR: Final = Codec(StoredOperator, revoked_at=NUMBER)
parse_host, render_host = _HOST.parse, _HOST.render
parse_operator, render_operator = _OPERATOR.parse, _OPERATOR.render


_SUSPICION: Final = Codec(
    Suspicion,
    why=TEXT,
    hubs=mapping_of(ID, NUMBER),
    hosts=mapping_of(ID, row_of(Claim, NUMBER, NUMBER)),
    regained=mapping_of(TEXT, TEXT),
)
parse_suspicion, render_suspicion = _SUSPICION.parse, _SUSPICION.render


_BEAT: Final = Codec(Beat, count=COUNT, hub=ANY_TEXT)
_HUB: Final = Codec(HubPlace, url=URL)
_KNOWN_HUB: Final = Codec(KnownHub, url=URL, absent_since=nullable(NUMBER))
_SEALING: Final = Codec(Sealing, key=ID, sha256=DIGEST)
_SEALED_KEYS: Final = Codec(SealedKeys, sealed=BYTES)
_ISSUER: Final = Codec(
    StoredIssuer,
    _check_issuer,
    ring=Kind(_read_ring),
    keys=mapping_of(ANY_TEXT, OBJECT),
    sealed=mapping_of(ANY_TEXT, ANY_TEXT),
    replaced=COUNT,
)
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
parse_issuer, render_issuer = _ISSUER.parse, _ISSUER.render
parse_password, render_password = _PASSWORD.parse, _PASSWORD.render
parse_journal, render_journal = _JOURNAL.parse, _JOURNAL.render


def is_cleared(value: bytes) -> bool:
    """Return whether a password was cleared, or removed with its instance; false if the value is unreadable."""
    stored = attempt(parse_password, value)
    return stored is not None and stored.sealed is None


def parse_policy(value: bytes) -> StoredPolicy:
    removal_time(value)
    return StoredPolicy(decode(value))


def parse_grant(value: bytes) -> Grant:
    grant = GRANT.read(decode(value))
    if isinstance(grant, Refused):
        raise Unreadable("; ".join(map(str, grant.problems)))
    return grant


_SINGLE: Final[dict[str, Callable[[bytes], Value]]] = {
    META: parse_meta,
    BEAT: parse_beat,
    SUSPECT: parse_suspicion,
    ENVELOPE: parse_sealing,
    TOKEN_KEYS: parse_sealed_keys,
    ISSUER: parse_issuer,
    f"{POLICIES}fleet": parse_policy,
}
_BELOW: Final[dict[str, Callable[[bytes], Value]]] = {
    INSTANCES: parse_instance,
    NETWORKS: parse_network,
    OVERRIDES: parse_override,
    PASSWORDS: parse_password,
    POLICIES: parse_policy,
    GRANTS: parse_grant,
    HOSTS: parse_host,
    CERTIFICATES: parse_operator,
    HUBS: parse_hub,
    KNOWN_HUBS: parse_known_hub,
}
