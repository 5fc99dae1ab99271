"""Identity tokens of one instance, for operators: what it may request, and the last answer for each audience."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Final

import httpcore

from imdsproxy.api import guests
from imdsproxy.api.records import find_record
from imdsproxy.controller.identity import IdentityHost
from imdsproxy.controller.parts import Parts
from imdsproxy.controller.record_plan import GuestPolicy, project_at
from imdsproxy.host.http import Unanswered, ask
from imdsproxy.issuer import recent
from imdsproxy.issuer.check import judge_refusal
from imdsproxy.issuer.claims import Refusal
from imdsproxy.issuer.recent import LastAnswer, parse_answers
from imdsproxy.model.entities import Instance, InstanceId, IpAddress, NetworkId
from imdsproxy.model.identity_paths import METHODS, decide_identity, list_guards
from imdsproxy.model.policy import ANY_AUDIENCE
from imdsproxy.model.policy_report import DEFAULT_ORIGIN
from imdsproxy.model.subject import Subject
from imdsproxy.model.wire import DOCUMENT_PATHS, IDENTITY_PATH, OPENSTACK_TOKEN_PATH

_LIMITS: Final = dict.fromkeys(("connect", "read", "write", "pool"), 2.0)
_MOST_BYTES: Final = 64 * 1024
_PATHS: Final = (IDENTITY_PATH, OPENSTACK_TOKEN_PATH, DOCUMENT_PATHS[0])
_REASONS: Final = {
    recent.GIVEN: "the guest got a token",
    recent.UNASKED: "the guest has not requested it; a token is ready",
    recent.UNSIGNED: "nothing could sign a token: see imdsproxy status",
    recent.TOO_MANY: "the instance requested more tokens than it may",
    Refusal.AUDIENCE.value: "the policy does not allow the audience",
}


@dataclass(frozen=True, slots=True)
class IdentityRequest:
    """Request for identity that a guest may send, or why it gets none by it.

    Attributes:
        why: Reason of a refusal with a valid session token; empty if the policy allows the request.
        guards: Other conditions of the request, one sentence each.
    """

    method: str
    path: str
    allowed: bool
    why: str
    guards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AudienceUse:
    """An audience, and the last answer to the guest's requests for it.

    Attributes:
        audience: Name of the audience; `*` for any other.
        allowed: Whether the policy allows it.
        keystone: Whether clients of Keystone get this audience.
        last: `None` if the guest has not requested the audience.
        reason: Meaning of the last answer's outcome, in words; empty without an answer.
    """

    audience: str
    allowed: bool
    keystone: bool = False
    last: LastAnswer | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class IdentityUse:
    """Identity tokens of an instance by its addresses in one network.

    Attributes:
        origin: Scope that sets the policy's audiences; `default` if no scope does.
        problem: Reason why the last answers are not known; empty if they are.
    """

    network: NetworkId
    project: str | None
    addresses: tuple[IpAddress, ...]
    requests: tuple[IdentityRequest, ...]
    origin: str
    audiences: tuple[AudienceUse, ...]
    problem: str


@dataclass(frozen=True, slots=True)
class IdentityUses:
    """Identity tokens of an instance, by network.

    Attributes:
        enabled: Whether this host gives identity tokens.
    """

    instance: InstanceId
    enabled: bool
    networks: tuple[IdentityUse, ...]


async def report_uses(parts: Parts, instance: InstanceId) -> IdentityUses:
    """Report what an instance may request, and the last answers; raise `NotFound` if the instance does not exist."""
    keys = guests.list_addresses(parts, instance)
    record = find_record(parts.inventory, instance)
    enabled = parts.identity is not None and parts.identity.service.needed
    if record is None:
        return IdentityUses(instance, enabled, ())
    places: dict[tuple[NetworkId, str | None], list[IpAddress]] = {}
    for key in keys:
        places.setdefault((key[0], project_at(record, key)), []).append(key[1])
    found = [
        await _report_use(parts, record, network, project, addresses)
        for (network, project), addresses in places.items()
    ]
    return IdentityUses(instance, enabled, tuple(found))


async def _report_use(
    parts: Parts,
    instance: Instance,
    network: NetworkId,
    project: str | None,
    addresses: Sequence[IpAddress],
) -> IdentityUse:
    in_force = parts.records.planner().find_policy(network, project, instance)
    subject, identity = in_force.beside.subject, parts.identity
    answers: list[LastAnswer] = []
    problem = ""
    if subject is not None and identity is not None and identity.service.needed:
        try:
            answers = await _ask_answers(identity, subject)
        except (Unanswered, ValueError) as error:
            problem = f"the process that answers guests does not answer: {error}"
    return IdentityUse(
        network,
        project,
        tuple(addresses),
        _list_requests(parts, network, in_force),
        dict(in_force.folded.origins).get("audiences", DEFAULT_ORIGIN),
        list_audiences(
            subject,
            parts.holder.settings.identity.openstack_audience,
            answers,
            in_fleet=identity is not None and identity.fleet is not None,
        ),
        problem,
    )


async def _ask_answers(identity: IdentityHost, subject: Subject) -> list[LastAnswer]:
    """Return the last answers from the process that answers guests; none if it does not know the subject yet."""
    async with httpcore.AsyncConnectionPool(uds=str(identity.layout.identity_socket)) as pool:
        url = f"http://identity/recent?subject={subject.id}"
        status, data = await ask(pool, "GET", url, _LIMITS, most=_MOST_BYTES)
    return [] if status == HTTPStatus.NOT_FOUND else parse_answers(data)


def _list_requests(
    parts: Parts, network: NetworkId, in_force: GuestPolicy
) -> tuple[IdentityRequest, ...]:
    place = guests.find_identity_place(parts, network, in_force)
    decide = partial(decide_identity, place, int(parts.clock.now().timestamp()), token=True)
    decided = [(path, decide(path)) for path in _PATHS]
    return tuple(
        IdentityRequest(METHODS[path], path, one.status is None, one.why, list_guards(place, path))
        for path, one in decided
    )


def list_audiences(
    subject: Subject | None,
    openstack_audience: str | None,
    answers: Sequence[LastAnswer],
    *,
    in_fleet: bool,
) -> tuple[AudienceUse, ...]:
    """Return the policy's audiences in order, then Keystone's, then others that the guest requested."""
    last = {one.audience: one for one in answers}
    policy = () if subject is None else subject.audiences
    keystone = () if openstack_audience is None else (openstack_audience,)
    names = dict.fromkeys((*(one for one in policy if one != ANY_AUDIENCE), *keystone, *last))
    uses = [
        AudienceUse(
            name,
            subject is not None and subject.allows(name),
            name == openstack_audience,
            last.get(name),
            _explain(last.get(name), in_fleet=in_fleet),
        )
        for name in names
    ]
    return (*uses, *(AudienceUse(one, allowed=True) for one in policy if one == ANY_AUDIENCE))


def _explain(answer: LastAnswer | None, *, in_fleet: bool) -> str:
    if answer is None:
        return ""
    if answer.outcome in _REASONS:
        return _REASONS[answer.outcome]
    if answer.outcome in set(Refusal):
        return judge_refusal(Refusal(answer.outcome), answer.audience, in_fleet=in_fleet).reason
    return answer.outcome
