"""Recipes with which verifiers take an issuer's tokens: shell scripts with the values of a site. Pure."""

import json
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Final

_URLS: Final = {
    "keystone": "https://keystone.example:5000/v3",
    "openbao": "https://bao.example:8200",
    "vault": "https://vault.example:8200",
    "kubernetes": "https://kubernetes.example:6443",
    "rgw": "https://rgw.example",
    "haproxy": "https://service.example:8443",
}
"""Example of a verifier's URL, by verifier."""

VERIFIERS: Final = tuple(_URLS)
PARTS: Final = ("server", "admin", "host", "guest")
EXAMPLE_PROJECT: Final = "0123456789abcdef0123456789abcdef"

_COMPROMISED: Final = "compromised"
_HEADING: Final = re.compile(r"^## (\w+): .*\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Site:
    """Values of a site that recipes hold.

    Attributes:
        issuer: URL of the issuer.
        project: Id of a project whose guests may use the verifier.
        audience: Audience of the verifier's tokens.
        others: Audiences that the settings already allow the project.
        url: URL at which guests reach the verifier; by default an example.
        has_fleet: Whether the project's policy is in a fleet's store, and not in this host's settings.
    """

    issuer: str
    trust_domain: str
    audience: str
    project: str = EXAMPLE_PROJECT
    others: Sequence[str] = ()
    url: str | None = None
    has_fleet: bool = False


def render_setup(verifier: str, site: Site) -> str:
    """Render the recipe for one of `VERIFIERS`: what it does, and a shell script below a heading for each part."""
    values = {
        "issuer": site.issuer,
        # Providers of IAM are named after the URL without its scheme.
        "provider": site.issuer.removeprefix("https://"),
        "trust_domain": site.trust_domain,
        "project": site.project,
        "audience": site.audience,
        "audiences": json.dumps(list(dict.fromkeys((*site.others, site.audience)))),
        "url": site.url or _URLS[verifier],
    }
    host = _render("fleet" if site.has_fleet else "host", **values)
    return _render(verifier, **values, host=host.rstrip())


def split_parts(recipe: str) -> dict[str, str]:
    """Return the script of each part of a recipe, without its heading, by its name of `PARTS`."""
    words = _HEADING.split(recipe)[1:]
    return {name: text.strip() + "\n" for name, text in zip(words[::2], words[1::2], strict=True)}


def render_compromised(issuer: str) -> str:
    """Render what an operator does at each verifier after all keys were replaced."""
    return _render(_COMPROMISED, issuer=issuer)


def _render(name: str, **values: str) -> str:
    text = (pkgutil.get_data(__package__, f"{name}.txt") or b"").decode()
    return Template(text).substitute(values)
