"""Routes below `/v1` for guests: requests to their hosts, token revocation, and policies."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse

from imdsproxy.api import bodies
from imdsproxy.api.answers import Written
from imdsproxy.api.client import path_to
from imdsproxy.errors import (
    NotFound,
    RequestRefused,
    SourceCorrupt,
    SourceUnavailable,
)
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.layout import HostId
from imdsproxy.fleet.members import Role
from imdsproxy.hub.api.callers import (
    Caller,
    FleetOperator,
    InstanceOf,
    Operator,
    Reader,
    TermsOf,
    Uses,
)
from imdsproxy.hub.api.operations import WITHHELD, FleetWritten, Operations
from imdsproxy.hub.api.rotate_keys import FleetKeyRotation, rotate_keys
from imdsproxy.hub.store import plan_changes
from imdsproxy.hub.store.etcd_messages import KeyValue
from imdsproxy.hub.store.transactions import Terms
from imdsproxy.hub.store.writes import Done
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.records import Refused
from imdsproxy.model.records.network import POLICY

guests = APIRouter()

_Query = Annotated[str | None, Query(description="As of a host's admin API.")]
_Host = Annotated[str | None, Query(description="Which host, where it is on several.")]


@dataclass(frozen=True, slots=True)
class FleetOverrideChange:
    """Result of changing an instance's operator override on all its hosts.

    Attributes:
        epoch: Epoch of the instance's tokens, which rises with each revocation.
        applied: Whether all hosts of the instance have confirmed the change.
        pending: Hosts that have not confirmed it, with reasons.
    """

    instance: InstanceId
    epoch: int
    applied: bool = True
    pending: tuple[str, ...] = ()
    revision: int = 0
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetPolicy:
    """Rules of a scope.

    Attributes:
        place: `fleet`, `host/ID` or `project/ID`.
        rules: Rules in the form of a record's policy.
    """

    place: str
    rules: Json
    revision: int


@guests.post("/instances/{instance}/revoke-tokens")
async def revoke_tokens(
    instance: InstanceOf, operations: Uses, terms: TermsOf, _: Operator
) -> FleetOverrideChange:
    """Revoke the instance's tokens; wait until every host of the instance has confirmed that."""
    done, epoch = await operations.writes.revoke_tokens(instance, terms)
    return await _confirm_override(operations, instance, done, epoch)


@guests.post("/instances/{instance}/reopen")
async def reopen_instance(
    instance: InstanceOf, operations: Uses, terms: TermsOf, _: Operator
) -> FleetOverrideChange:
    """Restart the instance's boot grace now, on all its hosts."""
    done, epoch = await operations.writes.reopen(instance, terms)
    return await _confirm_override(operations, instance, done, epoch)


async def _confirm_override(
    operations: Operations, instance: InstanceId, done: Done, epoch: int
) -> FleetOverrideChange:
    state = operations.state
    # If the record is unreadable, the copy may still know the instance's hosts.
    hosts = done.hosts | set(state.hosts_of(instance))
    found = await operations.confirm(Done(done.revision, hosts), {f"override/{instance}"})
    pending = found.pending
    if not hosts and (why := state.unread(f"instance/{instance}")) is not None:
        pending = (
            f"instance {instance} is not readable in etcd ({why}): hosts get this once it is written again",
        )
    return FleetOverrideChange(instance, epoch, not pending, pending, found.revision, found.hosts)


@guests.post("/token-keys/rotate")
async def rotate_token_keys(operations: Uses, _: FleetOperator) -> FleetKeyRotation:
    """Sign session tokens with a new key of the fleet; existing tokens stay valid until they expire."""
    return await rotate_keys(operations)


@guests.get("/instances/{instance}/explain")
async def explain_instance(
    instance: InstanceOf,
    operations: Uses,
    caller: Reader,
    path: _Query = None,
    probe: Annotated[bool, Query()] = False,  # noqa: FBT002 - FastAPI passes it by name
) -> JSONResponse:
    """Explain an instance: the answer of each of its hosts, with the host's name."""
    query = _given(path=path, probe="true" if probe else None)
    found: list[Any] = []
    for host in caller.views(operations).stored(instance)[0].hosts:
        route = path_to("instances", instance, "explain")
        answer = _body(host, await operations.ask_host(host, route, query))
        if not (isinstance(answer, list) and all(isinstance(one, dict) for one in answer)):
            raise _odd(host)
        found += [{**_explained(caller, one, instance), "host": host} for one in answer]
    return JSONResponse(found)


@guests.get("/instances/{instance}/password")
async def show_password(instance: InstanceOf, operations: Uses, caller: Operator) -> JSONResponse:
    """Show the password that the guest posted: the fleet's, or a host's if no hub has stored it yet."""
    hosts = caller.views(operations).stored(instance)[0].hosts
    try:
        found = bodies.DocumentBody.of(operations.passwords.read(instance))
        body = bodies.PasswordBody(instance=instance, password=found)
        return JSONResponse(body.model_dump(exclude_unset=True))
    except NotFound as error:
        problem: Exception = error
    for host in hosts:
        route = path_to("instances", instance, "password")
        try:
            return JSONResponse(_body(host, await operations.ask_host(host, route, {})))
        except (NotFound, SourceUnavailable) as error:
            problem = error
    raise problem


