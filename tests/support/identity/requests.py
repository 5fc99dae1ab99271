"""Settings of a host that gives identity tokens, and guests' requests for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jwt

from support.certificates import make_authority
from support.guest import Guest, Reply, take_token, with_token
from support.identity.signing import Issuer
from support.lab import until

PATH: Final = "/latest/api/identity"
TRUST_DOMAIN: Final = "cloud.example"


def identity_settings(
    directory: Path, *, address: str = "127.0.0.1"
) -> tuple[dict[str, Any], Issuer]:
    """Return the section `identity` of a host that signs, and the issuer as verifiers are configured for it.

    Args:
        directory: For the certificate of the issuer's documents.
        address: Where HAProxy serves them, at port 8443.
    """
    authority = make_authority(directory, "issuer-ca")
    own = authority.issue("issuer", names=[f"IP:{address}"])
    listen = f"{address}:8443"
    url = f"https://{listen}"
    section = {
        "enabled": True,
        "issuer": url,
        "trust_domain": TRUST_DOMAIN,
        "listen": listen,
        "certificate": str(own.bundle),
        # Accounts that every Debian has.
        "user": "daemon",
        "signer_user": "nobody",
    }
    return section, Issuer(url, f"{url}/jwks", f"{url}/spiffe-bundle", authority.ca_file)


def request_token(
    guest: Guest,
    audience: str | None = "vault",
    *,
    session: str | None = None,
    query: str = "",
    method: str = "PUT",
    more: tuple[str, ...] = (),
) -> Reply:
    """Request a token as a guest.

    Args:
        session: Session token to show; by default a new one.
        query: With its question mark.
        more: Further headers.
    """
    shown = take_token(guest) if session is None else session
    headers = with_token(shown) if shown else ()
    if audience is not None:
        headers = (*headers, f"X-imdsproxy-audience: {audience}")
    return guest.ask(f"{PATH}{query}", method=method, headers=(*headers, *more))


def wait_token(guest: Guest, audience: str = "vault") -> str:
    """Wait until a guest gets a token, and return it."""
    until(lambda: request_token(guest, audience).status == 200, what="an identity token")
    return request_token(guest, audience).text


def claims_of(token: str) -> Mapping[str, Any]:
    """Return the claims of a token without verifying it."""
    claims: Mapping[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims
