"""Public documents of an issuer, by which verifiers check tokens."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

DISCOVERY_PATH: Final = "/.well-known/openid-configuration"
KEYS_PATH: Final = "/jwks"
BUNDLE_PATH: Final = "/spiffe-bundle"
CERTIFICATE_PATH: Final = "/certificate.pem"

_JSON: Final = "application/json"
DOCUMENTS: Final[Mapping[str, str]] = {
    DISCOVERY_PATH: _JSON,
    KEYS_PATH: _JSON,
    BUNDLE_PATH: _JSON,
    CERTIFICATE_PATH: "application/x-pem-file",
}
"""Type of each document, by path below the issuer."""

REFRESH_S: Final = 300
"""Seconds after which SPIFFE verifiers fetch the bundle again."""


def render_documents(
    issuer: str, keys: Sequence[dict[str, Any]], sequence: int
) -> dict[str, tuple[str, str]]:
    """Render the documents: type and text by path below the issuer.

    Args:
        keys: JWKs in order, the signing key first: Ceph's RGW up to 19 looks at the first key only.
        sequence: Number that grows with each change of the keys (`spiffe_sequence`).
    """
    discovery = {
        "issuer": issuer,
        "jwks_uri": f"{issuer}{KEYS_PATH}",
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": sorted({key["alg"] for key in keys}),
    }
    # google-auth refuses a key whose use is not `sig`, and SPIFFE requires `jwt-svid`: so there are two documents.
    bundle = {
        "spiffe_sequence": sequence,
        "spiffe_refresh_hint": REFRESH_S,
        "keys": [{**key, "use": "jwt-svid"} for key in keys],
    }
    texts = {
        DISCOVERY_PATH: _render(discovery),
        KEYS_PATH: _render({"keys": list(keys)}),
        BUNDLE_PATH: _render(bundle),
        CERTIFICATE_PATH: "".join(_pem(key["x5c"][0]) for key in keys),
    }
    return {path: (kind, texts[path]) for path, kind in DOCUMENTS.items()}


def _render(shape: dict[str, Any]) -> str:
    return json.dumps(shape, separators=(",", ":"))


def _pem(der: str) -> str:
    lines = [der[begin : begin + 64] for begin in range(0, len(der), 64)]
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])
