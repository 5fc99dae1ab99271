"""Keys of the issuer of identity tokens, for operators."""

import json

from imdsproxy.controller.identity import IdentityHost
from imdsproxy.controller.parts import Parts
from imdsproxy.errors import NotFound
from imdsproxy.issuer.ring import parse_ring
from imdsproxy.issuer.rotation import IssuerKeys, describe_keys


async def list_keys(parts: Parts) -> IssuerKeys:
    """Return the issuer's keys.

    Raises:
        NotFound: This host does not sign identity tokens.
        SourceUnavailable: The signer does not answer.
    """
    identity = _signing(parts)
    shape = await identity.ask({"keys": None})
    ring = parse_ring(json.dumps(shape["ring"]).encode())
    return describe_keys(identity.documents.issuer, ring, shape["keys"], identity.pace)


async def rotate_keys(parts: Parts, *, compromised: bool) -> IssuerKeys:
    """Begin a rotation, or replace all keys at once; return the keys after it; raise as `list_keys`."""
    await _signing(parts).rotate(compromised=compromised)
    return await list_keys(parts)


def _signing(parts: Parts) -> IdentityHost:
    identity = parts.identity
    if identity is None or not identity.signer.needed:
        raise NotFound(
            "this host signs no identity tokens",
            hint="identity.enabled turns them on; in a fleet the hubs sign: imdsproxy --fleet URL identity keys",
        )
    return identity
