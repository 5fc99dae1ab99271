"""Callers of a hub's API and their rights. HAProxy verifies the certificate and sets headers with its subject."""

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, TypeAlias, cast

from fastapi import Depends, Header, Query, Request

from imdsproxy.errors import AccessDenied, SourceUnavailable
from imdsproxy.fleet.layout import HostId, operator_key
from imdsproxy.fleet.members import OPERATOR_ROLES, Identity, Role, admits_operator, read_identity
from imdsproxy.hub.api.operations import WITHHELD, Operations
from imdsproxy.hub.api.views import Views
from imdsproxy.hub.hosts.in_force import Reported
from imdsproxy.hub.store.transactions import Terms

_COMPLETE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Caller:
    identity: Identity

    @property
    def scope(self) -> str | None:
        """Project that the caller is limited to; `None` for all."""
        return self.identity.scope

    @property
    def reads_secrets(self) -> bool:
        """Return whether the caller may see user data and the answers to guests."""
        return self.identity.role is Role.OPERATOR

    def require(self, *roles: Role, all_projects: bool = False) -> None:
        """Raise `AccessDenied` unless the caller's role is listed; with `all_projects`, refuse limited callers too."""
        if self.identity.role not in roles:
            raise AccessDenied(
                f"{self.identity.name} has role {self.identity.role}, which may not do this",
                hint=f"use a certificate of role {' or '.join(roles)}: imdsproxy fleet operator",
            )
        if all_projects and self.scope is not None:
            raise AccessDenied(
                f"{self.identity.name} is limited to project {self.scope}, and may not do this",
                hint="use a certificate without a project",
            )

    def views(self, operations: Operations) -> Views:
        return Views(operations.state, self.scope)

    async def reported(self, operations: Operations) -> Reported:
        """Return hosts' acknowledgements, without error texts for callers of one project.

        A host's error text may name records of other projects.
        """
        reported = await operations.in_force.report_all()
        if self.scope is None:
            return reported
        return {
            host: {**one, "failed": dict.fromkeys(one.get("failed", {}), WITHHELD)}
            for host, one in reported.items()
        }


async def admit(operations: Operations, headers: Mapping[str, str]) -> Caller:
    """Identify the caller by the headers that HAProxy set.

    Raises:
        AccessDenied: The caller has no certificate, or one that is not valid here.
        SourceUnavailable: This hub has not read etcd yet, or serves no host now.
    """
    identity = read_identity(headers)
    if identity is None:
        raise AccessDenied(
            "the request has no certificate of the fleet", hint="make one: imdsproxy fleet operator"
        )
    try:
        async with asyncio.timeout(_COMPLETE_S):
            await operations.complete.wait()
    except TimeoutError as error:
        raise SourceUnavailable("this hub has not read etcd yet", hint="ask another hub") from error
    key, state = operator_key(identity.name), operations.state
    revoked = state.value(key)
    known = identity.role in OPERATOR_ROLES or identity.role is Role.HUB
    if known and revoked is None and key in state.unreadable:
        raise AccessDenied(
            f"the revocation of the certificate of {identity.name} is not readable in etcd",
            hint=f"`imdsproxy fleet revoke {identity.name} --operator`, else `etcdctl del {key}`",
        )
    if known and not admits_operator(identity, None if revoked is None else revoked[0]):
        raise AccessDenied(f"the certificate of {identity.name} is revoked")
    if identity.role is Role.HOST and (why := operations.unready()) is not None:
        raise SourceUnavailable(f"this hub serves no host: {why}", hint="ask another hub")
    if identity.role is Role.HOST and not operations.streams.admits(
        HostId(identity.name), identity.serial
    ):
        raise AccessDenied(f"the certificate of host {identity.name} is not valid any more")
    if identity.role in OPERATOR_ROLES:
        operations.restores.journal.note_name(identity.name, "an operator")
    return Caller(identity)


async def _operations(request: Request) -> Operations:
    return cast("Operations", request.app.state.operations)


Uses: TypeAlias = Annotated[Operations, Depends(_operations)]


async def _caller(request: Request, operations: Uses) -> Caller:
    return await admit(operations, request.headers)


_Admitted: TypeAlias = Annotated[Caller, Depends(_caller)]


class Admits:
    """Dependency of a route: the caller, if its role is admitted; with `all_projects` no caller of one project."""

    def __init__(self, *roles: Role, all_projects: bool = False) -> None:
        self.roles, self.all_projects = roles, all_projects

    async def __call__(self, caller: _Admitted) -> Caller:
        caller.require(*self.roles, all_projects=self.all_projects)
        return caller


_READERS: Final = (Role.OPERATOR, Role.MOVER, Role.READER)
Reader: TypeAlias = Annotated[Caller, Depends(Admits(*_READERS))]
Mover: TypeAlias = Annotated[Caller, Depends(Admits(Role.OPERATOR, Role.MOVER))]
Operator: TypeAlias = Annotated[Caller, Depends(Admits(Role.OPERATOR))]
FleetReader: TypeAlias = Annotated[Caller, Depends(Admits(*_READERS, all_projects=True))]
FleetOperator: TypeAlias = Annotated[Caller, Depends(Admits(Role.OPERATOR, all_projects=True))]
OfHost: TypeAlias = Annotated[Caller, Depends(Admits(Role.HOST))]
OfHub: TypeAlias = Annotated[Caller, Depends(Admits(Role.HUB))]


async def _terms(
    operations: Uses,
    caller: _Admitted,
    if_revision: Annotated[
        int | None, Query(ge=1, description="Refuse unless the record has this revision.")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            max_length=64, description="Name of the write: a write that is sent again is done once."
        ),
    ] = None,
) -> Terms:
    request = idempotency_key or uuid.uuid4().hex
    return operations.writes.terms(request, revision=if_revision, scope=caller.scope)


TermsOf: TypeAlias = Annotated[Terms, Depends(_terms)]
