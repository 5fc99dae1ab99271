"""Membership of hosts in a fleet: invitation with a one-time token, certificate, renewal, revocation.

Module `fleet.members` decides the new value of a host. This module reads and writes it, and retries if another hub
was faster.
"""

import asyncio
import math
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog

from imdsproxy.errors import AlreadyExists, SourceUnavailable, WriteUnknown
from imdsproxy.fleet.codec import Unreadable
from imdsproxy.fleet.layout import (
    HostId,
    StoredHost,
    StoredOperator,
    View,
    host_key,
    operator_key,
    parse_host,
    read_host,
    render_host,
    render_operator,
)
from imdsproxy.fleet.members import (
    Identity,
    Invitation,
    plan_enrolment,
    plan_invitation,
    plan_renewal,
    plan_revocation,
    spell_serial,
)
from imdsproxy.fleet.restores import join_values
from imdsproxy.host.certificates import render_certificate
from imdsproxy.host.clock import Clock
from imdsproxy.hub.pki.authority import Authority, parse_request
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Committed, KeyValue, unchanged
from imdsproxy.hub.store.journal import Keep, keep_nothing

INVITATION_S: Final = 24 * 3600
_TOKEN_BYTES: Final = 32
_ATTEMPTS: Final = 5
_PAUSE_S: Final = 0.02

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Certified:
    """Certificate of a host, and the certificates of all CAs that the host must trust, in PEM."""

    certificate: str
    authority: str


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Membership of hosts, and revocation of operators and hubs.

    Args:
        holder: Returns a description of the hub or operator with a name: hosts, hubs and operators share one namespace.
        known: This hub's copy, which may have values that etcd has lost.
        keep: Writes values to this hub's journal; called before the client gets its answer.
    """

    etcd: Etcd
    authority: Authority
    clock: Clock
    holder: Callable[[str], str | None] = lambda _: None
    known: View = lambda _: None
    keep: Keep = keep_nothing

    async def invite(
        self, host: HostId, urls: Sequence[str], life_s: float = INVITATION_S
    ) -> Invitation:
        """Create a token for a host, which replaces an earlier one.

        Raises:
            AlreadyExists: The name is a hub's or an operator's.
            SourceUnavailable: etcd does not answer, or other hubs keep writing the same host.
        """
        self._refuse_taken(host)
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        expires_at = math.ceil(self.clock.now().timestamp() + life_s)
        await self._write(host, lambda stored: plan_invitation(stored, token, expires_at))
        _log.info("host invited", host=host)
        return Invitation(host, tuple(urls), self.authority.fingerprint, token)

    async def enrol(self, host: HostId, token: str, request: str) -> Certified:
        """Issue a host's first certificate for a request in PEM; the token is valid once.

        Raises `AccessDenied` if the token is invalid, `RequestRefused`, and the errors of `invite`.
        """
        self._refuse_taken(host)
        key, now, trusts = parse_request(request), self.clock.now(), self.authority.trusted_digest
        signed = self.authority.certify_host(key, host, now)
        serial = spell_serial(signed.serial_number)
        await self._write(
            host, lambda stored: plan_enrolment(stored, token, serial, now.timestamp(), trusts)
        )
        _log.info("host enrolled", host=host, serial=serial)
        return self._certified(render_certificate(signed))

    async def renew(self, identity: Identity, request: str) -> Certified:
        """Issue the next certificate to a host that presented its current one.

        Raises `AccessDenied` if that certificate is no longer valid, `RequestRefused`, and the errors of `invite`.
        """
        host, key = HostId(identity.name), parse_request(request)
        trusts = self.authority.trusted_digest
        signed = self.authority.certify_host(key, host, self.clock.now())
        serial = spell_serial(signed.serial_number)
        await self._write(
            host, lambda stored: plan_renewal(stored, identity.serial, serial, trusts)
        )
        _log.info("host's certificate renewed", host=host, serial=serial)
        return self._certified(render_certificate(signed))

    async def revoke(self, host: HostId) -> int:
        """Revoke the certificates and the token of a host; return the revision. Hubs then end the host's stream.

        Raises `NotFound`, and the errors of `invite`.
        """
        revision = await self._write(host, lambda stored: plan_revocation(host, stored))
        _log.warning("host revoked", host=host)
        return revision

    async def revoke_operator(self, name: str) -> int:
        """Revoke all certificates of an operator's or hub's name; return the revision of the revocation."""
        value = render_operator(StoredOperator(int(self.clock.now().timestamp())))
        done = await self.etcd.commit((), {operator_key(name): value})
        await self.keep({operator_key(name): value})
        _log.warning("operator revoked", name=name)
        return done.revision

    def _refuse_taken(self, host: HostId) -> None:
        holder = self.holder(host)
        if holder is not None:
            raise AlreadyExists(
                f"host {host} cannot join: {host} is the name of {holder}",
                hint="hubs, hosts and operators share one space of names: choose another",
            )

    async def _write(self, host: HostId, plan: Callable[[StoredHost | None], StoredHost]) -> int:
        key, written = host_key(host), b""
        for attempt in range(_ATTEMPTS):
            found = (await self.etcd.read(key)).kvs
            if found and found[0].value == written:
                # An earlier attempt succeeded, though etcd did not confirm it.
                await self.keep({key: written})
                return found[0].mod_revision
            written = render_host(plan(self._newest(key, found[0] if found else None)))
            before = unchanged(key, found[0].mod_revision if found else 0)
            try:
                done = await self.etcd.commit([before], {key: written})
            except WriteUnknown:
                done = None
            if isinstance(done, Committed):
                await self.keep({key: written})
                return done.revision
            await asyncio.sleep(_PAUSE_S * 2**attempt)
        raise SourceUnavailable(f"host {host} could not be written", hint="try again")

    def _newest(self, key: str, found: KeyValue | None) -> StoredHost | None:
        """Return etcd's value of a host joined with this hub's, or this hub's if etcd's is absent or unreadable."""
        known = self.known(key)
        if known is None:
            return None if found is None else read_host(found.value, found.mod_revision)
        if found is not None:
            with suppress(Unreadable):
                return parse_host(join_values(key, known[0], found.value))
        return parse_host(known[0])

    def _certified(self, certificate: bytes) -> Certified:
        return Certified(certificate.decode(), self.authority.trusted.decode())
