"""Libraries that verify tokens: joserfc, google-auth and spiffe."""

import json
from pathlib import Path
from typing import Final

from support.identity.signing import Issuer
from support.lab import run, within
from support.pinned_venv import pinned_venv

_SCRIPT: Final = Path(__file__).parent / "inside" / "verify.py"


def verify(token: str, *, audience: str, issuer: Issuer, namespace: str) -> dict[str, str]:
    """Return the token's subject by each library, or the reason why that library refuses the token.

    Args:
        namespace: Where the libraries read the issuer's keys.
    """
    python = str(pinned_venv("identity") / "bin" / "python")
    verdicts: dict[str, str] = json.loads(
        run(
            *(*within(namespace), python, "-W", "ignore", str(_SCRIPT)),
            *(token, audience, issuer.jwks_url, issuer.bundle_url),
            environment={"REQUESTS_CA_BUNDLE": str(issuer.ca_file)},
        )
    )
    return verdicts
