"""Check of the chain by which a guest gets into a service: each link is judged from what was seen of it."""

import json
import re
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

from imdsproxy.errors import ClockWrong, optional_library
from imdsproxy.issuer.claims import BACK_DATED_S, LONGEST_TAGS, Placement, Refusal
from imdsproxy.issuer.documents import DISCOVERY_PATH
from imdsproxy.issuer.exchange import CLOCKS_S, Token

LIBRARY_HINT: Final = (
    "apt install python3-jwt python3-cryptography, or pip install 'imdsproxy[identity]'"
)
_OK: Final = range(200, 300)
_SHOWN: Final = 300
_UNTRUSTED: Final = "CERTIFICATE_VERIFY_FAILED"
_TRUST: Final = "identity.ca_file is the PEM file of the CAs that this check trusts; null trusts the system's CAs"
_PLACED: Final[Mapping[Placement, str]] = {
    Placement.LOCAL: "this host signs for its own guests",
    Placement.FLEET: "the fleet's records place the instance on this host",
    Placement.NOVA: "Nova and Neutron place the instance on this host",
    Placement.HOST: "nothing but this host's word, and the claim `placement` says so",
}


class Link(StrEnum):
    """Link of the chain, in order."""

    RECORD = "record"
    """The instance has an address that is served."""

    POLICY = "policy"
    """The policy allows the audience."""

    PLACEMENT = "placement"
    """The instance's place is proven as the audience needs it."""

    SIGNER = "signer"
    """The signer signs a token."""

    CLOCKS = "clocks"
    """The signer's clock and this host's agree."""

    ISSUER = "issuer"
    """The issuer's documents are served with TLS, and have the key that signs."""

    VERIFIER = "verifier"
    """The verifier takes the token."""


class Verdict(StrEnum):
    GOOD = "good"
    FAILED = "failed"
    UNCHECKED = "unchecked"


@dataclass(frozen=True, slots=True)
class Finding:
    """Finding about one link; `reason` holds no token."""

    link: Link
    verdict: Verdict
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Chain:
    """Findings about all links, in order.

    Attributes:
        failed: The first link that fails; `None` if none fails.
    """

    instance: str
    audience: str
    failed: Link | None
    links: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """Answer of a server: status and body."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Silent:
    """No answer of a server, and the reason."""

    reason: str


Seen: TypeAlias = Answered | Silent


def good(link: Link, reason: str) -> Finding:
    return Finding(link, Verdict.GOOD, reason)


def failed(link: Link, reason: str, hint: str = "") -> Finding:
    return Finding(link, Verdict.FAILED, reason, hint)


def unchecked(link: Link, reason: str) -> Finding:
    return Finding(link, Verdict.UNCHECKED, reason)


def close_chain(instance: str, audience: str, found: list[Finding]) -> Chain:
    """Return the chain with every link: those after the first failure are unchecked."""
    first = next((one.link for one in found if one.verdict is Verdict.FAILED), None)
    known = {one.link: one for one in found}
    rest = f"the link {first} fails" if first is not None else "it was not reached"
    links = tuple(known.get(link) or unchecked(link, rest) for link in Link)
    return Chain(instance, audience, first, links)


def judge_refusal(reason: Refusal, audience: str, *, in_fleet: bool) -> Finding:
    """Judge the signer's refusal of a token that this host's policy allows."""
    match reason:
        case Refusal.SUBJECT if in_fleet:
            return failed(
                Link.PLACEMENT,
                "neither the fleet's records nor its OpenStack place the instance on this host, in this network",
                "imdsproxy --fleet URL instance show INSTANCE; identity.openstack on the hubs",
            )
        case Refusal.SUBJECT:
            return failed(Link.RECORD, "the record has just changed", "check again")
        case Refusal.PLACEMENT:
            return failed(
                Link.PLACEMENT,
                f"the hub has nothing but this host's word, and {audience} needs a proven place",
                "identity.audiences on the hubs: placement",
            )
        case Refusal.PROJECT:
            return failed(
                Link.POLICY,
                f"the subject of {audience} holds a project, and the instance has none",
                "give the instance a project, or identity.audiences another subject",
            )
        case Refusal.UNREADABLE:
            return failed(
                Link.PLACEMENT,
                "the hub cannot read the instance's record or policy, or OpenStack does not answer",
                "the hub's log has the reason",
            )
        case Refusal.AUDIENCE | Refusal.REQUEST | Refusal.DOCUMENT | Refusal.TAGS:
            whose = "the fleet's policy on the hub" if in_fleet else "the signer"
            why, hint = f"{whose} does not allow {audience}", "check again"
            if reason is Refusal.TAGS:
                why = f"the tags that the policy names have more than {LONGEST_TAGS} bytes"
                hint = "shorten the instance's tags, or name fewer in identity_tags"
            return failed(Link.POLICY, why, hint)


def judge_problem(shape: Mapping[str, Any]) -> Finding:
    """Judge the reason why nothing is signed (`exchange.render_problem`)."""
    link = Link.CLOCKS if shape.get("code") == ClockWrong.code else Link.SIGNER
    return failed(link, str(shape.get("problem")), str(shape.get("hint", "")))


def judge_token(token: Token, now: float) -> list[Finding]:
    """Judge a new token: placement, signer and clocks, at `now` in Unix time."""
    header, claims = read_token(token)
    ahead_s = claims["iat"] + BACK_DATED_S - now
    signed = f"token {token.id} for {claims['sub']}, valid for {token.lifetime_s} s, of key {header['kid']}"
    found = [
        good(Link.PLACEMENT, _PLACED[Placement(claims["placement"])]),
        good(Link.SIGNER, signed),
    ]
    differ = f"the signer's clock is {ahead_s:+.0f} s from this host's"
    if abs(ahead_s) > CLOCKS_S:
        return [*found, failed(Link.CLOCKS, differ, "set the clocks, by NTP if possible")]
    return [*found, good(Link.CLOCKS, differ)]


def read_token(token: Token) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return header and claims of a token of our own signer (RFC 7515 section 7.1), without verifying it."""
    header, claims, _ = token.text.split(".")
    return _decode(header), _decode(claims)


