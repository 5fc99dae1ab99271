"""Values of a fleet that etcd may not forget: memberships of hosts, revocations of operators, and guards. Pure.

Each of these keys has an order in which its value only grows. After a restore etcd's revisions say nothing of what is
newer; this order does. So two values of a key, of whatever history of etcd, always have one join.
"""

from __future__ import annotations

from typing import Final

from imdsproxy.core.fleet.layout import CERTIFICATES, GUARDS, HOSTS, parse_guard, render_guard
from imdsproxy.core.fleet.members import HostState, StoredHost, parse_host, parse_operator
from imdsproxy.core.policy import OperatorOverride

LASTING: Final = (HOSTS, CERTIFICATES, GUARDS)
"""How their keys begin."""

EPOCHS: Final = 2**40
"""Epochs of an instance in one incarnation: more than etcd has revisions between two acceptances."""


def is_lasting(key: str) -> bool:
    """Whether a key is one of these."""
    return key.startswith(LASTING)


def join_values(key: str, known: bytes, found: bytes) -> bytes:
    """Return the join of two values of a key: `found` itself if nothing of it is older.

    Raises:
        Unreadable: `found` is not what hubs write.
    """
    if key.startswith(HOSTS):
        newer = _order(parse_host(found)) >= _order(parse_host(known))
        return found if newer else known
    if key.startswith(GUARDS):
        before, after = parse_guard(known), parse_guard(found)
        joined = join_overrides(before, after)
        # An equal value stays byte for byte, so that hubs agree on what etcd has to have.
        return found if joined == after else known if joined == before else render_guard(joined)
    parse_operator(found)
    return found


def join_overrides(one: OperatorOverride, other: OperatorOverride) -> OperatorOverride:
    """Return the join of two guards: neither a revocation nor a reopening is taken back."""
    return OperatorOverride(max(one.epoch, other.epoch), max(one.reopened_at, other.reopened_at))


def _order(stored: StoredHost) -> tuple[int, int, bool]:
    return stored.revocations, stored.version, stored.state is HostState.REVOKED


def describe_regained(key: str, value: bytes, *, absent: bool) -> tuple[str, str]:
    """Return whose value etcd had lost, and what the value says, for operators.

    Args:
        key: One of these.
        value: What hubs put back.
        absent: Whether etcd had no value at all.
    """
    if key.startswith(GUARDS):
        return (
            f"instance {key.removeprefix(GUARDS)}",
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
