"""What a guest may read, in HAProxy's rules: the policy word, session tokens, sealed user-data.

Rules look at a copy of the path in which everything is undone that Nova or our documents undo: escapes, doubled
slashes, dot segments that lead nowhere, `/ec2` before a version. What of a path is ambiguous beyond that is
refused where a rule could be passed by it. The path itself goes on as it came.

A request that has no token, and whose record has no policy word, does not come here: `note_asked` sends the others to
backends of their own.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.haproxy.audit import TOKEN_HEARD, marked, passed, without_marks
from imdsproxy.core.haproxy.counting import COUNTED, count_in_passing, count_sampled
from imdsproxy.core.haproxy.hops import limit_hops, release_hops
from imdsproxy.core.haproxy.limits import said_share
from imdsproxy.core.haproxy.model import DataplaneSpec, Paths, Words
from imdsproxy.core.haproxy.rules import (
    HAS_POLICY,
    KNOWN,
    NOVA,
    OF_A_PROXY,
    PUT,
    READS,
    TOKEN_HEADERS,
    TOKEN_ROUTE,
    UNDONE,
    negated,
    retry_later,
)
from imdsproxy.core.path_rules import TOKEN_PATH, WITHIN_OTHER_TREES
from imdsproxy.core.policy import LONGEST_BOOT_S
from imdsproxy.core.policy_word import POLICY_WORD
from imdsproxy.core.tokens import CURRENT, TOKEN_PATTERN, TTL_LIMIT_S
from imdsproxy.core.wire import HEADER_FORWARDED

__all__ = [
    "ASKED",
    "GUARDED",
    "TOKENS_OFF",
    "guard_rules",
    "hear_forwarded",
    "looked_at",
    "note_asked",
    "pass_at_once",
    "policy_rules",
    "send_forwarded",
    "tell_forwarded",
]

_TOKEN_HEADER, _TTL_HEADER = TOKEN_HEADERS

_FORWARDED: Final = (
    r"(?im)^(?:forwarded|via|origin|referer|sec-fetch-[^:]*|x-forwarded(?!-for:)[^:]*):"
)
"""What a guest's own programs do not send: somebody had a browser or a proxy of its ask."""

_FORWARDED_FOR: Final = ("{", "req.fhdr_cnt(x-forwarded-for)", "gt", "0", "}")
_FOREIGN_HOST: Final = (
    "!{", "req.fhdr(host)", "-m", "reg", r"(?i)^(?:169\.254\.169\.254|\[fe80::a9fe:a9fe(?:%[^\]]*)?\])?(?::80)?$", "}"
)  # fmt: skip

_LATEST: Final = (
    'var(txn.path),regsub("^/openstack/(?!content(?:/|$))[^/]+",/openstack/latest)'
    ',regsub("^/(?!(?:openstack|nocloud)(?:/|$))[^/]+",/latest)'
)
"""As `core.path_rules.plain_path`."""

_ODD: Final = ("{", "path", "-m", "reg", r"%|//|/\.|^/ec2", "}")
_UP: Final = ("{", "var(txn.path)", "-m", "reg", r"(?:^|/)\.\.(?:/|$)", "}")
_NUL: Final = ("{", "path", "-m", "sub", "%00", "}")

_THE_TOKEN: Final = "var(txn.token)"  # noqa: S105 - where it is
_SAID_LENGTH: Final = 19
"""Of `KID.EXPIRY`: eight hexadecimal digits, a dot, ten decimal ones (`core.tokens.TOKEN_PATTERN`)."""

_BEARER: Final = "var(txn.record),concat(|,txn.policy),concat(|,sess.network)"
"""All that a token's being good depends on, beside itself, its end and its key."""

_AS_BEFORE: Final = (
    ("{", f"{_THE_TOKEN},strcmp(sess.token)", "-m", "int", "0", "}"),
    ("{", f"{_BEARER},strcmp(sess.bearer)", "-m", "int", "0", "}"),
)
"""It was good on this connection, for the same. By parts: to put them together first costs as much again."""

_MAC: Final = (
    "concat(|,sess.network),concat(|,txn.instance),concat(|,txn.epoch),hmac(sha256,txn.key),ub64enc"
)
"""Of `KID.EXPIRY`, for whom a token is (`core.tokens.mint_token`)."""

