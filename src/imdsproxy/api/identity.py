"""Keys of the issuer of identity tokens, for operators."""

import hashlib
import json
from base64 import b64decode
from dataclasses import dataclass
from typing import Any

from imdsproxy.controller.identity import IdentityHost
from imdsproxy.controller.parts import Parts
from imdsproxy.errors import NotFound
from imdsproxy.issuer.ring import parse_ring


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """Key of the issuer.

    Attributes:
        id: Member `kid` of its JWK, and of each token's header.
        state: `signing`, `next` or `old`.
        since: Time of its last change of state, Unix time.
        due_at: Time of its next change of state: `next` signs, `old` is removed; `None` for the key that signs.
        sha1: Thumbprint of its certificate, 40 hexadecimal digits, as Ceph's RGW and AWS take it.
        jwk: Public key (RFC 7517).
    """

    id: str
    algorithm: str
    state: str
    since: int
    due_at: int | None
    sha1: str
    jwk: dict[str, Any]


@dataclass(frozen=True, slots=True)
class IssuerKeys:
    """Keys of the issuer, the signing key first."""

    issuer: str
    keys: tuple[IssuerKey, ...]


async def list_keys(parts: Parts) -> IssuerKeys:
    """Return the issuer's keys.

    Raises:
        NotFound: This host does not sign identity tokens.
        SourceUnavailable: The signer does not answer.
    """
    identity = _signing(parts)
    shape = await identity.ask({"keys": None})
    ring = parse_ring(json.dumps(shape["ring"]).encode())
    found = tuple(
        IssuerKey(
            entry.id,
            jwk["alg"],
            entry.state.value,
            entry.since,
            identity.pace.due_at(entry),
            hashlib.sha1(b64decode(jwk["x5c"][0]), usedforsecurity=False).hexdigest(),
            jwk,
        )
        for entry, jwk in zip(ring.entries, shape["keys"], strict=True)
    )
    return IssuerKeys(identity.issuer, found)


async def rotate_keys(parts: Parts, *, compromised: bool) -> IssuerKeys:
    """Begin a rotation, or replace all keys at once; return the keys after it; raise as `list_keys`."""
    await _signing(parts).rotate(compromised=compromised)
    return await list_keys(parts)


def _signing(parts: Parts) -> IdentityHost:
    identity = parts.identity
    if identity is None or not identity.signer.needed:
        raise NotFound(
            "this host signs no identity tokens",
            hint="identity.enabled turns them on; in a fleet the hubs sign",
        )
    return identity
