"""Claims of identity tokens."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

from imdsproxy.model.policy import AUDIENCE_PATTERN
from imdsproxy.model.subject import Subject

BACK_DATED_S: Final = 30
"""Seconds by which `iat` and `nbf` precede the signature: Ceph's RGW refuses a token from the future without leeway."""

LONGEST_S: Final = 3600
LONGEST_TAGS: Final = 4096
"""Bytes of all tags in a token: with more, HTTP servers and HAProxy's buffer would not take the token."""

NONCE_PATTERN: Final = "^[A-Za-z0-9._~+/=:-]{1,256}$"
_AUDIENCE: Final = re.compile(AUDIENCE_PATTERN)
_NONCE: Final = re.compile(NONCE_PATTERN)
_WITH_PROJECT: Final = "spiffe://{trust_domain}/project/{project}/instance/{instance}"
_WITHOUT_PROJECT: Final = "spiffe://{trust_domain}/instance/{instance}"

Claims: TypeAlias = dict[str, Any]


class Placement(StrEnum):
    """Proof that an instance is on the host that asks for its token."""

    LOCAL = "local"
    """The host itself signs."""

    FLEET = "fleet"
    """The fleet's records place the instance on the host."""

    NOVA = "nova"
    """Nova and Neutron place the instance on the host."""

    HOST = "host"
    """Nothing but the host's word."""


class Refusal(StrEnum):
    """Reason why there is no token; a guest sees the status only."""

    AUDIENCE = "audience"
    """The instance's policy does not allow the audience."""

    SUBJECT = "subject"
    """No such subject: the record has changed meanwhile, or the instance is on another host."""

    PLACEMENT = "placement"
    """The audience needs a proven placement."""

    PROJECT = "project"
    """The audience's subject holds a project, and the instance has none."""

    TAGS = "tags"
    """The tags that the policy names are too long for a token."""

    DOCUMENT = "document"
    """The instance's policy allows no signed document, or the issuer's key is no RSA key."""

    REQUEST = "request"
    """The audience or the nonce has a wrong form."""

    UNREADABLE = "unreadable"
    """A hub cannot read the instance's record or policy now, or the fleet's OpenStack does not answer."""


@dataclass(frozen=True, slots=True)
class AudienceRules:
    """Rules for the tokens of one audience (`config.identity.AudienceSettings`)."""

    lifetime_s: int = 600
    subject: str | None = None
    proven: bool = True


@dataclass(frozen=True, slots=True)
class IssuerRules:
    issuer: str
    trust_domain: str
    audiences: Mapping[str, AudienceRules]

    def rules_for(self, audience: str) -> AudienceRules:
        return self.audiences.get(audience, _DEFAULT)


_DEFAULT: Final = AudienceRules()


def is_audience(text: str) -> bool:
    return _AUDIENCE.fullmatch(text) is not None


def is_nonce(text: str) -> bool:
    return _NONCE.fullmatch(text) is not None


def fits(subject: Subject) -> bool:
    """Return whether a token can hold the subject's tags."""
    return not subject.tags or len(json.dumps(dict(subject.tags))) <= LONGEST_TAGS


def plan_claims(
    subject: Subject,
    audience: str,
    nonce: str | None,
    rules: IssuerRules,
    placement: Placement,
    *,
    now: int,
    token_id: str,
) -> Claims | Refusal:
    """Return the claims of a token (RFC 7519, SPIFFE JWT-SVID), or why there is none.

    Every fact is the subject's. A guest chooses the audience, of those allowed, and the nonce.
    """
    if not is_audience(audience) or not (nonce is None or is_nonce(nonce)):
        return Refusal.REQUEST
    if not subject.allows(audience):
        return Refusal.AUDIENCE
    chosen = rules.rules_for(audience)
    if chosen.proven and placement is Placement.HOST:
        return Refusal.PLACEMENT
    template = chosen.subject or (_WITH_PROJECT if subject.project else _WITHOUT_PROJECT)
    if "{project}" in template and subject.project is None:
        return Refusal.PROJECT
    if not fits(subject):
        return Refusal.TAGS
    facts = {
        "trust_domain": rules.trust_domain,
        "instance": subject.instance,
        "project": subject.project,
        "network": subject.network,
    }
    claims = {
        "iss": rules.issuer,
        "sub": re.sub(r"\{(\w+)\}", lambda place: str(facts[place[1]]), template),
        "aud": audience,
        "iat": now - BACK_DATED_S,
        "nbf": now - BACK_DATED_S,
        "exp": now + min(chosen.lifetime_s, LONGEST_S),
        "jti": token_id,
        "instance_id": subject.instance,
        "project_id": subject.project,
        "network_id": subject.network,
        "availability_zone": subject.availability_zone,
        "instance_created": subject.created_at,
        "placement": placement.value,
        "nonce": nonce,
        "tags": dict(subject.tags) or None,
    }
    return {name: value for name, value in claims.items() if value is not None}
