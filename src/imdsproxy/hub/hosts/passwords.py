"""Passwords that guests posted: sealed in etcd, sent to each host of their instance, and removed with the instance.

A guest encrypts its password with its ssh key. Hubs seal it nevertheless, like every secret of an instance.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from imdsproxy.errors import AlreadyExists, NotFound, SourceCorrupt
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import HostId, View
from imdsproxy.fleet.values import StoredPassword, is_cleared, parse_password, render_password
from imdsproxy.hub.store.envelope import Envelope, name_of
from imdsproxy.hub.store.etcd_messages import unchanged
from imdsproxy.hub.store.plan_writes import (
    Terms,
    Transaction,
    no_such,
    read_instance,
    refuse_suspect,
)
from imdsproxy.hub.store.writes import Done, Writes
from imdsproxy.model.entities import InstanceId


def plan_password(
    view: View,
    instance: InstanceId,
    host: HostId,
    sealed: bytes,
    *,
    is_same: Callable[[bytes], bool],
    terms: Terms,
) -> Transaction:
    """Store a password that a host has received from a guest.

    Args:
        view: Known keys of etcd.
        instance: Instance of the guest.
        host: Host to which the guest posted the password.
        sealed: Sealed password.
        is_same: Returns whether a stored sealed password is the same password.
        terms: Conditions of the write.

    Raises:
        AlreadyExists: The instance has another password, which stays until an operator clears it.
        NotFound: The host has no such instance.
    """
    unsuspected, stored = refuse_suspect(view), read_instance(view, instance)
    if stored is None or host not in stored[0].hosts:
        raise no_such("instance", instance)
    key, owner = layout.password_key(instance), layout.instance_key(instance)
    found = view(key)
    known = _sealed_in(found)
    if found is not None and known is not None:
        if is_same(known):
            return Transaction(revision=found[1])
        raise AlreadyExists(f"instance {instance} has another password already")
    compares = (
        unsuspected,
        unchanged(owner, stored[1]),
        unchanged(key, 0 if found is None else found[1]),
    )
    value = render_password(StoredPassword(sealed, terms.request))
    return Transaction(compares, {key: value}, hosts=frozenset(stored[0].hosts))


def plan_clearing(view: View, instance: InstanceId, terms: Terms) -> Transaction:
    """Clear a password, so that the guest can post another; do nothing if there is none."""
    unsuspected, stored = refuse_suspect(view), read_instance(view, instance)
    key = layout.password_key(instance)
    found = view(key)
    if found is None:
        return Transaction()
    if is_cleared(found[0]):
        return Transaction(revision=found[1])
    value = render_password(StoredPassword(None, terms.request, terms.now))
    hosts = frozenset(() if stored is None else stored[0].hosts)
    return Transaction((unsuspected, unchanged(key, found[1])), {key: value}, hosts=hosts)


def _sealed_in(found: tuple[bytes, int] | None) -> bytes | None:
    """Return a sealed password; `None` also for an unreadable value, which a new password replaces."""
    with suppress(codec.Unreadable):
        return None if found is None else parse_password(found[0]).sealed
    return None


@dataclass(frozen=True, slots=True)
class Passwords:
    """Access to the passwords in etcd."""

    writes: Writes

    async def keep(self, instance: InstanceId, host: HostId, password: bytes) -> None:
        """Store a password; raise the errors of `plan_password` and `Writes.write`."""
        key, envelope = layout.password_key(instance), self.writes.envelope
        sealed = envelope.seal(key, password)

        def is_same(known: bytes) -> bool:
            try:
                return envelope.open(key, known) == password
            except SourceCorrupt:
                return False

        terms = self.writes.terms("")
        await self.writes.write(
            lambda view: plan_password(view, instance, host, sealed, is_same=is_same, terms=terms)
        )

    async def clear(self, instance: InstanceId, terms: Terms) -> tuple[Done, bool]:
        """Clear a password, even if unreadable; also return whether there was one."""
        stored = self.writes.state.stored(layout.password_key(instance))
        there = stored is not None and not is_cleared(stored[0])
        return await self.writes.write(lambda view: plan_clearing(view, instance, terms)), there

    def sealed(self, instance: InstanceId) -> bytes | None:
        """Return the sealed password of an instance; `None` if there is none."""
        found = self.writes.state.value(layout.password_key(instance))
        return None if found is None else parse_password(found[0]).sealed

    def read(self, instance: InstanceId) -> bytes:
        """Return the password of an instance.

        Raises:
            NotFound: The instance has no password in the fleet.
            SourceCorrupt: No key of this hub opens the password.
        """
        sealed = self.sealed(instance)
        if sealed is None:
            raise NotFound(f"the fleet has no password of instance {instance}")
        return self.writes.envelope.open(layout.password_key(instance), sealed)


def password_item(envelope: Envelope, place: str, sealed: bytes) -> str | None:
    """Return a password in the form for hosts; `None` if no key of the envelope opens it."""
    try:
        return base64.b64encode(envelope.open(place, sealed)).decode()
    except SourceCorrupt:
        return None


def reseal_password(envelope: Envelope, place: str, value: bytes, key: str) -> bytes | None:
    """Reseal a stored password with `key`; return `None` if it has that key already, or if there is no password.

    Raises:
        SourceCorrupt: No key of the envelope opens the password.
    """
    stored = parse_password(value)
    if stored.sealed is None:
        return None
    opened = envelope.open(place, stored.sealed)
    if name_of(stored.sealed) == key:
        return None
    return render_password(StoredPassword(envelope.seal(place, opened), stored.request))