ASKED: Final = ("{", "var(txn.asked)", "-m", "found", "}")
"""There is something to look at of the request."""

GUARDED: Final = ".guarded"
"""How the name of a backend ends that looks at requests (`looked_at`) before it does what the other one does."""

TOKENS_OFF: Final = ("{", "var(txn.policy)", "-m", "beg", f"{POLICY_WORD}1-ooo---:", "}")
"""The policy's letters say that tokens are off, and nothing else."""

_GIVEN: Final = ("{", _THE_TOKEN, "-m", "found", "}")
_SEEN: Final = ("{", "var(txn.seen)", "-m", "found", "}")
_NO_GOOD_TOKEN: Final = ("!{", "var(txn.left)", "-m", "found", "}")
_UNMET: Final = ("{", "var(txn.unmet)", "-m", "found", "}")
_PLAIN_ROUTE: Final = ("{", "path", TOKEN_PATH, "}")
_IS_FORWARDED: Final = ("{", "var(txn.forwarded)", "-m", "found", "}")
_IS_FORWARDED_FOR: Final = ("{", "var(txn.forwarded_for)", "-m", "found", "}")
_BOOTED: Final = ("!{", "var(txn.booting)", "-m", "int", f"1:{LONGEST_BOOT_S}", "}")
"""As `core.policy.boot_is_over`."""
# Whatever else begins so is nothing to Nova or to our documents.
_OPENSTACK: Final = ("{", "var(txn.path)", "-m", "beg", "/openstack", "}")
_NOCLOUD: Final = ("{", "var(txn.path)", "-m", "beg", "/nocloud", "}")
_OTHERS: Final = ("{", "var(txn.path)", "-m", "beg", *WITHIN_OTHER_TREES, "}")
_HAS_PATHS: Final = ("{", "var(txn.set)", "-m", "found", "}")
_USER_DATA: Final = (
    "{", "var(txn.path)", "-m", "reg", "^/(?:openstack/[^/]+/user_data|[^/]+/user-data)(?:/|$)", "}"
)  # fmt: skip


def policy_rules() -> tuple[Words, ...]:
    """From the record as the map has it to `txn.policy`, where it has one, and `txn.record` without it."""
    begins = ("{", "var(txn.record)", "-m", "beg", POLICY_WORD, "}")
    return (
        _set("policy", "var(txn.record),field(1,|)", begins),
        _set("record", "var(txn.record),field(2,|,0)", HAS_POLICY),
    )


def note_asked() -> tuple[Words, ...]:
    """Whether there is anything to look at of a request, after the look-up: then a guarded backend answers it.

    Most often there is not, so no more than this is in everybody's way. In each condition comes first what is most
    often not so.
    """
    return (
        _set("token", f"req.fhdr({_TOKEN_HEADER})"),
        ("http-request", "set-var(txn.asked)", "bool(true)", "if", *HAS_POLICY, "or", *_GIVEN, *KNOWN,
         # A PUT asks for a token, or for nothing that there is.
         "or", *PUT, *KNOWN, "or", *_PLAIN_ROUTE, *KNOWN),
    )  # fmt: skip


def pass_at_once(key_map: str, unless: Words = ()) -> tuple[Words, ...]:
    """What of it need not be looked at after all, for who answers out of the cache: there a backend costs a third.

    That is a token that was good on this connection, for the same record and under the same policy, but for its end
    and its key; and a policy that says no more than that tokens are off.

    Args:
        key_map: The file of `core.tokens.render_key_map`.
        unless: A condition under which a guarded backend has something else to look at.
    """
    plain = (READS, *_none_of(_PLAIN_ROUTE), *((negated(unless),) if unless else ()))
    return (
        _set("left", "date,neg,add(sess.until)", _GIVEN, *_AS_BEFORE),
        _rule(("http-request", "unset-var(txn.asked)"), ("{", "var(txn.left)", "-m", "int", "gt", "0", "}"), *plain,
              ("{", f"{_THE_TOKEN},bytes(0,8),map_str({key_map})", "-m", "found", "}"),
              ("{", f"req.fhdr_cnt({_TOKEN_HEADER})", "1", "}")),
        # Tokens are off, and nothing else is said.
        _rule(("http-request", "unset-var(txn.asked)"), ASKED,
              TOKENS_OFF, *plain),
        _tell_token_life(),
    )  # fmt: skip


