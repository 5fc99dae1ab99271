"""Which hosts and operators a fleet accepts, as it is in etcd; what becomes of it when one joins, renews or is revoked.

Pure: a hub writes the new value where the old one is still there.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final

from imdsproxy.core.fleet.identity import OPERATOR_ROLES, Identity, Role
from imdsproxy.core.fleet.layout import (
    CERTIFICATES,
    HOSTS,
    HostId,
    Unreadable,
    decode,
    encode,
    is_count,
    is_number,
)
from imdsproxy.errors import AccessDenied, NotFound

_AGAIN: Final = "`imdsproxy fleet enrol HOST` makes a new one"


class HostState(StrEnum):
    """Where a host is on its way."""

    INVITED = "invited"
    ENROLLED = "enrolled"
    REVOKED = "revoked"
    UNREADABLE = "unreadable"
    """Never stored: another program wrote the host's value. The host is not admitted, and may be invited or revoked."""


_STORED: Final = frozenset(HostState) - {HostState.UNREADABLE}


@dataclass(frozen=True, slots=True)
class StoredHost:
    """A host as it is stored.

    Attributes:
        serials: Of the certificates that are good: the host's, and while it renews that, the next one.
        token_sha256: Of the one-time token, hexadecimal, until it is used.
        expires_at: When the token ends, Unix time.
        trusts: Which CAs it was given with its newest certificate, as hubs name all of them; empty where that was not
            noted.
        revocations: How often the host was revoked, or enrolled again.
        version: How often the value was written. Of two values, the one with more revocations is newer, then the one
            with the higher version: etcd's revisions say nothing of that after a restore.
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
    """An operator, or a hub, whose certificates are not good any more; others have no value.

    Attributes:
        revoked_at: Unix time.
    """

    revoked_at: int


def host_key(host: HostId) -> str:
    """Of `StoredHost`."""
    return f"{HOSTS}{host}"


def operator_key(name: str) -> str:
    """Of `StoredOperator`."""
    return f"{CERTIFICATES}{name}"


def render_host(stored: StoredHost) -> bytes:
    """The value of a host's key."""
    return encode(
        {
            "state": stored.state.value,
            "serials": list(stored.serials),
            "token_sha256": stored.token_sha256,
            "expires_at": stored.expires_at,
            "trusts": stored.trusts,
            "revocations": stored.revocations,
            "version": stored.version,
        }
    )


def parse_host(value: bytes) -> StoredHost:
    """The reverse of `render_host`; raises `Unreadable`."""
    match decode(value):
        case {
            "state": str(state),
            "serials": list(serials),
            "token_sha256": (str() | None) as token,
            "expires_at": expires,
            "trusts": str(trusts),
            "revocations": revocations,
            "version": version,
        } if (
            state in _STORED
            and all(isinstance(one, str) for one in serials)
            and is_number(expires)
            and is_count(revocations)
            and is_count(version)
        ):
            return StoredHost(
                HostState(state), tuple(serials), token, expires, trusts, revocations, version
            )
        case _:
            raise Unreadable("it has not all fields of a host")


def read_host(value: bytes, revision: int) -> StoredHost:
    """Parse the value of a host's key that was written at a revision.

    One that cannot be read is a host in the state `UNREADABLE`. It was revoked and written no more often than etcd has
    revisions, so whatever is written over it is newer than all that was known of the host.
    """
    try:
        return parse_host(value)
    except Unreadable:
        return StoredHost(HostState.UNREADABLE, revocations=revision, version=revision)


def render_operator(stored: StoredOperator) -> bytes:
    """The value of an operator's key."""
    return encode({"revoked_at": stored.revoked_at})


def parse_operator(value: bytes) -> StoredOperator:
    """Parse the value of an operator's key; raises `Unreadable`."""
    match decode(value):
        case {"revoked_at": revoked_at} if is_number(revoked_at):
            return StoredOperator(revoked_at)
        case _:
            raise Unreadable("`revoked_at` is no time")


def hash_token(token: str) -> str:
    """As `StoredHost.token_sha256`."""
    return sha256(token.encode()).hexdigest()


def plan_invitation(stored: StoredHost | None, token: str, expires_at: int) -> StoredHost:
    """A new token, in the place of one before; a host that is enrolled goes on until it joins with it."""
    before = stored or StoredHost(HostState.INVITED)
    enrolled = before.state is HostState.ENROLLED
    return _next(
        before,
        state=before.state if enrolled else HostState.INVITED,
        token_sha256=hash_token(token),
        expires_at=expires_at,
    )


def plan_enrolment(
    stored: StoredHost | None, token: str, serial: str, now: float, trusts: str = ""
) -> StoredHost:
    """A host joins: the token is used up, and only the new certificate is good.

    Certificates from before are revoked by that: a journal that has a later renewal of them does not bring them back.

    Raises:
        AccessDenied: The token is not the host's, was used, or has ended.
    """
    # Compared also where there is none, so that the time shows nothing.
    wanted = "" if stored is None or stored.token_sha256 is None else stored.token_sha256
    if not hmac.compare_digest(wanted.encode(), hash_token(token).encode()):
        raise AccessDenied("the token is not this host's, or was used already", hint=_AGAIN)
    if stored is None or now >= stored.expires_at:
        raise AccessDenied("the token has ended", hint=_AGAIN)
    return _next(
        stored,
        state=HostState.ENROLLED,
        serials=(serial,),
        revocations=stored.revocations + bool(stored.serials),
        token_sha256=None,
        expires_at=0,
        trusts=trusts,
    )


def plan_renewal(
    stored: StoredHost | None, presented: str, serial: str, trusts: str = ""
) -> StoredHost:
    """A host renews its certificate: the one that it has shown stays good beside the new one, and no other.

    Raises:
        AccessDenied: The certificate that it has shown is not good.
    """
    if stored is None or not admits_host(stored, presented):
        raise AccessDenied("this certificate is revoked, or another has replaced it", hint=_AGAIN)
    return _next(stored, serials=(presented, serial), trusts=trusts)


def plan_revocation(host: HostId, stored: StoredHost | None) -> StoredHost:
    """No certificate and no token of the host is good any more; `NotFound` where the fleet has none of that name."""
    if stored is None:
        raise NotFound(f"the fleet has no host {host}", hint="imdsproxy fleet hosts")
    return StoredHost(
        HostState.REVOKED, revocations=stored.revocations + 1, version=stored.version + 1
    )


def _next(stored: StoredHost, **changes: Any) -> StoredHost:  # noqa: ANN401 - as of `replace`
    return replace(stored, version=stored.version + 1, **changes)


def admits_host(stored: StoredHost | None, serial: str) -> bool:
    """Whether a host's verified certificate of that number is good now."""
    if stored is None or stored.state is not HostState.ENROLLED:
        return False
    return serial in stored.serials


def admits_operator(identity: Identity, revoked: bytes | None) -> bool:
    """Whether the verified certificate of an operator or a hub is good now.

    Args:
        identity: Whose it is.
        revoked: The value of `operator_key`; `None` where there is none.
    """
    return revoked is None and (identity.role in OPERATOR_ROLES or identity.role is Role.HUB)
