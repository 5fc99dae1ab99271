"""Identity of a hub's client: roles, the headers in which HAProxy names the client, and a host's invitation."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from imdsproxy.fleet.layout import HostId
from imdsproxy.model.entities import ID_PATTERN

ENROL_PATH: Final = "/fleet/enrol"
RENEW_PATH: Final = "/fleet/renew"
LEAVE_PATH: Final = "/fleet/leave"
PASSWORD_PATH: Final = "/fleet/password"  # noqa: S105 - a path
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
        name: CN of the certificate: for a host or hub its id.
        serial: Serial number of the certificate, two hexadecimal digits in upper case for each byte.
        scope: O of the certificate: the project to which an operator is limited; `None` for all.
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
    """Return a certificate's serial number in the form of `Identity.serial`."""
    return number.to_bytes((number.bit_length() + 7) // 8).hex().upper()


@dataclass(frozen=True, slots=True)
class Invitation:
    """Data with which a host joins; operators see it as one string.

    Attributes:
        host: Name of the host in the fleet.
        urls: URLs of hubs, `https://HOST:PORT`.
        fingerprint: SHA-256 of the CA certificate (DER), hexadecimal in lower case.
        token: One-time token. A secret.
    """

    host: HostId
    urls: tuple[str, ...]
    fingerprint: str
    token: str

    def __repr__(self) -> str:
        return f"Invitation(host={self.host!r}, urls={self.urls!r})"


def render_invitation(invitation: Invitation) -> str:
    """Render the invitation as one word."""
    shape = [invitation.host, list(invitation.urls), invitation.fingerprint, invitation.token]
    text = json.dumps(shape, separators=(",", ":")).encode()
    return _PREFIX + base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def parse_invitation(text: str) -> Invitation:
    """Parse the result of `render_invitation`.

    Raises:
        ValueError: The text is not an invitation; the message does not repeat the text.
    """
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