def _decode(part: str) -> dict[str, Any]:
    shape: dict[str, Any] = json.loads(urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return shape


def find_keys_url(issuer: str, seen: Seen) -> str | Finding:
    """Return the URL of the issuer's keys from its discovery document, or the finding that there is none."""
    url = f"{issuer}{DISCOVERY_PATH}"
    shape = _read_object(url, seen)
    if isinstance(shape, Finding):
        return shape
    if shape.get("issuer") != issuer:
        named = _short(shape.get("issuer"))
        return failed(
            Link.ISSUER,
            f"{url} names the issuer {named}, and tokens name {issuer}",
            "verifiers compare both byte for byte: another server answers at this address",
        )
    keys = shape.get("jwks_uri")
    if not isinstance(keys, str) or not keys.startswith("https://"):
        return failed(Link.ISSUER, f"{url} has no jwks_uri with https")
    return keys


def judge_keys(token: Token, url: str, seen: Seen) -> Finding:
    """Judge the issuer's published keys: whether one has signed the token."""
    shape = _read_object(url, seen)
    if isinstance(shape, Finding):
        return shape
    kid = read_token(token)[0]["kid"]
    found = shape.get("keys")
    keys = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    own = next((one for one in keys if one.get("kid") == kid), None)
    if own is None:
        return failed(
            Link.ISSUER,
            f"{url} does not have the key {kid}, which signs",
            "copy the documents again, or see where this address leads: imdsproxy identity keys",
        )
    wrong = find_wrong_signature(token.text, own)
    if wrong is not None:
        return failed(Link.ISSUER, f"the key {kid} of {url} has not signed the token: {wrong}")
    return good(Link.ISSUER, f"{url} has the key that signs, and {len(keys) - 1} others")


def find_wrong_signature(text: str, jwk: Mapping[str, Any]) -> str | None:
    """Return the reason why a key (RFC 7517) has not signed a token; `None` if it has, whatever the claims say.

    Raises:
        LibraryMissing: PyJWT is not installed.
    """
    with optional_library("jwt", LIBRARY_HINT):
        import jwt
    try:
        key = jwt.PyJWK(dict(jwk))
        # The layer of JWS (RFC 7515) knows no claims, so no version of the library checks one here.
        jwt.PyJWS().decode_complete(text, key.key, algorithms=[key.algorithm_name])
    except jwt.PyJWTError as error:
        return str(error)
    return None


def judge_verifier(token: Token, url: str, seen: Seen) -> Finding:
    """Judge a verifier's answer to the token."""
    if isinstance(seen, Silent):
        return _judge_silence(Link.VERIFIER, url, seen)
    if seen.status in _OK:
        return good(Link.VERIFIER, f"{url} takes the token: {seen.status}")
    body = seen.body
    for secret in (token.text, token.text.rpartition(".")[2]):
        body = body.replace(secret.encode(), b"(the token)")
    said = _reasons(body)
    return failed(Link.VERIFIER, f"{url} answers {seen.status}: {said}", _hint_for(seen.status))


def _hint_for(status: int) -> str:
    if status == 403:  # noqa: PLR2004 - HTTP's own number
        return "the verifier may know the guest, and allow it nothing: see its roles and policies"
    return "compare the verifier's settings with: imdsproxy identity setup"


def _reasons(body: bytes) -> str:
    """Return the reasons in the body of a refusal: those of OpenBao, Keystone and Kubernetes in their own words."""
    try:
        shape = json.loads(body)
    except (ValueError, RecursionError):
        shape = None
    found: object = None
    if isinstance(shape, dict):
        error = shape.get("error")
        inner = error.get("message") if isinstance(error, dict) else error
        found = shape.get("errors") or shape.get("message") or inner
    if isinstance(found, list):
        found = "; ".join(map(str, found))
    return _short(found or body.decode(errors="replace"))


def _read_object(url: str, seen: Seen) -> dict[str, Any] | Finding:
    if isinstance(seen, Silent):
        return _judge_silence(Link.ISSUER, url, seen)
    if seen.status not in _OK:
        return failed(
            Link.ISSUER, f"{url} answers {seen.status}", "identity.listen, identity.static_dir"
        )
    try:
        shape = json.loads(seen.body)
    except (ValueError, RecursionError):
        shape = None
    return shape if isinstance(shape, dict) else failed(Link.ISSUER, f"{url} has no JSON object")


def _judge_silence(link: Link, url: str, seen: Silent) -> Finding:
    hint = _TRUST if _UNTRUSTED in seen.reason else ""
    return failed(link, f"{url}: {_short(seen.reason)}", hint)


def _short(value: object) -> str:
    text = re.sub(r"\s+", " ", str(value)).strip()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
