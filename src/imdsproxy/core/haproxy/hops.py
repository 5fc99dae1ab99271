"""How far a token's answer goes, in HAProxy's rules: a DSCP of which the kernel makes the hop limit.

The kernel sends what got lost once more with the DSCP that the connection has by then. So it stays until the guest has
shown the token that it got on the connection: then all of that answer has arrived. Until then, other answers on the
connection go no farther than the token. Another request on it does not say as much: whoever is too far away can send
one too. Nor does `fc_unacked`, which counts what was sent, and not what waits for the peer's window.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.haproxy.model import Words
from imdsproxy.core.haproxy.rules import (
    HAS_POLICY,
    OF_A_PROXY,
    TOKEN_ROUTE,
    negated,
    retry_later,
)
from imdsproxy.core.hop_limit import NEXT_TO_MARK, UNLIMITED, WITHHELD

__all__ = ["limit_hops", "release_hops"]

_LIMITED: Final = ("{", "var(txn.hops)", "-m", "int", "lt", str(UNLIMITED), "}")
_OF_THE_RESOLVER: Final = ("{", "var(sess.found)", "-m", "found", "}")


def limit_hops() -> tuple[Words, ...]:
    """Before a token is given.

    Behind Neutron's proxies nothing is done: its packets are not ours. What comes from the resolver is told to come
    again: the guest's connection is another, and by its next request it is known.
    """
    withheld = ("{", "var(txn.hops)", "-m", "int", str(WITHHELD), "}")
    marked = ("{", "var(txn.hops)", "-m", "int", str(NEXT_TO_MARK + 1), "}")
    return (
        ("http-request", "set-var(txn.hops)", "var(txn.policy),field(4,:)",
         "if", *TOKEN_ROUTE, *HAS_POLICY, *negated(OF_A_PROXY)),
        (*retry_later(), "if", *TOKEN_ROUTE, *_OF_THE_RESOLVER, *_LIMITED),
        (*retry_later(), "if", *TOKEN_ROUTE, *withheld),
        ("http-request", "set-var(txn.hops)", f"int({NEXT_TO_MARK})", "if", *TOKEN_ROUTE, *marked),
        # The low two bits of the byte are not the DSCP's.
        ("http-request", "set-fc-tos", "var(txn.hops),mul(4)", "if", *TOKEN_ROUTE, *_LIMITED),
        ("http-request", "set-var(sess.given)", "var(txn.mac)", "if", *TOKEN_ROUTE, *_LIMITED),
    )  # fmt: skip


def release_hops() -> tuple[Words, ...]:
    """Once a token has been checked: the one that was given on this connection has arrived."""
    given = ("{", "var(txn.mac),strcmp(sess.given)", "eq", "0", "}")
    return (
        ("http-request", "set-fc-tos", "0", "if", "{", "var(txn.left)", "-m", "found", "}", *given),
    )
