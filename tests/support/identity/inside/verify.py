"""Verifies a token by several libraries; runs in the environment of `requirements/identity.txt`.

Prints what each library makes of the token: its subject, or the reason why the library refuses the token.
"""

import json
import sys

import requests
from google.auth.transport.requests import Request
from google.oauth2 import id_token
from joserfc import jwk, jwt
from spiffe import JwtBundle, JwtSvid, TrustDomain

_TIMEOUT_S = 10


def by_joserfc(token: str, audience: str, url: str) -> str:
    keys = jwk.KeySet.import_key_set(requests.get(url, timeout=_TIMEOUT_S).json())
    claims = jwt.decode(token, keys, algorithms=["RS256", "ES256"]).claims
    registry = jwt.JWTClaimsRegistry(
        aud={"essential": True, "value": audience}, exp={"essential": True}
    )
    registry.validate(claims)
    return str(claims["sub"])


def by_google_auth(token: str, audience: str, url: str) -> str:
    return str(id_token.verify_token(token, Request(), audience, certs_url=url)["sub"])


def by_spiffe(token: str, audience: str, url: str) -> str:
    domain = TrustDomain("cloud.example")
    bundle = JwtBundle.parse(domain, requests.get(url, timeout=_TIMEOUT_S).content)
    return str(JwtSvid.parse_and_validate(token, bundle, {audience}).spiffe_id)


def main(token: str, audience: str, jwks_url: str, bundle_url: str) -> None:
    verdicts = {}
    for library, verify, url in (
        ("joserfc", by_joserfc, jwks_url),
        ("google-auth", by_google_auth, jwks_url),
        ("spiffe", by_spiffe, bundle_url),
    ):
        try:
            verdicts[library] = verify(token, audience, url)
        except Exception as error:  # noqa: BLE001 -- each library has errors of its own
            verdicts[library] = f"{type(error).__name__}: {error}"
    json.dump(verdicts, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
