"""What HAProxy's rules (`core.haproxy.access_rules`) answer to one request for a path, said by the same policy word.

For `explain`: the rules themselves tell nobody which of them it was. An integration test holds the two together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.path_rules import (
    TOKEN_PATH,
    PathRules,
    PathWord,
    find_rule,
    path_rule_name,
    plain_path,
    undo_spelling,
)
from imdsproxy.core.policy import boot_is_over
from imdsproxy.core.policy_word import (
    BOOT_END,
    ENDPOINT,
    NOCLOUD_TOKENS,
    ONLY_TOKENS_OFF,
    OPENSTACK_TOKENS,
    SEALED,
    TOKEN_ROUTE,
    TOKENS,
)

__all__ = ["Decided", "decide_read"]

_TOKEN_ROUTE: Final = TOKEN_PATH.encode()
_UP: Final = re.compile(rb"(?:^|/)\.\.(?:/|$)")
_TREES: Final = (
    ("openstack_tokens", "/openstack", OPENSTACK_TOKENS),
    ("nocloud_tokens", "/nocloud", NOCLOUD_TOKENS),
)
_USER_DATA: Final = re.compile(rb"/(?:openstack/[^/]+/user_data|[^/]+/user-data)(?:/|$)")


@dataclass(frozen=True, slots=True)
class Decided:
    """What the policy says to a GET; whether there is such a document is another question.

    Attributes:
        status: It is refused with; `None` where the policy lets it pass.
        rule: The rule that decides, as the settings have it, one for a path by `path_rule_name`; `path` where the path
            itself is refused; empty where nothing is.
        why: The reason in a few words.
    """

    status: int | None
    rule: str = ""
    why: str = ""


_PASSES: Final = Decided(None)


def decide_read(word: str, now: int, target: str, *, token: bool, paths: PathRules = ()) -> Decided:
    """What is answered to `GET target`.

    Args:
        word: Of the record (`core.policy.render_policy_word`).
        now: Unix time.
        target: As the guest would write it, with its query.
        token: It sends a good one.
        paths: The rules of the set that the word refers to.
    """
    path = target.partition("?")[0].encode()
    # With tokens off and all else as by default there is nothing to check.
    nothing = word.startswith(ONLY_TOKENS_OFF) if word else not token
    if nothing and path != _TOKEN_ROUTE:
        return _PASSES
    undone = undo_spelling(path)
    if word and not ENDPOINT.is_on(word):
        return Decided(403, "endpoint", "the endpoint is off")
    if word and (undone is None or _UP.search(undone) or b"%00" in path):
        return Decided(400, "path", "no document has such a path: it is made to pass by a rule")
    if undone is None:
        return _PASSES
    if undone.endswith((b"/api/token", b"/api/token/")):
        return _token_route(word, undone)
    return _read(word, now, undone, paths, token=token) if word else _PASSES


def _token_route(word: str, path: bytes) -> Decided:
    if word and not TOKEN_ROUTE.is_on(word):
        return Decided(404, "tokens", "no tokens are given")
    if path.rstrip(b"/") != _TOKEN_ROUTE:
        return Decided(404, "tokens", "a token is had under /latest alone")
    return Decided(405, "tokens", "a token is had by PUT")


def _read(word: str, now: int, path: bytes, paths: PathRules, *, token: bool) -> Decided:
    booted = boot_is_over(int(BOOT_END.read(word)), now)
    tree, rule, required = "EC2's tree", "tokens", TOKENS.is_on(word)
    for name, begin, mode in _TREES:
        if path.startswith(begin.encode()):
            tree, rule, required = begin, name, mode.is_on(word)
    locked = rule == "tokens" or booted
    since = "" if rule == "tokens" else ", since the boot is over"
    said = find_rule(paths, plain_path(path).decode("latin-1"))
    if said is not None:
        by, what = path_rule_name(said[0]), f"{said[0]} and what is beneath it"
        if said[1] is PathWord.DENY:
            return Decided(403, by, f"{what} is denied")
        if said[1] is PathWord.REQUIRED and locked and not token:
            return Decided(401, by, f"{what} takes a token{since}")
        if said[1] is not PathWord.ALLOW:
            required = False
    if required and not token and locked:
        return Decided(401, rule, f"{tree} takes a token{since}")
    if SEALED.is_on(word) and booted and _USER_DATA.match(path):
        return Decided(403, "seal_user_data", "user-data is sealed, since the boot is over")
    return _PASSES