@guests.delete("/instances/{instance}/password")
async def clear_password(instance: InstanceOf, operations: Uses, caller: Operator) -> Written:
    """Clear the password in the fleet and on the instance's hosts, so that the guest can post another."""
    problem: NotFound | None = None
    hosts = caller.views(operations).stored(instance)[0].hosts
    done, cleared = await operations.passwords.clear(instance, operations.writes.terms(""))
    if cleared:
        await operations.in_force.wait(done.hosts, done.revision, {f"password/{instance}"})
    # A host may have a password that its hub has not stored yet.
    for host in hosts:
        route = path_to("instances", instance, "password")
        try:
            _body(host, await operations.ask_host(host, route, {}, "DELETE"))
            cleared = True
        except NotFound as error:
            problem = error
        except SourceUnavailable:
            if not cleared:
                raise
    # A host may have sent the password meanwhile, so clear it again.
    cleared = (await operations.passwords.clear(instance, operations.writes.terms("")))[
        1
    ] or cleared
    if problem is not None and not cleared:
        raise problem
    return Written(instances=1)


@guests.get("/explain")
async def explain(  # noqa: PLR0917 - FastAPI passes them by name
    network: str,
    address: str,
    operations: Uses,
    caller: Reader,
    path: _Query = None,
    host: _Host = None,
) -> JSONResponse:
    """Explain which instance has an address in a network: the answer of the instance's host, or of `host`."""
    at, one, instance = await _host_of(operations, caller, network, address, host)
    query = _given(network=at, address=address, path=path)
    answer = _object(one, await operations.ask_host(one, "/v1/explain", query))
    return JSONResponse({**_explained(caller, answer, instance), "host": one})


@guests.get("/documents")
async def get_document(  # noqa: PLR0917 - FastAPI passes them by name
    network: str, address: str, path: str, operations: Uses, caller: Operator, host: _Host = None
) -> JSONResponse:
    """Show the answer that a guest gets to `GET path`."""
    at, one, instance = await _host_of(operations, caller, network, address, host)
    # The host may not know yet that another instance has the address now.
    owner = None if caller.scope is None else instance
    query = _given(network=at, address=address, path=path, instance=owner)
    return JSONResponse(_body(one, await operations.ask_host(one, "/v1/documents", query)))


@guests.get("/watch")
async def watch(  # noqa: PLR0917 - FastAPI passes them by name
    operations: Uses,
    caller: Reader,
    cursor: _Query = None,
    network: _Query = None,
    instance: _Query = None,
    host: _Host = None,
) -> JSONResponse:
    """Show requests since `cursor`: of an instance's guest on the host of the last answer, or of a host's guests."""
    views = caller.views(operations)
    at = None if network is None else views.find_network(network)
    if instance is None:
        if host is None:
            raise RequestRefused(
                "the guests of a whole fleet are too many to watch",
                hint="name an instance or a host: --instance ID or --host HOST",
            )
        caller.require(*Role, all_projects=True)
        hosts: tuple[HostId, ...] = (HostId(host),)
        operations.refuse_unknown(hosts)
        query = _given(cursor=cursor, network=at)
    else:
        identity = views.find_instance(instance)
        hosts = views.stored(identity)[0].hosts
        query = _given(instance=identity, cursor=cursor if host in hosts else None, network=at)
    one = _one_of(hosts, host)
    answer = _object(one, await operations.ask_host(one, "/v1/watch", query))
    return JSONResponse({**answer, "host": one})


# Policies


@guests.get("/policies")
async def list_policies(operations: Uses, caller: Reader) -> list[FleetPolicy]:
    """List the policies of all scopes that have rules."""
    places = (key.removeprefix(layout.POLICIES) for key in operations.state.keys(layout.POLICIES))
    found = [_policy(operations, one) for one in sorted(places) if _may_see(caller, one)]
    return [one for one in found if one.rules]


@guests.get("/policies/{place:path}")
async def show_policy(place: str, operations: Uses, caller: Reader) -> FleetPolicy:
    """Show the rules of a scope: `fleet`, `host/ID` or `project/ID`."""
    if not _may_see(caller, _checked(place)):
        raise NotFound(f"there is no policy of {place}")
    return _policy(operations, place)


@guests.patch("/policies/{place:path}", openapi_extra=bodies.takes(bodies.PolicyRecord))
async def patch_policy(
    place: str, body: bodies.JsonBody, operations: Uses, terms: TermsOf, _: Operator
) -> FleetWritten:
    """Change some rules of a scope (RFC 7396: null leaves a rule to less specific scopes)."""
    return await _put_policy(operations, place, body, terms)


@guests.delete("/policies/{place:path}")
async def clear_policy(place: str, operations: Uses, terms: TermsOf, _: Operator) -> FleetWritten:
    """Clear all rules of a scope; less specific scopes apply."""
    return await _put_policy(operations, place, None, terms)


