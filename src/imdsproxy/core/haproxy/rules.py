"""Rules that more than one section needs: what of a guest's request goes on, and who asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from imdsproxy.core.haproxy.section import Words
from imdsproxy.core.wire import MAP_CONFLICT, MAP_NOVA, RETRY_AFTER_S

__all__ = [
    "CONFLICT",
    "GUEST_HEADERS",
    "KNOWN",
    "METHODS",
    "NOVA",
    "TOKEN_HEADERS",
    "HAS_POLICY",
    "OF_A_PROXY",
    "READS",
    "PUT",
    "TOKEN_ROUTE",
    "UNDONE",
    "allow_methods",
    "delete_guest_headers",
    "milliseconds",
    "negated",
    "originate",
    "refuse_forwarded_token",
    "refuse_lengths",
    "retry_later",
    "retry_later_slowly",
    "tell_to_continue",
]

GUEST_HEADERS: Final = (
    "accept",
    "content-length",
    "content-type",
    "host",
    "if-[a-z-]+",
    "range",
    "transfer-encoding",
    "user-agent",
)
"""What of a guest's headers goes on, as regular expressions on lower-case names; all else is deleted."""

TOKEN_HEADERS: Final = ("x-aws-ec2-metadata-token", "x-aws-ec2-metadata-token-ttl-seconds")
"""What goes on to our own processes beside; Nova has nothing to do with tokens."""

_LENGTH_DIGITS: Final = 18
"""As many as every number of them is less than 2 to the power of 63."""

METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")

KNOWN: Final[Words] = ("{", "var(txn.record)", "-m", "sub", "|", "}")
"""The record is an instance's."""

NOVA: Final[Words] = ("{", "var(txn.record)", "-m", "beg", MAP_NOVA, "}")
"""The record is of an instance whose documents Nova has."""

CONFLICT: Final[Words] = ("{", "var(txn.record)", "-m", "str", MAP_CONFLICT, "}")


READS: Final[Words] = ("{", "method", "GET", "HEAD", "}")
PUT: Final[Words] = ("{", "method", "PUT", "}")

UNDONE: Final = r'path,url_dec,regsub("/(?:\.?/)*(?:\.$)?",/,g),regsub("^/ec2(?=/|$)","")'
"""The path without escapes, doubled slashes and dot segments that lead nowhere."""

HAS_POLICY: Final[Words] = ("{", "var(txn.policy)", "-m", "found", "}")
"""The record has a policy word."""

OF_A_PROXY: Final[Words] = ("{", "var(sess.router)", "-m", "found", "}")
"""It comes through one of Neutron's proxies: `X-Forwarded-For` is that one's, and so are its packets."""

TOKEN_ROUTE: Final[Words] = ("{", "var(txn.route)", "-m", "found", "}")
"""A token is asked for."""


def negated(condition: Words) -> Words:
    """The same condition, where it does not hold."""
    return ("!" + condition[0], *condition[1:])


def allow_methods(*, nova: bool = False) -> tuple[Words, ...]:
    """Refuse methods that nothing here knows: CONNECT came back 200 from HAProxy itself.

    `Allow` names what the resource takes (RFC 9110 §10.2.1): Nova takes every method, of our documents only a
    password's place takes more than reads.
    """
    refuse: Words = ("http-request", "return", "status", "405", "hdr", "Allow")
    unknown: Words = ("if", "!{", "method", *METHODS, "}")
    if nova:
        return ((*refuse, ", ".join(METHODS), *unknown),)
    password = ("{", "path", "-m", "reg", "^/openstack/[^/]+/password/*$", "}")
    return (
        (*refuse, "GET, HEAD, POST", *unknown, *password),
        (*refuse, "GET, HEAD", *unknown),
    )


def originate() -> Words:
    """The absolute form of a target becomes the origin form (RFC 9112 §3.2); nothing else of it is touched."""
    return ("http-request", "set-uri", "%[pathq]", "unless", "{", "url_beg", "/", "}",
            "or", "{", "url", "-m", "str", "*", "}")  # fmt: skip


def tell_to_continue() -> Words:
    """Ask for the body that a guest holds back (RFC 9110 §10.1.1): `Expect` does not go on, so nobody else would."""
    return ("http-request", "wait-for-body", "time", "10s",
            "if", "{", "req.fhdr(expect)", "-m", "found", "}")  # fmt: skip


def refuse_forwarded_token(*forwarded: str) -> tuple[Words, ...]:
    """Refuse a request for a token that another program forwarded, however its path is spelled.

    For those that delete `X-Forwarded-For`, or can't know whose a request is that has two: before `haproxy.guard`.

    Args:
        forwarded: The condition under which it was.
    """
    return (
        ("http-request", "set-var(txn.path)", UNDONE, "if", *PUT),
        ("http-request", "return", "status", "403",
         "if", *PUT, *forwarded, "{", "var(txn.path)", "-m", "end", "/api/token", "/api/token/", "}"),
    )  # fmt: skip


def refuse_lengths() -> Words:
    """Refuse lengths of a body that no 64 bits hold.

    HAProxy 3.0.11 takes `18446744073709551616` for 0 and one more for 1, and sends it on as it is: who is behind waits
    for the rest, and takes the next guest's request on that connection for it.
    """
    return ("http-request", "return", "status", "400",
            "if", "{", "req.fhdr(content-length)", "-m", "len", f"{_LENGTH_DIGITS + 1}:", "}")  # fmt: skip


def delete_guest_headers(kept: Iterable[str] = GUEST_HEADERS) -> Words:
    """Delete every header whose lower-case name matches none of `kept`."""
    return ("http-request", "del-header", f"^(?!(?:{'|'.join(kept)})$)", "-m", "reg")


def retry_later(seconds: int = RETRY_AFTER_S) -> Words:
    """Answer 503: clients come again."""
    return ("http-request", "return", "status", "503", "hdr", "Retry-After", str(seconds))


def retry_later_slowly() -> Words:
    """Answer 503 after `timeout tarpit`: who asks again at once costs its neighbours more than by the answers."""
    return ("http-request", "tarpit", "status", "503", "hdr", "Retry-After", str(RETRY_AFTER_S))


def milliseconds(seconds: float) -> str:
    """A time as HAProxy takes it."""
    return f"{round(seconds * 1000)}ms"
