"""What a guest may read, in HAProxy's rules: the policy word, session tokens, sealed user-data.

Rules look at a copy of the path in which everything is undone that Nova or our documents undo: escapes, doubled
slashes, dot segments that lead nowhere, `/ec2` before a version. What of a path is ambiguous beyond that is
refused where a rule could be passed by it. The path itself goes on as it came.

A request that has no token, and whose record has no policy word, is looked at by the first four rules only.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.haproxy.hops import HopRules
from imdsproxy.core.haproxy.model import Words
from imdsproxy.core.haproxy.rules import KNOWN, NOVA, TOKEN_HEADERS
from imdsproxy.core.policy import POLICY_WORD
from imdsproxy.core.tokens import CURRENT, TOKEN_PATTERN, TTL_LIMIT_S
from imdsproxy.core.wire import HEADER_FORWARDED

__all__ = [
    "TOKEN_PATH",
    "guard_rules",
    "hear_forwarded",
    "note_forwarded",
    "policy_rules",
    "tell_forwarded",
    "tell_token_life",
]

_TOKEN_HEADER, _TTL_HEADER = TOKEN_HEADERS

TOKEN_PATH: Final = "/latest/api/token"  # noqa: S105 - where tokens are, not one
"""AWS, "Use the Instance Metadata Service to access instance metadata"."""

_FORWARDED: Final = (
    r"(?im)^(?:forwarded|via|origin|referer|sec-fetch-[a-z-]+|x-forwarded-(?!for:)[a-z-]+)[ \t]*:"
)
"""What a guest's own programs do not send: somebody had a browser or a proxy of its ask."""

_FORWARDED_FOR: Final = ("{", "req.fhdr_cnt(x-forwarded-for)", "gt", "0", "}")
_FOREIGN_HOST: Final = (
    "!{", "req.fhdr(host)", "-m", "reg", r"^(?:169\.254\.169\.254|\[fe80::a9fe:a9fe(?:%[^\]]*)?\])?(?::80)?$", "}"
)  # fmt: skip

_UNDONE: Final = r'path,url_dec,regsub("/(?:\.?/)*(?:\.$)?",/,g),regsub("^/ec2(?=/|$)","")'
_ODD: Final = ("{", "path", "-m", "sub", "%", "//", "/.", "/ec2", "}")
_UP: Final = ("{", "var(txn.path)", "-m", "reg", r"(?:^|/)\.\.(?:/|$)", "}")
_NUL: Final = ("{", "path", "-m", "sub", "%00", "}")

_ASKED: Final = ("{", "var(txn.asked)", "-m", "found", "}")
_POLICY: Final = ("{", "var(txn.policy)", "-m", "found", "}")
_HAS_TOKEN: Final = ("{", f"req.fhdr_cnt({_TOKEN_HEADER})", "gt", "0", "}")
_NO_GOOD_TOKEN: Final = ("!{", "var(txn.left)", "-m", "found", "}")
_TOKEN_ROUTE: Final = ("{", "var(txn.route)", "-m", "found", "}")
_BOOTED: Final = ("{", "var(txn.booting)", "-m", "int", "le", "0", "}")
_IS_FORWARDED: Final = ("{", "var(txn.forwarded)", "-m", "found", "}")
_IS_FORWARDED_FOR: Final = ("{", "var(txn.forwarded_for)", "-m", "found", "}")
_OPENSTACK: Final = ("{", "var(txn.path)", "-m", "reg", "^/openstack(?:/|$)", "}")
_NOCLOUD: Final = ("{", "var(txn.path)", "-m", "reg", "^/nocloud(?:/|$)", "}")
_USER_DATA: Final = (
    "{", "var(txn.path)", "-m", "reg", "^/(?:openstack/[^/]+/user_data|[^/]+/user-data)(?:/|$)", "}"
)  # fmt: skip


def policy_rules() -> tuple[Words, ...]:
    """From the record as the map has it to `txn.policy`, where it has one, and `txn.record` without it."""
    begins = ("{", "var(txn.record)", "-m", "beg", POLICY_WORD, "}")
    return (
        _set("policy", "var(txn.record),field(1,|)", begins),
        _set("record", "var(txn.record),field(2,|,0)", _POLICY),
    )


def guard_rules(key_map: str, hops: HopRules) -> tuple[Words, ...]:
    """Refuse, give a token, or let pass: after the look-up, before anybody answers.

    Args:
        key_map: The file of `core.tokens.render_key_map`.
        hops: How far the answer that has a token goes.
    """
    return (
        # In the order of what is most often so: the first one that holds makes the others cheap.
        _set("asked", "bool(true)", KNOWN, _POLICY),
        _set("asked", "bool(true)", KNOWN, _HAS_TOKEN),
        # A PUT asks for a token, or for nothing that there is.
        _set("asked", "bool(true)", KNOWN, ("{", "method", "PUT", "}")),
        _set("asked", "bool(true)", KNOWN, ("{", "path", TOKEN_PATH, "}")),
        *_path(),
        *_give(key_map, hops[0]),
        *_check(key_map),
        *hops[1],
        *_require(),
    )


