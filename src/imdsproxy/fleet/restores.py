"""Rules for values that survive a restore of etcd from a backup, and for the suspicion of a restore. Pure.

Host memberships, operator revocations, overrides and the issuer's keys must survive a restore. Each of these keys has
an order in which its value only grows. After a restore, etcd's revisions do not show which value is newer; this order
does. So any two values of a key have exactly one join, even from different histories of etcd.

A hub's claim of a restore stops writes. A single host may be compromised, so two hosts must agree, and their claims
count only while their memberships last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from imdsproxy.fleet.codec import attempt
from imdsproxy.fleet.layout import (
    CERTIFICATES,
    HOSTS,
    ISSUER,
    OVERRIDES,
    SUSPECT,
    HostId,
    HostState,
    Meta,
    StoredHost,
    StoredIssuer,
    Suspicion,
    View,
    host_key,
    parse_host,
    parse_issuer,
    parse_operator,
    parse_override,
    parse_suspicion,
    render_override,
)
from imdsproxy.model.policy import OperatorOverride

LASTING: Final = (HOSTS, CERTIFICATES, OVERRIDES, ISSUER)
"""Prefixes of keys whose values must survive a restore."""

EPOCHS: Final = 2**40
"""Epochs of an instance in one incarnation: more than the revisions of etcd between two acceptances."""


def is_lasting(key: str) -> bool:
    return key.startswith(LASTING)


def join_values(key: str, known: bytes, found: bytes) -> bytes:
    """Return the join of two values of a key: `found` itself if no part of it is older; raise `Unreadable`."""
    if key.startswith(HOSTS):
        newer = _order(parse_host(found)) >= _order(parse_host(known))
        return found if newer else known
    if key.startswith(OVERRIDES):
        before, after = parse_override(known), parse_override(found)
        joined = join_overrides(before, after)
        # An equal value stays byte for byte, so that hubs agree on the value that etcd must have.
        return found if joined == after else known if joined == before else render_override(joined)
    if key == ISSUER:
        # Two histories may have equally many changes: the bytes decide, so that hubs agree.
        return max(known, found, key=lambda value: (*_changes(parse_issuer(value)), value))
    parse_operator(found)
    return found


def _changes(stored: StoredIssuer) -> tuple[int, int]:
    return stored.replaced, stored.ring["sequence"]


def join_overrides(one: OperatorOverride, other: OperatorOverride) -> OperatorOverride:
    """Return the join of two overrides: it reverts neither a revocation nor a reopening."""
    return OperatorOverride(max(one.epoch, other.epoch), max(one.reopened_at, other.reopened_at))


def _order(stored: StoredHost) -> tuple[int, int, bool]:
    return stored.revocations, stored.version, stored.state is HostState.REVOKED


def describe_regained(key: str, value: bytes, *, absent: bool) -> tuple[str, str]:
    """Return the owner of a value that etcd had lost, and the value's meaning, for operators.

    `absent` says that etcd had no value at all.
    """
    if key.startswith(OVERRIDES):
        return (
            f"instance {key.removeprefix(OVERRIDES)}",
            "keeps its revoked tokens and its reopened boot",
        )
    if key == ISSUER:
        return "issuer of identity tokens", "keeps the keys that it got after the backup"
    if key.startswith(CERTIFICATES):
        return f"operator {key.removeprefix(CERTIFICATES)}", "stays revoked"
    return f"host {key.removeprefix(HOSTS)}", _describe_host(parse_host(value), absent=absent)


def _describe_host(stored: StoredHost, *, absent: bool) -> str:
    if stored.state is HostState.REVOKED:
        return "stays revoked"
    if stored.state is HostState.INVITED:
        return "stays invited"
    if absent:
        return "stays a member, though it joined after the backup"
    return "keeps the certificate that it got after the backup"


MOST_AHEAD: Final = 1000
"""Maximum lead of a host's incarnation over the fleet's: more than any series of restores loses."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence that etcd was restored from a backup: it lacks a revision or incarnation of a host, or `why` is enough.

    Attributes:
        host: Host that claims this; `None` for a hub's own evidence.
        regained: Values that hubs restore in etcd, by their owner (`describe_regained`).
    """

    why: str
    host: HostId | None = None
    revision: int = 0
    incarnation: int = 0
    regained: Mapping[str, str] = field(default_factory=dict)

    def is_refuted(self, revision: int, meta: Meta | None) -> bool:
        """Return whether etcd has the host's data at this revision."""
        if meta is None or meta.incarnation < self.incarnation:
            return False
        return 0 < self.revision <= revision or self.incarnation > 0


def member_in(view: View, host: HostId) -> StoredHost | None:
    """Return a host from the view; `None` if it is absent or unreadable."""
    found = view(host_key(host))
    return None if found is None else attempt(parse_host, found[0])


def read_suspicion(view: View) -> Suspicion | None:
    """Return the suspicion with its valid claims; `None` if there is none. Raises `Unreadable`."""
    found = view(SUSPECT)
    if found is None:
        return None
    return parse_suspicion(found[0]).of_members(lambda host: member_in(view, host))