def looked_at(spec: DataplaneSpec, kind: str, *, nova: bool = False) -> tuple[Words, ...]:
    """The first rules of a backend: refuse, give a token, or let pass; count; or nothing.

    Args:
        spec: What is to be built.
        kind: How the backend's name ends: `GUARDED`, `COUNTED`, or not with either.
        nova: Its documents are Nova's.
    """
    if kind == COUNTED:
        return count_sampled(spec.count_reads, nova=nova)
    if kind == GUARDED:
        return (
            *said_share(spec),
            *guard_rules(spec.paths, one_in=spec.count_reads, audited=bool(spec.audit)),
        )
    return ()


def guard_rules(paths: Paths, *, one_in: int = 0, audited: bool = False) -> tuple[Words, ...]:
    """Refuse, give a token, or let pass.

    Args:
        paths: Has the maps of keys and of path rules.
        one_in: Of so many reads without a token one is counted; 0 for those that are refused only.
        audited: Mark which rule refuses.
    """
    rules = (
        _tell_token_life(),
        *_path(),
        *_check(paths.token_keys),
        *release_hops(),
        *_give(paths.token_keys),
        *_look_up_path(paths.path_rules),
        *_require(one_in),
        passed(),
    )
    return rules if audited else without_marks(rules)


def _give(key_map: str) -> tuple[Words, ...]:
    ttl = f"req.fhdr({_TTL_HEADER})"
    latest = ("{", "var(txn.path)", "-m", "str", TOKEN_PATH, f"{TOKEN_PATH}/", "}")
    return (
        _set("route", "bool(true)", ("{", "var(txn.path)", "-m", "end", "/api/token", "/api/token/", "}")),
        # A page that has its own name lead here (DNS rebinding) may send any header and any method.
        marked("forwarded"),
        *_refuse_forwarded(TOKEN_ROUTE, _NO_GOOD_TOKEN),
        marked("token-request"),
        _answer(404, TOKEN_ROUTE, _letter(2, "-")),
        # Under a dated version there is none (AWS).
        _answer(403, TOKEN_ROUTE, PUT, *_none_of(latest)),
        _answer(404, TOKEN_ROUTE, *_none_of(latest)),
        _answer(405, TOKEN_ROUTE, *_none_of(PUT), allow="PUT"),
        # Whoever has a proxy fetch a token has it fetch the rest as well.
        _answer(403, TOKEN_ROUTE, _IS_FORWARDED_FOR),
        _answer(403, TOKEN_ROUTE, _FORWARDED_FOR, *_none_of(OF_A_PROXY)),
        _answer(400, TOKEN_ROUTE, ("!{", f"req.fhdr_cnt({_TTL_HEADER})", "1", "}")),
        _answer(400, TOKEN_ROUTE, ("!{", ttl, "-m", "reg", "^[0-9]{1,5}$", "}")),
        _answer(400, TOKEN_ROUTE, ("!{", ttl, "-m", "int", f"1:{TTL_LIMIT_S}", "}")),
        *_whose(TOKEN_ROUTE),
        _set("ttl", f"{ttl},add(0)", TOKEN_ROUTE),
        _set("until", "date,add(txn.ttl)", TOKEN_ROUTE),
        _set("kid", f"str({CURRENT}),map_str({key_map})", TOKEN_ROUTE),
        _set("key", f"var(txn.kid),map_str({key_map})", TOKEN_ROUTE),
        _set("said", "var(txn.kid),concat(.,txn.until)", TOKEN_ROUTE),
        _set("mac", f"var(txn.said),{_MAC}", TOKEN_ROUTE),
        *limit_hops(),
        passed((*TOKEN_ROUTE, "{", "var(txn.mac)", "-m", "found", "}")),
        _rule(("http-request", "return", "status", "200", "content-type", "text/plain",
               "hdr", _TTL_HEADER, "%[var(txn.ttl)]", "lf-string", "%[var(txn.said)].%[var(txn.mac)]"),
              TOKEN_ROUTE, ("{", "var(txn.mac)", "-m", "found", "}")),
        # No key is known: the map is written before any configuration, so somebody took it away.
        marked("no-key"),
        _rule(retry_later(), TOKEN_ROUTE),
    )  # fmt: skip