def note_forwarded(*, behind_proxy: bool) -> tuple[Words, ...]:
    """Whether somebody had the guest ask, for rules that want to know: before its headers are deleted.

    Args:
        behind_proxy: `X-Forwarded-For` is there in every request, and not the guest's.
    """
    wanted = ("{", "var(txn.policy),bytes(6,1)", "-m", "str", "g", "}")
    unknown = _none_of(KNOWN)
    signs: list[Words] = [("{", "req.hdrs", "-m", "reg", _FORWARDED, "}"), _FOREIGN_HOST]
    if not behind_proxy:
        signs.append(_FORWARDED_FOR)
    put = (
        ()
        if behind_proxy
        else (_set("forwarded_for", "bool(true)", ("{", "method", "PUT", "}"), _FORWARDED_FOR),)
    )
    return (
        *put,
        *(_set("forwarded", "bool(true)", wanted, sign) for sign in signs),
        # The resolver finds out who asks, and then these rules are gone through again.
        *(_set("forwarded", "bool(true)", *unknown, sign) for sign in signs),
    )  # fmt: skip


def tell_forwarded() -> tuple[Words, ...]:
    """Tell the resolver, which tells `hear_forwarded`."""
    return (
        ("http-request", "set-header", HEADER_FORWARDED, "by", "if", *_IS_FORWARDED),
        ("http-request", "set-header", HEADER_FORWARDED, "for", "if", *_IS_FORWARDED_FOR),
    )


def hear_forwarded() -> tuple[Words, ...]:
    """The reverse, where a request comes back from the resolver."""
    told = f"req.fhdr({HEADER_FORWARDED})"
    return (
        _set("forwarded", "bool(true)", ("{", told, "-m", "found", "}")),
        _set("forwarded_for", "bool(true)", ("{", told, "-m", "str", "for", "}")),
    )


def tell_token_life() -> Words:
    """Say with each answer to a good token how many seconds it has left, as EC2 does."""
    return ("http-after-response", "set-header", _TTL_HEADER, "%[var(txn.left)]",
            "if", "{", "var(txn.left)", "-m", "found", "}")  # fmt: skip


def _rule(action: Words, *conditions: Words) -> Words:
    return (*action, "if", *(word for condition in conditions for word in condition))


def _set(variable: str, expression: str, *conditions: Words) -> Words:
    return _rule(("http-request", f"set-var(txn.{variable})", expression), *conditions)


def _answer(status: int, *conditions: Words, allow: str | None = None) -> Words:
    more = () if allow is None else ("hdr", "Allow", allow)
    return _rule(("http-request", "return", "status", str(status), *more), *conditions)


def _letter(index: int, letter: str) -> Words:
    """A letter of the policy word (`core.policy.render_policy_word`)."""
    return ("{", f"var(txn.policy),bytes({index},1)", "-m", "str", "--", letter, "}")


def _path() -> tuple[Words, ...]:
    return (
        _answer(403, _ASKED, _letter(1, "0")),
        _set("path", "path", _ASKED),
        _rule(("http-request", "unset-var(txn.path)"), _ASKED, _ODD),
        _set("path", _UNDONE, _ASKED, _ODD),
        # Nothing that there is has such a path: whoever sends it tries to pass by a rule.
        _answer(400, _ASKED, _POLICY, ("!{", "var(txn.path)", "-m", "found", "}")),
        _answer(400, _ASKED, _POLICY, _UP),
        _answer(400, _ASKED, _POLICY, _NUL),
        _set("route", "bool(true)", _ASKED, ("{", "var(txn.path)", "-m", "reg", f"^{TOKEN_PATH}/?$", "}")),
        _set("instance", "var(txn.record),field(1,|)", _ASKED),
        _set("instance", "var(txn.record),field(3,|)", _ASKED, NOVA),
        _set("epoch", "int(0)", _ASKED),
        _set("epoch", "var(txn.policy),field(2,:)", _ASKED, _POLICY),
    )  # fmt: skip


