"""Settings of a host that gives identity tokens, and guests' requests for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jwt

from imdsproxy.model.path_rules import TOKEN_PATH
from imdsproxy.model.tokens import TTL_HEADER
from support.certificates import make_authority
from support.guest import Asker, Guest, Lost, Reply, take_token, with_token
from support.identity.signing import Issuer
from support.lab import until

PATH: Final = "/latest/api/identity"
TRUST_DOMAIN: Final = "cloud.example"
_OK: Final = 200


def identity_settings(
    directory: Path, *, address: str = "127.0.0.1", name: str | None = None
) -> tuple[dict[str, Any], Issuer]:
    """Return the section `identity` of a host that signs, and the issuer as verifiers are configured for it.

    Args:
        directory: For the certificate of the issuer's documents.
        address: Where HAProxy serves them, at port 8443.
        name: Name of the address in the issuer's URL, which then has HTTPS's own port.
    """
    authority = make_authority(directory, "issuer-ca")
    own = authority.issue("issuer", names=[f"DNS:{name}" if name else f"IP:{address}"])
    listen = f"{address}:443" if name else f"{address}:8443"
    url = f"https://{name or listen}"
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
    guest: Guest | Asker,
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


def wait_token(guest: Guest, audience: str = "vault", **claims: object) -> str:
    """Wait until a guest gets a token with these claims, and return it."""
    found: list[str] = []

    def has_token() -> bool:
        try:
            session = guest.ask(TOKEN_PATH, method="PUT", headers=(f"{TTL_HEADER}: 60",))
        except Lost:
            # Nothing listens yet.
            return False
        if session.status != _OK:
            return False
        reply = request_token(guest, audience, session=session.text)
        found.append(reply.text)
        return reply.status == _OK and claims.items() <= claims_of(reply.text).items()

    until(has_token, within_s=20, what=f"an identity token with {claims}")
    return found[-1]


def claims_of(token: str) -> Mapping[str, Any]:
    """Return the claims of a token without verifying it."""
    claims: Mapping[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims
