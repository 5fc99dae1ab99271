"""Routes below `/v1` for guests: questions that their hosts answer."""

from collections.abc import Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse

from imdsproxy.api import bodies
from imdsproxy.api.client import path_to
from imdsproxy.api.record_routes import InstanceOf, NetworkOf
from imdsproxy.errors import NotFound, RequestRefused, SourceCorrupt
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.layout import HostId
from imdsproxy.fleet.members import Role
from imdsproxy.hub.api.ask import ask_for_object, ask_host, odd_answer
from imdsproxy.hub.api.callers import Caller
from imdsproxy.hub.api.fleet_records import FleetRecords, Reading, ReadingSecrets
from imdsproxy.hub.api.operations import WITHHELD
from imdsproxy.hub.store.etcd_messages import KeyValue
from imdsproxy.model.entities import InstanceId, NetworkId

guests = APIRouter()

_Query = Annotated[str | None, Query(description="As of a host's admin API.")]
_Host = Annotated[str | None, Query(description="The host, if the instance is on several.")]


@guests.get("/instances/{instance}/explain")
async def explain_instance(
    store: Reading,
    instance: InstanceOf,
    path: _Query = None,
    probe: Annotated[bool, Query()] = False,  # noqa: FBT002 - FastAPI passes it by name
) -> JSONResponse:
    """Explain an instance: the answer of each of its hosts, with the host's name."""
    explanations: list[Any] = []
    route = path_to("instances", instance, "explain")
    query = {"path": path, "probe": "true" if probe else None}
    for host in store.views.stored(instance)[0].hosts:
        answer = await ask_host(store.operations, host, route, query)
        if not (isinstance(answer, list) and all(isinstance(one, dict) for one in answer)):
            raise odd_answer(host)
        explanations += [
            {**_explained(store.caller, one, instance), "host": host} for one in answer
        ]
    return JSONResponse(explanations)


@guests.get("/instances/{instance}/identity-check")
async def check_identity(
    store: Reading,
    instance: InstanceOf,
    audience: str,
    network: _Query = None,
    host: _Host = None,
) -> JSONResponse:
    """Check the links between an instance and a verifier of its identity tokens: the answer of the instance's host."""
    asked = _one_of(store.views.stored(instance)[0].hosts, host)
    route = path_to("instances", instance, "identity-check")
    query = {"audience": audience, "network": network}
    answer = await ask_for_object(store.operations, asked, route, query)
    return JSONResponse({**answer, "host": asked})


@guests.get("/instances/{instance}/identity")
async def show_identity(store: Reading, instance: InstanceOf, host: _Host = None) -> JSONResponse:
    """Show which identity tokens an instance may request, and the last answers: the answer of the instance's host."""
    asked = _one_of(store.views.stored(instance)[0].hosts, host)
    answer = await ask_for_object(
        store.operations, asked, path_to("instances", instance, "identity"), {}
    )
    return JSONResponse({**answer, "host": asked})


@guests.get("/explain")
async def explain(
    store: Reading, network: NetworkOf, address: str, path: _Query = None, host: _Host = None
) -> JSONResponse:
    """Explain which instance has an address in a network: the answer of the instance's host, or of `host`."""
    asked, instance = await _host_of(store, network, address, host)
    query = {"network": network, "address": address, "path": path}
    answer = await ask_for_object(store.operations, asked, "/v1/explain", query)
    return JSONResponse({**_explained(store.caller, answer, instance), "host": asked})


@guests.get("/documents")
async def get_document(
    store: ReadingSecrets, network: NetworkOf, address: str, path: str, host: _Host = None
) -> JSONResponse:
    """Show the answer that a guest gets to `GET path`."""
    asked, instance = await _host_of(store, network, address, host)
    # The host may not know yet that another instance has the address now.
    owner = None if store.caller.scope is None else instance
    query = {"network": network, "address": address, "path": path, "instance": owner}
    return JSONResponse(await ask_host(store.operations, asked, "/v1/documents", query))


@guests.get("/watch")
async def watch(
    store: Reading,
    cursor: _Query = None,
    network: _Query = None,
    instance: _Query = None,
    host: _Host = None,
) -> JSONResponse:
    """Show requests since `cursor`: of an instance's guest on the host of the last answer, or of a host's guests."""
    chosen = None if network is None else store.find_network(network)
    query = {"cursor": cursor, "network": chosen}
    if instance is None:
        if host is None:
            raise RequestRefused(
                "a whole fleet has too many guests to watch",
                hint="name an instance or a host: --instance ID or --host HOST",
            )
        store.caller.require(*Role, all_projects=True)
        asked = HostId(host)
        store.operations.refuse_unknown(asked)
    else:
        identity = store.find_instance(instance)
        hosts = store.views.stored(identity)[0].hosts
        query |= {"instance": identity, "cursor": cursor if host in hosts else None}
        asked = _one_of(hosts, host)
    answer = await ask_for_object(store.operations, asked, "/v1/watch", query)
    return JSONResponse({**answer, "host": asked})


async def _host_of(
    store: FleetRecords, network: NetworkId, address: str, host: str | None
) -> tuple[HostId, InstanceId | None]:
    ip = bodies.read_address(address)
    claims = (await store.operations.etcd.read(layout.address_claim(network, ip))).kvs
    instance = _holder(store.caller, claims[0]) if claims else None
    known = None if instance is None else store.views.known(instance)
    if known is None:
        if host is not None and store.caller.scope is None:
            return HostId(host), None
        raise NotFound(
            f"no instance of the fleet has {ip} in network {network}",
            hint="imdsproxy --fleet URL instance list",
        )
    return _one_of(known[0].hosts, host), instance


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
            f"the owner of {claim.key} is not readable in etcd: {error}",
            hint=f"write the instance with this address again; if there is none: etcdctl del {claim.key}",
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


_NOT_EXPLAINED: Final[Json] = {
    "why": [WITHHELD],
    "claimants": [],
    "policy": {},
    "nics": [],
}