def _give(key_map: str, limit: tuple[Words, ...]) -> tuple[Words, ...]:
    ttl = f"req.fhdr({_TTL_HEADER})"
    put = ("{", "method", "PUT", "}")
    return (
        _answer(404, _TOKEN_ROUTE, _letter(2, "-")),
        _answer(405, _TOKEN_ROUTE, ("!{", "method", "PUT", "}"), allow="OPTIONS, PUT"),
        # Under a dated version there is none (AWS).
        _answer(403, _ASKED, put, ("{", "var(txn.path)", "-m", "reg", "^/[0-9][^/]*/api/token/?$", "}")),
        # Whoever has a proxy fetch a token has it fetch the rest as well.
        _answer(403, _TOKEN_ROUTE, _IS_FORWARDED_FOR),
        _answer(400, _TOKEN_ROUTE, ("!{", f"req.fhdr_cnt({_TTL_HEADER})", "1", "}")),
        _answer(400, _TOKEN_ROUTE, ("!{", ttl, "-m", "reg", "^[0-9]{1,5}$", "}")),
        _answer(400, _TOKEN_ROUTE, ("!{", ttl, "-m", "int", f"1:{TTL_LIMIT_S}", "}")),
        _set("ttl", f"{ttl},add(0)", _TOKEN_ROUTE),
        _set("kid", f"str({CURRENT}),map_str({key_map})", _TOKEN_ROUTE),
        _set("until", "date,add(txn.ttl)", _TOKEN_ROUTE),
        *_sign(key_map, "%[var(txn.kid)].%[var(txn.until)]", _TOKEN_ROUTE),
        *limit,
        _rule(("http-request", "return", "status", "200", "content-type", "text/plain",
               "hdr", _TTL_HEADER, "%[var(txn.ttl)]", "lf-string", "%[var(txn.said)].%[var(txn.mac)]"),
              _TOKEN_ROUTE, ("{", "var(txn.mac)", "-m", "found", "}")),
        # No key is known: whoever made the configuration wrote the map first, so somebody took it away.
        _answer(503, _TOKEN_ROUTE),
    )  # fmt: skip


def _sign(key_map: str, said: str, *conditions: Words) -> tuple[Words, ...]:
    """`txn.mac` over `txn.said` and whom it is bound to, by the key whose kid `txn.kid` is."""
    bound = "%[var(txn.said)]|%[var(sess.network)]|%[var(txn.instance)]|%[var(txn.epoch)]"
    return (
        _set("key", f"var(txn.kid),map_str({key_map})", *conditions),
        _rule(("http-request", "set-var-fmt(txn.said)", said), *conditions),
        _rule(("http-request", "set-var-fmt(txn.bound)", bound), *conditions),
        _set("mac", "var(txn.bound),hmac(sha256,txn.key),ub64enc", *conditions),
    )


def _check(key_map: str) -> tuple[Words, ...]:
    token = f"req.fhdr({_TOKEN_HEADER})"
    given = ("{", "var(txn.token)", "-m", "found", "}")
    return (
        # While there is no token route a token is a header like any other.
        _rule(("http-request", "set-var(txn.token)", token), _ASKED, _HAS_TOKEN, *_none_of(_letter(2, "-"))),
        _answer(401, given, ("!{", f"req.fhdr_cnt({_TOKEN_HEADER})", "1", "}")),
        # The whole of it: `field` alone takes what has more behind.
        _answer(401, given, ("!{", "var(txn.token)", "-m", "reg", TOKEN_PATTERN, "}")),
        _set("kid", "var(txn.token),field(1,.)", given),
        *_sign(key_map, "%[var(txn.token),field(1,.,2)]", given),
        _set("claimed", "var(txn.token),field(3,.)", given),
        _answer(401, given, ("!{", "var(txn.claimed),secure_memcmp(txn.mac)", "}")),
        _set("now", "date", given),
        _set("life", "var(txn.token),field(2,.),sub(txn.now)", given),
        _answer(401, given, ("{", "var(txn.life)", "-m", "int", "le", "0", "}")),
        _set("left", "var(txn.life)", given),
    )  # fmt: skip


def _require() -> tuple[Words, ...]:
    tree = ("{", "var(txn.mode)", "-m", "str", "r", "}")
    return (
        _set("now", "date", _POLICY),
        _set("booting", "var(txn.policy),field(3,:),sub(txn.now)", _POLICY),
        _set("mode", "var(txn.policy),bytes(3,1)", _POLICY),
        _set("mode", "var(txn.policy),bytes(4,1)", _POLICY, _OPENSTACK),
        _set("mode", "var(txn.policy),bytes(5,1)", _POLICY, _NOCLOUD),
        _answer(401, _POLICY, tree, _NO_GOOD_TOKEN, *_none_of(_OPENSTACK, _NOCLOUD)),
        _answer(401, _POLICY, tree, _NO_GOOD_TOKEN, _BOOTED),
        _answer(403, _POLICY, _letter(6, "g"), _NO_GOOD_TOKEN, _IS_FORWARDED),
        _answer(403, _POLICY, _letter(7, "s"), _BOOTED, _USER_DATA),
    )  # fmt: skip


def _none_of(*conditions: Words) -> tuple[Words, ...]:
    return tuple(("!" + condition[0], *condition[1:]) for condition in conditions)
