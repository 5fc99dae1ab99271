"""Recipes with which verifiers take an issuer's tokens: a text for each, with this site's values. Pure."""

import pkgutil
from string import Template
from typing import Final

VERIFIERS: Final = ("keystone", "openbao", "vault", "kubernetes", "rgw", "haproxy")

_COMPROMISED: Final = "compromised"


def render_setup(
    verifier: str, *, issuer: str, trust_domain: str, keystone_audience: str = "keystone"
) -> str:
    """Render the recipe for one of `VERIFIERS`."""
    return _render(
        verifier,
        issuer=issuer,
        trust_domain=trust_domain,
        # Providers of IAM are named after the URL without its scheme.
        provider=issuer.removeprefix("https://"),
        audience=keystone_audience,
    )


def render_compromised(issuer: str) -> str:
    """Render what an operator does at each verifier after all keys were replaced."""
    return _render(_COMPROMISED, issuer=issuer)


def _render(name: str, **values: str) -> str:
    text = (pkgutil.get_data(__package__, f"{name}.txt") or b"").decode()
    return Template(text).substitute(values)
