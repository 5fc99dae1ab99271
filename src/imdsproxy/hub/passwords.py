"""Passwords that guests posted, sealed in etcd: on each host of their instance, and gone with it.

A guest encrypts its password with its ssh key. Hubs seal it all the same, as everything that is an instance's secret.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from imdsproxy.core.fleet import layout
from imdsproxy.core.fleet.layout import HostId, View
from imdsproxy.core.fleet.values import StoredPassword, is_cleared, parse_password, render_password
from imdsproxy.core.model import InstanceId
from imdsproxy.errors import AlreadyExists, NotFound, SourceCorrupt
from imdsproxy.hub.envelope import Envelope, name_of
from imdsproxy.hub.etcd_messages import unchanged
from imdsproxy.hub.plan_writes import Terms, Transaction, no_such, read_instance, refuse_suspect
from imdsproxy.hub.writes import Done, Writes


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
        view: What is known.
        instance: Whose.
        host: Where its guest posted it.
        sealed: The password.
        is_same: Whether a sealed password is the same one.
        terms: How.

    Raises:
        AlreadyExists: It has another one, which stays until an operator clears it.
        NotFound: There is no such instance on the host.
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
    """Forget a password, so that the guest can post another; nothing where there is none."""
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
    """A password as etcd has it; `None` also where the value cannot be read: a new one mends that."""
    with suppress(layout.Unreadable):
        return None if found is None else parse_password(found[0]).sealed
    return None


@dataclass(frozen=True, slots=True)
class Passwords:
    """Reads and writes them."""

    writes: Writes

    async def keep(self, instance: InstanceId, host: HostId, password: bytes) -> None:
        """Store a password; raises as `plan_password`, and as `Writes.write`."""
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
        """Forget a password, also one that cannot be read; and return whether there was one."""
        stored = self.writes.state.stored(layout.password_key(instance))
        there = stored is not None and not is_cleared(stored[0])
        return await self.writes.write(lambda view: plan_clearing(view, instance, terms)), there

    def sealed(self, instance: InstanceId) -> bytes | None:
        """A password as etcd has it."""
        found = self.writes.state.value(layout.password_key(instance))
        return None if found is None else parse_password(found[0]).sealed

    def read(self, instance: InstanceId) -> bytes:
        """A password.

        Raises:
            NotFound: The fleet has none of the instance.
            SourceCorrupt: No key of this hub opens it.
        """
        sealed = self.sealed(instance)
        if sealed is None:
            raise NotFound(f"the fleet has no password of instance {instance}")
        return self.writes.envelope.open(layout.password_key(instance), sealed)


def password_item(envelope: Envelope, place: str, sealed: bytes) -> str | None:
    """A password as hosts get it; `None` where no key of the envelope opens it."""
    try:
        return base64.b64encode(envelope.open(place, sealed)).decode()
    except SourceCorrupt:
        return None


def reseal_password(envelope: Envelope, place: str, value: bytes, key: str) -> bytes | None:
    """The value with the password sealed by another key; `None` where it is so, or where there is no password.

    Raises:
        SourceCorrupt: No key of the envelope opens it.
    """
    stored = parse_password(value)
    if stored.sealed is None:
        return None
    opened = envelope.open(place, stored.sealed)
    if name_of(stored.sealed) == key:
        return None
    return render_password(StoredPassword(envelope.seal(place, opened), stored.request))
