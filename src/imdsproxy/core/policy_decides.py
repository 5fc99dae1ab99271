"""What HAProxy's rules (`core.haproxy.guard`) answer to one request for a path, said by the same policy word.

For `explain`: the rules themselves tell nobody which of them it was. An integration test holds the two together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

__all__ = ["Decided", "decide_read"]

_TOKEN_PATH: Final = b"/latest/api/token"
_NOTHING_BUT_OFF: Final = "+1-ooo---"
"""How a policy word begins where tokens are off and nothing else is said: then there is nothing to look at."""

_ESCAPE: Final = re.compile(rb"%([0-9A-Fa-f]{2})?")
_ODD: Final = re.compile(rb"%|//|/\.|^/ec2")
_SLASHES: Final = re.compile(rb"/(?:\.?/)*(?:\.$)?")
_EC2: Final = re.compile(rb"^/ec2(?=/|$)")
_UP: Final = re.compile(rb"(?:^|/)\.\.(?:/|$)")
_TREES: Final = (("openstack_tokens", "/openstack"), ("nocloud_tokens", "/nocloud"))
_USER_DATA: Final = re.compile(rb"/(?:openstack/[^/]+/user_data|[^/]+/user-data)(?:/|$)")


@dataclass(frozen=True, slots=True)
class Decided:
    """What the policy says to a GET; whether there is such a document is another question.

    Attributes:
        status: It is refused with; `None` where the policy lets it pass.
        rule: The rule that decides, as the settings have it; `path` where the path itself is refused; empty where
            nothing is.
        why: The reason in a few words.
    """

    status: int | None
    rule: str = ""
    why: str = ""


_PASSES: Final = Decided(None)


def decide_read(word: str, now: int, target: str, *, token: bool) -> Decided:
    """What is answered to `GET target`.

    Args:
        word: Of the record (`core.policy.render_policy_word`).
        now: Unix time.
        target: As the guest would write it, with its query.
        token: It sends a good one.
    """
    path = target.partition("?")[0].encode()
    nothing = word.startswith(_NOTHING_BUT_OFF) if word else not token
    if nothing and path != _TOKEN_PATH:
        return _PASSES
    undone = _undo(path)
    if word[1:2] == "0":
        return Decided(403, "endpoint", "the endpoint is off")
    if word and (undone is None or _UP.search(undone) or b"%00" in path):
        return Decided(400, "path", "no document has such a path: it is made to pass by a rule")
    if undone is None:
        return _PASSES
    if undone.endswith((b"/api/token", b"/api/token/")):
        return _token_route(word, undone)
    return _read(word, now, undone, token=token) if word else _PASSES


def _token_route(word: str, path: bytes) -> Decided:
    if word[2:3] == "-":
        return Decided(404, "tokens", "no tokens are given")
    if path.rstrip(b"/") != _TOKEN_PATH:
        return Decided(404, "tokens", "a token is had under /latest alone")
    return Decided(405, "tokens", "a token is had by PUT")


def _read(word: str, now: int, path: bytes, *, token: bool) -> Decided:
    modes, booted = word[3:6], int(word.split(":")[2]) <= now
    tree, rule, mode = "EC2's tree", "tokens", modes[0]
    for (name, begin), one in zip(_TREES, modes[1:], strict=True):
        if path.startswith(begin.encode()):
            tree, rule, mode = begin, name, one
    if mode == "r" and not token and (rule == "tokens" or booted):
        since = "" if rule == "tokens" else ", since the boot is over"
        return Decided(401, rule, f"{tree} takes a token{since}")
    if word[7] == "s" and booted and _USER_DATA.match(path):
        return Decided(403, "seal_user_data", "user-data is sealed, since the boot is over")
    return _PASSES


def _undo(path: bytes) -> bytes | None:
    """The path without what Nova or our documents undo; `None` where an escape is broken."""
    if not _ODD.search(path):
        return path
    if any(found[1] is None for found in _ESCAPE.finditer(path)):
        return None
    plain = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), path)
    return _EC2.sub(b"", _SLASHES.sub(b"/", plain))
