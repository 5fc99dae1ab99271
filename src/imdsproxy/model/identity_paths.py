"""Policy's decision on a guest's request to a path of identity tokens, for `explain`. Pure.

As `policy_report`: HAProxy's rules (`haproxy/rules/identity.cfg`) and the process behind them decide, and an
integration test compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from imdsproxy.model.path_rules import PathRules
from imdsproxy.model.policy import ANY_AUDIENCE
from imdsproxy.model.policy_report import Decided, decide_read
from imdsproxy.model.policy_word import DOCUMENT, HOP_LIMIT, OPENSTACK_TOKENS
from imdsproxy.model.subject import Subject
from imdsproxy.model.wire import (
    DOCUMENT_PATHS,
    IDENTITY_PATH,
    OPENSTACK_TOKEN_PATH,
    UNLIMITED,
    WITHHELD,
)

METHODS: Final[Mapping[str, str]] = {
    IDENTITY_PATH: "PUT",
    OPENSTACK_TOKEN_PATH: "POST",
    **dict.fromkeys(DOCUMENT_PATHS, "GET"),
}
"""Method of each path of identity tokens; HAProxy compares the path as the guest spells it."""

_PASSES: Final = Decided(None)
_NO_AUDIENCE: Final = Decided(404, "audiences", "the policy allows no audience")
_OFF: Final = Decided(404, "identity.enabled", "this host gives no identity tokens")
_NO_DOCUMENT: Final = Decided(404, "identity_document", "the policy allows no signed document")
_NO_SESSION: Final = Decided(
    401, "identity", "identity needs a session token, whatever `tokens` says"
)
_RELAYED: Final = "a request through a proxy or a browser, or with another Host, gets 403"


@dataclass(frozen=True, slots=True)
class IdentityPlace:
    """Facts about a guest on which its requests to paths of identity tokens depend.

    Attributes:
        word: Policy word of the guest's record.
        subject: Subject of the record; `None` if the policy allows neither audience nor document.
        openstack_audience: Audience of clients of Keystone, by the settings.
        enabled: Whether this host gives identity tokens.
    """

    word: str
    paths: PathRules
    subject: Subject | None
    openstack_audience: str | None
    enabled: bool = True


def decide_identity(place: IdentityPlace, now: int, target: str, *, token: bool) -> Decided:
    """Return the decision on a request to one of `METHODS`, by the path's own method.

    Args:
        target: Path and query as the guest would send them.
        token: Whether the guest sends a valid session token.
    """
    path, word, subject = target.partition("?")[0], place.word, place.subject
    if path == OPENSTACK_TOKEN_PATH and word and place.enabled:
        # No client of Keystone knows session tokens, so the mode of the tree does not apply.
        word = OPENSTACK_TOKENS.turn_off(word)
    checked = decide_read(word, now, target, token=token, paths=place.paths)
    if checked.status is not None:
        return checked
    if not place.enabled:
        allowed: Decided | None = _OFF
    elif path in DOCUMENT_PATHS:
        allowed = None if DOCUMENT.is_on(word) else _NO_DOCUMENT
    elif subject is None:
        allowed = _NO_AUDIENCE
    elif path == OPENSTACK_TOKEN_PATH:
        return _decide_keystone(subject, place.openstack_audience, int(HOP_LIMIT.read(word)))
    elif not token or subject.audiences:
        allowed = None
    else:
        allowed = _NO_AUDIENCE
    if allowed is not None:
        return allowed
    return _PASSES if token else _NO_SESSION


def _decide_keystone(subject: Subject, audience: str | None, hop_limit: int) -> Decided:
    if hop_limit == WITHHELD:
        return Decided(503, "hop_limit", "the network has no rule for hop limits")
    if audience is None:
        return Decided(400, "identity.openstack_audience", "the settings name no audience")
    if not subject.allows(audience):
        return Decided(400, "audiences", f"the policy does not allow the audience {audience}")
    return _PASSES


def list_guards(place: IdentityPlace, path: str) -> tuple[str, ...]:
    """Return what a request needs beside the decision, a sentence each; empty if no request can succeed."""
    subject = place.subject
    if subject is None or (path in DOCUMENT_PATHS and not DOCUMENT.is_on(place.word)):
        return ()
    guards = [_RELAYED]
    if path == IDENTITY_PATH:
        named = ", ".join(subject.audiences) or "none"
        audiences = "any audience" if ANY_AUDIENCE in subject.audiences else named
        guards.append(f"audiences: {audiences}; another gets 403")
    if path == OPENSTACK_TOKEN_PATH:
        guards.append("it takes client credentials in a form only: another content type gets 415")
    limit = int(HOP_LIMIT.read(place.word))
    if limit not in {UNLIMITED, WITHHELD}:
        carrier = "the answer" if path == OPENSTACK_TOKEN_PATH else "the session token"
        guards.append(f"{carrier} goes {limit} {'hop' if limit == 1 else 'hops'} far")
    return tuple(guards)
