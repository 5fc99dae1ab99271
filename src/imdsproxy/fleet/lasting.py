"""Fleet values that must survive a restore of etcd: host memberships, operator revocations and overrides. Pure.

Each of these keys has an order in which its value only grows. After a restore, etcd's revisions do not show which value
is newer; this order does. So any two values of a key have exactly one join, even from different histories of etcd.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.fleet.layout import CERTIFICATES, HOSTS, OVERRIDES, parse_override, render_override
from imdsproxy.fleet.members import HostState, StoredHost, parse_host, parse_operator
from imdsproxy.model.policy import OperatorOverride

LASTING: Final = (HOSTS, CERTIFICATES, OVERRIDES)
"""Prefixes of keys whose values must survive a restore."""

EPOCHS: Final = 2**40
"""Epochs of an instance in one incarnation: more than the revisions of etcd between two acceptances."""


def is_lasting(key: str) -> bool:
    """Return whether a key begins with one of `LASTING`."""
    return key.startswith(LASTING)


def join_values(key: str, known: bytes, found: bytes) -> bytes:
    """Return the join of two values of a key: `found` itself if no part of it is older.

    Raises:
        Unreadable: Another program than a hub wrote `found`.
    """
    if key.startswith(HOSTS):
        newer = _order(parse_host(found)) >= _order(parse_host(known))
        return found if newer else known
    if key.startswith(OVERRIDES):
        before, after = parse_override(known), parse_override(found)
        joined = join_overrides(before, after)
        # An equal value stays byte for byte, so that hubs agree on the value that etcd must have.
        return found if joined == after else known if joined == before else render_override(joined)
    parse_operator(found)
    return found


def join_overrides(one: OperatorOverride, other: OperatorOverride) -> OperatorOverride:
    """Return the join of two overrides: it reverts neither a revocation nor a reopening."""
    return OperatorOverride(max(one.epoch, other.epoch), max(one.reopened_at, other.reopened_at))


def _order(stored: StoredHost) -> tuple[int, int, bool]:
    return stored.revocations, stored.version, stored.state is HostState.REVOKED


def describe_regained(key: str, value: bytes, *, absent: bool) -> tuple[str, str]:
    """Return the owner of a value that etcd had lost, and the value's meaning, for operators.

    Args:
        key: Key of the value.
        value: Value that hubs restored.
        absent: Whether etcd had no value at all.
    """
    if key.startswith(OVERRIDES):
        return (
            f"instance {key.removeprefix(OVERRIDES)}",
            "tokens that were revoked, or the boot that was reopened, stay so",
        )
    if key.startswith(CERTIFICATES):
        return f"operator {key.removeprefix(CERTIFICATES)}", "stays revoked"
    name, stored = f"host {key.removeprefix(HOSTS)}", parse_host(value)
    if stored.state is HostState.REVOKED:
        return name, "stays revoked"
    if stored.state is HostState.INVITED:
        return name, "stays invited"
    if absent:
        return name, "stays a member, though it joined after the backup"
    return name, "keeps the certificate that it got after the backup"