def tell_forwarded() -> tuple[Words, ...]:
    """Note for the resolver what the guest's headers say, before they are deleted; then comes `send_forwarded`."""
    return (
        *(_set("forwarded", "bool(true)", *sign) for sign in _SIGNS),
        _set("forwarded_for", "bool(true)", PUT, _FORWARDED_FOR, *_none_of(OF_A_PROXY)),
    )


def send_forwarded() -> tuple[Words, ...]:
    """What `tell_forwarded` has found, once the guest's headers are deleted."""
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


def _tell_token_life() -> Words:
    """Say with each answer to a good token how many seconds it has left, as EC2 does."""
    return ("http-after-response", "set-header", _TTL_HEADER, "%[var(txn.left)]",
            "if", "{", "var(txn.left)", "-m", "int", "gt", "0", "}")  # fmt: skip


def _rule(action: Words, *conditions: Words) -> Words:
    return (
        (*action, "if", *(word for condition in conditions for word in condition))
        if conditions
        else action
    )


def _set(variable: str, expression: str, *conditions: Words) -> Words:
    return _rule(("http-request", f"set-var(txn.{variable})", expression), *conditions)


def _answer(status: int, *conditions: Words, allow: str | None = None) -> Words:
    more = () if allow is None else ("hdr", "Allow", allow)
    return _rule(("http-request", "return", "status", str(status), *more), *conditions)


def _letter(index: int, letter: str) -> Words:
    """A letter of the policy word (`core.policy.render_policy_word`)."""
    return ("{", f"var(txn.policy),bytes({index},1)", "-m", "str", "--", letter, "}")


def _none_of(*conditions: Words) -> tuple[Words, ...]:
    return tuple(map(negated, conditions))


_SIGNS: Final = (
    (("{", "req.hdrs", "-m", "reg", _FORWARDED, "}"),),
    (_FOREIGN_HOST,),
    (_FORWARDED_FOR, *_none_of(OF_A_PROXY)),
)
"""Each says that somebody had the guest ask."""


def _refuse_forwarded(*conditions: Words) -> tuple[Words, ...]:
    signs = ((_IS_FORWARDED,), *_SIGNS)
    return tuple(_answer(403, *conditions, _letter(6, "g"), *sign) for sign in signs)


def _path() -> tuple[Words, ...]:
    odd = ("{", "var(txn.odd)", "-m", "found", "}")
    return (
        marked("endpoint"),
        _answer(403, ("{", "var(txn.policy)", "-m", "beg", f"{POLICY_WORD}0", "}")),
        marked("path"),
        _set("odd", "bool(true)", _ODD),
        _set("path", "path", *_none_of(odd)),
        _set("path", UNDONE, odd),
        # Nothing that there is has such a path: whoever sends it tries to pass by a rule.
        _answer(400, odd, HAS_POLICY, ("!{", "var(txn.path)", "-m", "found", "}")),
        _answer(400, odd, HAS_POLICY, _UP),
        _answer(400, odd, HAS_POLICY, _NUL),
    )


def _whose(*conditions: Words) -> tuple[Words, ...]:
    """Whom a token is for, beside the network."""
    return (
        _set("instance", "var(txn.record),field(1,|)", *conditions),
        _set("instance", "var(txn.record),field(3,|)", *conditions, NOVA),
        _set("epoch", "var(txn.policy),field(2,:)", *conditions, HAS_POLICY),
    )


