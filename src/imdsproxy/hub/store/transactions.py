"""Transactions of fleet writes, their terms, and the stored records that plans read. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from imdsproxy.errors import (
    NotFound,
    RestoreSuspected,
    RevisionOutdated,
    SourceCorrupt,
)
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import attempt
from imdsproxy.fleet.layout import (
    HostId,
    StoredInstance,
    StoredNetwork,
    View,
)
from imdsproxy.fleet.restores import EPOCHS, read_suspicion
from imdsproxy.hub.store.etcd_messages import Compare, absent, unchanged
from imdsproxy.model.entities import Instance, InstanceId, NetworkId
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records import (
    Refused,
    parse_instance,
)

MOST_OPERATIONS: Final = 128
"""Maximum per transaction (etcd's `--max-txn-ops`)."""

MOST_BYTES: Final = 1024 * 1024
"""Maximum size of one transaction's values; etcd accepts requests of 1.5 MiB (`--max-request-bytes`)."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Transaction:
    """Transaction that etcd commits if all comparisons hold, within a project (`Terms.scope`).

    Attributes:
        revision: Newest revision of the records that need no change.
        hosts: Hosts of the records, before and after the write.
    """

    compares: tuple[Compare, ...] = ()
    puts: Mapping[str, bytes] = field(default_factory=dict)
    deletes: tuple[str, ...] = ()
    revision: int = 0
    hosts: frozenset[HostId] = frozenset()
    scope: str | None = None

    @property
    def fits(self) -> bool:
        most = max(len(self.compares), len(self.puts) + len(self.deletes))
        return most <= MOST_OPERATIONS and sum(map(len, self.puts.values())) <= MOST_BYTES


@dataclass(frozen=True, slots=True)
class Terms:
    """Conditions of a write.

    Attributes:
        create: Refuse ids that exist.
        revision: Required revision of the stored record; `None` for any.
        scope: Project that the operator is limited to; `None` for all.
    """

    request: str
    now: int
    create: bool = False
    revision: int | None = None
    scope: str | None = None


@dataclass(slots=True)
class Draft:
    """Transaction while it is planned; raises `RestoreSuspected`."""

    view: View
    terms: Terms
    compares: dict[Compare, None] = field(default_factory=dict)
    puts: dict[str, bytes] = field(default_factory=dict)
    deletes: dict[str, None] = field(default_factory=dict)
    hosts: set[HostId] = field(default_factory=set)
    revision: int = 0
    freed: dict[str, InstanceId] = field(default_factory=dict)
    taken: dict[str, InstanceId] = field(default_factory=dict)
    unsuspected: Compare = field(init=False)

    def __post_init__(self) -> None:
        self.unsuspected = refuse_suspect(self.view)

    def finish(self) -> Transaction:
        """Return the transaction; it compares nothing if it writes nothing."""
        if not (self.puts or self.deletes):
            hosts = frozenset(self.hosts)
            return Transaction(revision=self.revision, hosts=hosts, scope=self.terms.scope)
        if self.terms.scope is not None:
            # The project's grant must not shrink between plan and commit.
            self.hold(layout.grant_key(self.terms.scope))
        return Transaction(
            (self.unsuspected, *self.compares),
            self.puts,
            # An address may move from one record of this write to another one.
            tuple(key for key in self.deletes if key not in self.puts),
            self.revision,
            frozenset(self.hosts),
            self.terms.scope,
        )

    def hold(self, key: str) -> None:
        """Require that the key still has the revision in the view."""
        found = self.view(key)
        self.compares[unchanged(key, 0 if found is None else found[1])] = None


def read_instance(view: View, instance: InstanceId) -> tuple[StoredInstance, int] | None:
    """Return a stored instance and its revision; `None` if it does not exist or was removed."""
    found = view(layout.instance_key(instance))
    if found is None:
        return None
    stored = readable(layout.parse_instance, found[0], f"instance {instance}")
    return None if stored.removed_at is not None else (stored, found[1])


def read_network(view: View, network: NetworkId) -> tuple[StoredNetwork, int] | None:
    """Return a stored network and its revision; `None` if it does not exist or was removed."""
    found = view(layout.network_key(network))
    if found is None:
        return None
    stored = readable(layout.parse_network, found[0], f"network {network}")
    return None if stored.removed_at is not None else (stored, found[1])


def record_of(stored: StoredInstance) -> Instance:
    """Return the record without its user data; raise `SourceCorrupt` if another program wrote it."""
    parsed = parse_instance(stored.record)
    if isinstance(parsed, Refused):
        raise SourceCorrupt(
            "the fleet has an instance that another program has written", problems=parsed.problems
        )
    return parsed


def is_unread(view: View, key: str) -> bool:
    found = view(key)
    return found is not None and attempt(partial(layout.parse_value, key), found[0]) is None


def last_record(view: View, key: str) -> Mapping[str, object] | None:
    """Return a record, or the project that a removed record left; empty if unreadable, `None` if absent."""
    found = view(key)
    if found is None:
        return None
    # Stored networks and instances have the same field.
    return {} if is_unread(view, key) else layout.parse_network(found[0]).record


def no_such(kind: str, subject: str) -> NotFound:
    return NotFound(f"the fleet has no {kind} {subject}", hint=f"imdsproxy --fleet URL {kind} list")


def readable(
    parse: Callable[[bytes], _T],
    value: bytes,
    what: str,
    hint: str = "write the whole record again",
) -> _T:
    try:
        return parse(value)
    except codec.Unreadable as error:
        raise SourceCorrupt(f"{what} is not readable in etcd: {error}", hint=hint) from error


def refuse_other_revision(kind: str, subject: str, revision: int, terms: Terms) -> None:
    if terms.revision not in {None, revision}:
        raise RevisionOutdated(
            f"{kind} {subject} has revision {revision}, not {terms.revision}",
            hint=f"read the record again: imdsproxy --fleet URL {kind} show {subject}",
        )


def refuse_suspect(view: View) -> Compare:
    """Return a comparison that fails after another claim of a restore; raise `RestoreSuspected` if claims suffice."""
    # A value that another program wrote counts as none.
    suspicion = attempt(read_suspicion, view)
    if suspicion is not None and suspicion.refuses:
        raise RestoreSuspected(
            f"etcd may be restored from a backup, so hubs write nothing: {suspicion.why}",
            hint="check `imdsproxy fleet status`, then run `imdsproxy fleet accept-restore`",
        )
    found = view(layout.SUSPECT)
    return absent(layout.SUSPECT) if found is None else unchanged(layout.SUSPECT, found[1])


def next_epoch(epoch: int, incarnation: int) -> int:
    """Return an epoch that no host has seen, even if a restored backup lost revocations that hosts remember."""
    return max(epoch, (incarnation - 1) * EPOCHS) + 1


def incarnation_in(view: View) -> int:
    meta = view(layout.META)
    return 1 if meta is None else readable(layout.parse_meta, meta[0], "the fleet").incarnation


def read_override(view: View, key: str) -> OperatorOverride:
    """Return an operator override; if it is unreadable, one that revokes all tokens."""
    found = view(key)
    if found is None:
        return OperatorOverride()
    override = attempt(layout.parse_override, found[0])
    if override is None:
        # Each revocation was a write, so there were fewer revocations than revisions.
        return OperatorOverride(next_epoch(0, incarnation_in(view)) + found[1])
    return override
