"""Members of a fleet: roles, identities, invitations, and changes of memberships. Pure.

The plans for enrolment, renewal and revocation return a new value. A hub writes the value only if the old value is
unchanged.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final

from imdsproxy.errors import AccessDenied, NotFound
from imdsproxy.fleet.layout import HostId, HostState, StoredHost
from imdsproxy.model.entities import ID_PATTERN

ENROL_PATH: Final = "/fleet/enrol"
RENEW_PATH: Final = "/fleet/renew"
LEAVE_PATH: Final = "/fleet/leave"
PASSWORD_PATH: Final = "/fleet/password"  # noqa: S105 - a path
IDENTITY_PATH: Final = "/fleet/identity"
"""Identity tokens for guests of the calling host."""

IDENTITY_DOCUMENT_PATH: Final = "/fleet/identity-document"
"""Signed document about a guest of the calling host."""

ISSUER_PATH: Final = "/fleet/issuer"
"""Prefix of the issuer's documents, on the address of the issuer only."""

AUTHORITY_PATH: Final = "/fleet/ca"
"""The fleet's CA certificate in PEM: a client compares it with its fingerprint."""

HEADER_ROLE: Final = "x-imdsproxy-role"
HEADER_NAME: Final = "x-imdsproxy-name"
HEADER_SERIAL: Final = "x-imdsproxy-serial"
HEADER_SCOPE: Final = "x-imdsproxy-scope"
HEADER_PEER: Final = "x-imdsproxy-peer"
"""Address of the client; the other headers come from its verified certificate. HAProxy removes headers with these names
from a client's request.
"""

LIBRARY_HINT: Final = "apt install python3-cryptography, or pip install 'imdsproxy[fleet]'"
"""Hint if the library for keys and certificates is missing."""

SHORTEST_INVITATION_S: Final = 60
LONGEST_INVITATION_S: Final = 30 * 24 * 3600
"""Bounds of an invitation's lifetime."""

_NAME: Final = re.compile(ID_PATTERN)
_PREFIX: Final = "imdsproxy-join-1."
_FINGERPRINT: Final = re.compile("[0-9a-f]{64}")


class Role(StrEnum):
    """Role of a certificate: its OU."""

    HUB = "hub"
    HOST = "host"
    OPERATOR = "operator"
    """May do everything."""

    MOVER = "mover"
    """May read, and place instances on hosts."""

    READER = "reader"
    """May read."""


OPERATOR_ROLES: Final = frozenset({Role.OPERATOR, Role.MOVER, Role.READER})


@dataclass(frozen=True, slots=True)
class Identity:
    """Subject of a certificate that HAProxy has verified.

    Attributes:
        name: CN: for a host or hub its id.
        serial: Serial number, two hexadecimal digits in upper case for each byte.
        scope: O: the project to which an operator is limited; `None` for all.
    """

    role: Role
    name: str
    serial: str
    scope: str | None = None


def read_identity(headers: Mapping[str, str]) -> Identity | None:
    """Return the identity in the headers that HAProxy set; `None` without a certificate."""
    role = headers.get(HEADER_ROLE)
    if role is None:
        return None
    scope = headers.get(HEADER_SCOPE)
    return Identity(Role(role), headers[HEADER_NAME], headers[HEADER_SERIAL], scope)


def spell_serial(number: int) -> str:
    return number.to_bytes((number.bit_length() + 7) // 8).hex().upper()


@dataclass(frozen=True, slots=True)
class Invitation:
    """Data with which a host joins; operators see it as one word. The token is a secret, to be used once.

    The fingerprint is the SHA-256 of the CA certificate (DER), hexadecimal in lower case.
    """

    host: HostId
    urls: tuple[str, ...]
    fingerprint: str
    token: str

    def __repr__(self) -> str:
        return f"Invitation(host={self.host!r}, urls={self.urls!r})"


def render_invitation(invitation: Invitation) -> str:
    shape = [invitation.host, list(invitation.urls), invitation.fingerprint, invitation.token]
    text = json.dumps(shape, separators=(",", ":")).encode()
    return _PREFIX + base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def parse_invitation(text: str) -> Invitation:
    """Parse the result of `render_invitation`; raise `ValueError` with a message that does not repeat the text."""
    word = text.strip()
    if not word.startswith(_PREFIX):
        raise ValueError(f"it does not begin with {_PREFIX}")
    try:
        encoded = word.removeprefix(_PREFIX).encode("ascii")
        found = json.loads(base64.b64decode(encoded + b"=" * (-len(encoded) % 4), b"-_"))
    except (ValueError, RecursionError):
        # The cause would show a part of the secret.
        raise ValueError("it is incomplete") from None
    match found:
        case [str(host), list(urls), str(fingerprint), str(token)] if (
            _NAME.fullmatch(host)
            and urls
            and all(isinstance(one, str) and one.startswith("https://") for one in urls)
            and _FINGERPRINT.fullmatch(fingerprint)
            and token
        ):
            return Invitation(HostId(host), tuple(urls), fingerprint, token)
        case _:
            raise ValueError("it is incomplete")


_AGAIN: Final = "`imdsproxy fleet enrol HOST` makes a new one"


def hash_token(token: str) -> str:
    return sha256(token.encode()).hexdigest()


def plan_invitation(stored: StoredHost | None, token: str, expires_at: int) -> StoredHost:
    """Replace the token of a host. An enrolled host stays enrolled until it joins with the new token."""
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
    """Enrol a host: use up its token and accept only its new certificate.

    Earlier certificates are revoked: a later renewal in a journal does not restore them. Raises `AccessDenied` if the
    token is not the host's, was used, or has expired.
    """
    # Compare even without a stored token, so that the response time reveals nothing.
    wanted = "" if stored is None or stored.token_sha256 is None else stored.token_sha256
    if not hmac.compare_digest(wanted.encode(), hash_token(token).encode()):
        raise AccessDenied("the token is not this host's, or was used already", hint=_AGAIN)
    if stored is None or now >= stored.expires_at:
        raise AccessDenied("the token has expired", hint=_AGAIN)
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
    """Renew a host's certificate: only the presented and the new certificate are valid afterwards.

    Raises `AccessDenied` if the presented certificate is revoked or replaced.
    """
    if stored is None or not admits_host(stored, presented):
        raise AccessDenied("this certificate is revoked, or another has replaced it", hint=_AGAIN)
    return _next(stored, serials=(presented, serial), trusts=trusts)


def plan_revocation(host: HostId, stored: StoredHost | None) -> StoredHost:
    """Revoke all certificates and the token of a host; raises `NotFound` if the fleet has no such host."""
    if stored is None:
        raise NotFound(f"the fleet has no host {host}", hint="imdsproxy fleet hosts")
    return StoredHost(
        HostState.REVOKED, revocations=stored.revocations + 1, version=stored.version + 1
    )


def _next(stored: StoredHost, **changes: Any) -> StoredHost:
    return replace(stored, version=stored.version + 1, **changes)


def admits_host(stored: StoredHost | None, serial: str) -> bool:
    """Return whether a host's verified certificate with this serial number is valid now."""
    if stored is None or stored.state is not HostState.ENROLLED:
        return False
    return serial in stored.serials


def admits_operator(identity: Identity, revoked: bytes | None) -> bool:
    """Return whether an operator's or a hub's certificate is valid; `revoked` is the value of `operator_key`."""
    return revoked is None and (identity.role in OPERATOR_ROLES or identity.role is Role.HUB)