def _check(key_map: str) -> tuple[Words, ...]:
    # What was good on this connection, for the same record and under the same policy, still is, but for its end.
    fresh = (_GIVEN, *_none_of(_SEEN))
    return (
        ("http-request", "unset-var(txn.left)"),
        # While there is no token route a token is a header like any other.
        _rule(("http-request", "unset-var(txn.token)"), _GIVEN, _letter(2, "-")),
        marked("token"),
        _rule(("http-request", f"unset-var({TOKEN_HEARD})")),
        _rule(("http-request", f"set-var({TOKEN_HEARD})", "str(bad)"), _GIVEN),
        _answer(401, _GIVEN, ("!{", f"req.fhdr_cnt({_TOKEN_HEADER})", "1", "}")),
        _set("key", f"{_THE_TOKEN},bytes(0,8),map_str({key_map})", _GIVEN),
        # Also of one that was good before: a key that was taken away is nobody's.
        _answer(401, _GIVEN, ("!{", "var(txn.key)", "-m", "found", "}")),
        _set("seen", "bool(true)", _GIVEN, *_AS_BEFORE),
        # The whole of it: what is cut out below says nothing of what stands behind.
        _answer(401, *fresh, ("!{", _THE_TOKEN, "-m", "reg", TOKEN_PATTERN, "}")),
        *_whose(*fresh),
        _set("mac", f"{_THE_TOKEN},bytes(0,{_SAID_LENGTH}),{_MAC}", *fresh),
        _answer(401, *fresh, ("!{", f"{_THE_TOKEN},bytes({_SAID_LENGTH + 1}),secure_memcmp(txn.mac)", "}")),
        _set("now", "date", _GIVEN),
        _set("life", f"{_THE_TOKEN},field(2,.),sub(txn.now)", _GIVEN),
        _answer(401, _GIVEN, ("{", "var(txn.life)", "-m", "int", "le", "0", "}")),
        _set("left", "var(txn.life)", _GIVEN),
        _rule(("http-request", f"set-var({TOKEN_HEARD})", "str(yes)"), _GIVEN),
        # `pass_at_once` lets it pass from now on, and so must nothing else be to look at.
        *(_rule(("http-request", f"set-var(sess.{name})", said), *fresh, *_none_of(_letter(7, "s"), _letter(9, "p")))
          for name, said in (
              ("token", _THE_TOKEN),
              ("bearer", _BEARER),
              ("until", f"{_THE_TOKEN},field(2,.),add(0)"),
          )),
    )  # fmt: skip


def _look_up_path(path_map: str) -> tuple[Words, ...]:
    """What is said of the path, as a letter of `core.path_rules.PathWord` in `txn.said`."""
    return (
        _set("set", "var(txn.policy),field(8,:)", _letter(9, "p")),
        _set("plain", _LATEST, _HAS_PATHS),
        # Where the request has no path at all, it is what is said of `/`.
        _set("said", f"var(txn.set),concat(|,txn.plain,/),map_beg({path_map})", _HAS_PATHS),
        # Each set says something of `/`. It is written before any record refers to it, so somebody took it away.
        marked("no-path-rules"),
        _rule(retry_later(), _HAS_PATHS, ("!{", "var(txn.said)", "-m", "found", "}")),
        marked("path-denied"),
        _answer(403, _said("d")),
    )  # fmt: skip


def _said(letter: str) -> Words:
    return ("{", "var(txn.said)", "-m", "str", letter, "}")


def _require(one_in: int) -> tuple[Words, ...]:
    boot_counts = _letter(8, "b")
    refused = (HAS_POLICY, _NO_GOOD_TOKEN)
    return (
        _set("now", "date", HAS_POLICY, boot_counts),
        _set("booting", "var(txn.policy),field(3,:),sub(txn.now)", HAS_POLICY, boot_counts),
        marked("token-required"),
        _set("unmet", "bool(true)", *refused, _letter(3, "r"), *_none_of(_OPENSTACK, _NOCLOUD)),
        _set("unmet", "bool(true)", *refused, _BOOTED, _letter(4, "r"), _OPENSTACK),
        _set("unmet", "bool(true)", *refused, _BOOTED, _letter(5, "r"), _NOCLOUD),
        _rule(("http-request", "unset-var(txn.unmet)"), _said("o")),
        _set("unmet", "bool(true)", _said("r"), _NO_GOOD_TOKEN, *_none_of(_OTHERS)),
        _set("unmet", "bool(true)", _said("r"), _NO_GOOD_TOKEN, _OTHERS, _BOOTED),
        *count_in_passing(
            one_in, (*HAS_POLICY, *_letter(4, "r"), *_OPENSTACK), (*HAS_POLICY, *_letter(5, "r"), *_NOCLOUD)
        ),
        marked("path-required", _said("r")),
        _answer(401, _UNMET),
        marked("forwarded"),
        *_refuse_forwarded(*refused),
        marked("sealed"),
        _answer(403, _BOOTED, _letter(7, "s"), _USER_DATA),
    )  # fmt: skip