async def _put_policy(
    operations: Operations, place: str, patch: object, terms: Terms
) -> FleetWritten:
    def change(old: Mapping[str, Any]) -> Mapping[str, Any]:
        if patch is None:
            return {}
        merged = bodies.merge_patch(old, patch)
        read = POLICY.read(merged)
        if isinstance(read, Refused):
            raise RequestRefused("the policy is not acceptable", problems=read.problems)
        return POLICY.render(read)

    done = await operations.writes.put_policy(_checked(place), change, terms)
    item = f"policy/{place}"
    hosts = (
        frozenset(operations.state.enrolled())
        if place == "fleet"
        else operations.state.hosts_with(item)
    )
    if place.startswith("host/"):
        hosts = frozenset([HostId(place.removeprefix("host/"))])
    return await operations.confirm(replace(done, hosts=hosts), {item})


def _checked(place: str) -> str:
    scope, _, subject = place.partition("/")
    if place != "fleet" and not (scope in {"host", "project"} and codec.is_id(subject)):
        raise RequestRefused(
            f"{place} is no scope of a policy",
            hint="fleet, host/ID or project/ID; networks and instances have theirs in their records",
        )
    return place


def _may_see(caller: Caller, place: str) -> bool:
    return caller.scope is None or place == f"project/{caller.scope}"


def _policy(operations: Operations, place: str) -> FleetPolicy:
    rules, revision = plan_changes.read_policy(operations.state.value, place)
    return FleetPolicy(place, dict(rules), revision)


# Hosts


def _given(**query: str | None) -> dict[str, str]:
    return {key: value for key, value in query.items() if value is not None}


async def _host_of(
    operations: Operations, caller: Caller, network: str, address: str, host: str | None
) -> tuple[str, HostId, InstanceId | None]:
    """Return the network's id, the host to ask, and the instance that has the address, if any."""
    views = caller.views(operations)
    at = views.find_network(network)
    ip = bodies.read_address(address)
    claims = (await operations.etcd.read(layout.address_claim(at, ip))).kvs
    instance = _holder(caller, claims[0]) if claims else None
    known = None if instance is None else views.known(instance)
    if known is None:
        if host is not None and caller.scope is None:
            return at, HostId(host), None
        raise NotFound(
            f"no instance of the fleet has {ip} in network {at}",
            hint="imdsproxy --fleet URL instance list",
        )
    return at, _one_of(known[0].hosts, host), instance


def _holder(caller: Caller, claim: KeyValue) -> InstanceId | None:
    """Return the instance that has an address.

    An unreadable claim raises `SourceCorrupt`; operators of one project get `None` instead.
    """
    try:
        return layout.parse_claim(claim.value)
    except codec.Unreadable as error:
        if caller.scope is not None:
            return None
        raise SourceCorrupt(
            f"who has {claim.key} is not readable in etcd: {error}",
            hint=f"write the instance that has it again; etcdctl del {claim.key}, if none has it",
        ) from error


def _one_of(hosts: Sequence[HostId], wanted: str | None) -> HostId:
    """Return the wanted host if it is among `hosts`, otherwise the last host."""
    if not hosts:
        raise NotFound("the instance is on no host", hint="imdsproxy instance move ID --to HOST")
    return next((one for one in hosts if one == wanted), hosts[-1])


def _explained(caller: Caller, answer: Json, instance: InstanceId | None) -> Json:
    """Return a host's explanation; operators of one project get details of the project's own instance only."""
    is_own = answer.get("instance") == instance and not answer.get("claimants")
    if caller.scope is None or is_own:
        return answer
    shown = {key: answer.get(key) for key in ("network", "address", "verdict", "answer")}
    return {**dict.fromkeys(answer), **_NOT_EXPLAINED, **shown}


def _body(host: HostId, answer: Json) -> Any:
    """Return the body of a host's answer, or raise the host's error.

    A host may be captured: the only guarantee is that the body can be rendered as JSON.
    """
    status, body = answer.get("status"), answer.get("body")
    if not isinstance(status, int) or not _is_json(body):
        raise _odd(host)
    if status < _BAD:
        return body
    message, hint = f"host {host} answered {status}", ""
    if isinstance(body, dict):
        message = f"host {host}: {codec.plain(str(body.get('message', message)))}"
        hint = codec.plain(str(body.get("hint", "")))
    kind = NotFound if status == _NOT_FOUND else SourceUnavailable
    raise kind(message, hint=hint)


_NOT_EXPLAINED: Final[Json] = {
    "why": [WITHHELD],
    "claimants": [],
    "policy": {},
    "nics": [],
}


def _object(host: HostId, answer: Json) -> Json:
    """Return the body of a host's answer, which must be an object."""
    body = _body(host, answer)
    if not isinstance(body, dict):
        raise _odd(host)
    return body


def _is_json(body: object) -> bool:
    try:
        json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _odd(host: HostId) -> SourceUnavailable:
    return SourceUnavailable(
        f"host {host} answered what no imdsproxy of this version answers",
        hint=f"look at host {host}: it may be of another version, or captured",
    )


_BAD: Final = 400
_NOT_FOUND: Final = 404
