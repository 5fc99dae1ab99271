"""Routes of records, the same for a host and for a fleet, over a `RecordStore`."""

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias, cast

from fastapi import APIRouter, Depends, Request, params
from pydantic import BaseModel
from starlette.responses import JSONResponse, StreamingResponse

from imdsproxy.api import bodies
from imdsproxy.api.answers import Written
from imdsproxy.host.turns import in_turns
from imdsproxy.model import matching
from imdsproxy.model.entities import InstanceId, Network, NetworkId
from imdsproxy.model.records import INSTANCE, NETWORK, Tables
from imdsproxy.reconcile.progress import Step

Report: TypeAlias = dict[str, Any]
"""A view of `bodies` whose values may still be the model's (see `bodies.RecordResponse`)."""


@dataclass(frozen=True, slots=True)
class Change:
    """Whole records to add or replace.

    Attributes:
        create: Refuse ids that exist.
        bulk: Begin the field of a problem with the kind and number of its record.
    """

    networks: Sequence[Network] = ()
    instances: Collection[Any] = ()
    create: bool = False
    bulk: bool = False


class RecordStore(Protocol):
    """Records of a host, or records of a fleet that the caller may know.

    A change returns once the change is in force, or with the reasons why it is not. Each method with an id raises
    `NotFound` if no record has the id.

    Attributes:
        clearable: Keys that a patch of an instance can clear although they are not in the record.
    """

    tables: ClassVar[Tables]
    clearable: ClassVar[tuple[str, ...]] = ()

    def collect(self) -> MutableMapping[InstanceId, Any]:
        """Return an empty mapping for the instances of a body of any length."""
        return {}

    def find_network(self, text: str) -> NetworkId:
        """Return the id of the network with this id or name; `text` itself if there is none.

        Raises:
            RequestRefused: Several networks have the name.
        """

    def find_instance(self, text: str) -> InstanceId:
        """Return the id of the instance with this id or name, as `find_network` does for networks."""

    def steps(self) -> Sequence[Step]:
        """Return the steps of long work in progress."""

    async def report_networks(self) -> Iterable[Report]:
        """Report every network as `bodies.NetworkView`, sorted by id."""

    async def report_network(self, network: NetworkId) -> Report:
        """Report one network."""

    async def match_instances(self, text: str, network: NetworkId | None) -> Sequence[InstanceId]:
        """Return the ids of the instances that match; see `model.matching.matcher`."""

    async def report_page(self, instances: Sequence[InstanceId]) -> Sequence[Report]:
        """Report these instances as `bodies.InstanceSummary`."""

    async def report_instance(self, instance: InstanceId) -> Report:
        """Report one instance as `bodies.InstanceView`."""

    async def put(self, change: Change) -> Written:
        """Add or replace records: all or none.

        Raises:
            AlreadyExists: An id exists, with `create`.
            RecordConflict: An address or a listener is taken (`problems` has the fields).
            SourceRefused: A network is unknown.
        """

    async def put_many(self, change: Change) -> object:
        """Add or replace many records."""
        return await self.put(change)

    async def patch_network(self, network: NetworkId, patch: Mapping[str, object]) -> Written:
        """Apply a merge patch to a network."""

    async def patch_instance(self, instance: InstanceId, patch: Mapping[str, object]) -> Written:
        """Apply a merge patch to an instance."""

    async def remove_network(self, network: NetworkId) -> Written:
        """Remove a network; raise `RecordConflict` while instances have ports in the network."""

    async def remove_instance(self, instance: InstanceId) -> Written:
        """Remove an instance."""

    async def revoke_tokens(self, instance: InstanceId) -> object:
        """Revoke the instance's current session tokens."""

    async def reopen(self, instance: InstanceId) -> object:
        """Begin the instance's boot again."""

    async def show_password(self, instance: InstanceId) -> object:
        """Return the password that the guest posted as `bodies.PasswordBody`; raise `NotFound` if there is none."""

    async def clear_password(self, instance: InstanceId) -> Written:
        """Clear the password that the guest posted; raise `NotFound` if there is none."""


@dataclass(frozen=True, slots=True)
class RecordApi:
    """Differences between the APIs of a host and of a fleet.

    Attributes:
        override: Answer to a change of an instance's tokens or boot.
        reads: Dependencies of routes that read records, if the router has none. One sets `request.state.store`.
    """

    list_instances: Callable[..., Any]
    instance: type[BaseModel]
    written: Any
    many: Any
    override: Any
    reads: Sequence[params.Depends] = ()
    secrets: Sequence[params.Depends] = ()
    writes: Sequence[params.Depends] = ()


def add_record_routes(router: APIRouter, api: RecordApi) -> None:
    """Add the routes to the router of an API."""

    def shows(model: Any) -> dict[str, Any]:
        return {"dependencies": api.reads, "responses": {200: {"model": model}}}

    def writes(answer: Any, body: type[BaseModel] | None = None) -> dict[str, Any]:
        described = {} if body is None else {"openapi_extra": bodies.takes(body)}
        return {"dependencies": api.writes, "response_model": answer, **described}

    network, instance = (writes(api.written, one) for one in (bodies.NetworkRecord, api.instance))
    password: dict[str, Any] = {
        "response_model": bodies.PasswordBody,
        "response_model_exclude_unset": True,
    }

    router.get("/progress", dependencies=api.reads)(show_progress)
    router.get("/networks", **shows(list[bodies.NetworkView]))(list_networks)
    router.post("/networks", status_code=201, **network)(add_network)
    router.get("/networks/{network}", **shows(bodies.NetworkView))(show_network)
    router.put("/networks/{network}", **network)(put_network)
    router.patch("/networks/{network}", **network)(patch_network)
    router.delete("/networks/{network}", **writes(api.written))(remove_network)

    router.get("/instances", **shows(list[bodies.InstanceSummary]))(api.list_instances)
    router.get("/search/instances", **shows(bodies.InstancePage))(search_instances)
    router.post("/instances", status_code=201, **instance)(add_instance)
    router.get("/instances/{instance}", **shows(bodies.InstanceView))(show_instance)
    router.put("/instances/{instance}", **instance)(put_instance)
    router.patch("/instances/{instance}", **instance)(patch_instance)
    router.delete("/instances/{instance}", **writes(api.written))(remove_instance)
    router.post("/records", **writes(api.many, bodies.RecordsBody))(put_records)

    router.post("/instances/{instance}/revoke-tokens", **writes(api.override))(revoke_tokens)
    router.post("/instances/{instance}/reopen", **writes(api.override))(reopen_instance)
    secrets = api.secrets
    router.get("/instances/{instance}/password", dependencies=secrets, **password)(show_password)
    router.delete("/instances/{instance}/password", dependencies=secrets)(clear_password)


async def _store(request: Request) -> RecordStore:
    return cast("RecordStore", request.state.store)


_Store: TypeAlias = Annotated[RecordStore, Depends(_store)]


async def _network_id(network: bodies.Named, store: _Store) -> NetworkId:
    return store.find_network(network)


async def _instance_id(instance: bodies.Named, store: _Store) -> InstanceId:
    return store.find_instance(instance)


async def _instance_body(request: Request, store: _Store) -> object:
    return bodies.name_networks(await bodies.read_json(request), store.find_network)


NetworkOf: TypeAlias = Annotated[NetworkId, Depends(_network_id)]
InstanceOf: TypeAlias = Annotated[InstanceId, Depends(_instance_id)]
_InstanceBody: TypeAlias = Annotated[object, Depends(_instance_body)]


async def show_progress(store: _Store) -> Sequence[Step]:
    """List long work in progress, for a client that waits for its answer."""
    return store.steps()


async def list_networks(store: _Store) -> StreamingResponse:
    """List all networks, sorted by id."""
    return bodies.stream_list(in_turns(await store.report_networks()))


async def add_network(body: bodies.JsonBody, store: _Store) -> Written:
    """Add a network; refuse an id that exists."""
    return await store.put(Change([bodies.read_network(body)], create=True))


async def show_network(network: NetworkOf, store: _Store) -> JSONResponse:
    """Show a network."""
    return bodies.RecordResponse(await store.report_network(network))


async def put_network(network: str, body: bodies.JsonBody, store: _Store) -> Written:
    """Add a network, or replace its whole record."""
    return await store.put(Change([bodies.read_network(bodies.refuse_unlike(body, network))]))


async def patch_network(network: NetworkOf, body: bodies.JsonBody, store: _Store) -> Written:
    """Change some keys of a network (RFC 7396: null removes a key)."""
    return await store.patch_network(network, bodies.read_patch(body, network, NETWORK))


async def remove_network(network: NetworkOf, store: _Store) -> Written:
    """Remove a network; refuse this while instances have ports in the network."""
    return await store.remove_network(network)


async def search_instances(
    store: _Store,
    text: bodies.SearchText = "",
    network: bodies.InNetwork = None,
    after: bodies.AfterPage = None,
    limit: bodies.PageSize = 50,
) -> JSONResponse:
    """List matching instances in pages, sorted by id, without payloads."""
    chosen = None if network is None else store.find_network(network)
    ids = await store.match_instances(text, chosen)
    page = matching.cut_page(ids, after, limit)
    shown = await store.report_page(page.ids)
    return bodies.RecordResponse({"found": len(ids), "instances": shown, "next": page.next})


async def add_instance(body: _InstanceBody, store: _Store) -> Written:
    """Add an instance; refuse an id that exists."""
    return await store.put(Change(instances=[_read_instance(store, body)], create=True))


async def show_instance(instance: InstanceOf, store: _Store) -> JSONResponse:
    """Show an instance, with user data and vendor data if the caller may read secrets."""
    return bodies.RecordResponse(await store.report_instance(instance))


async def put_instance(instance: str, body: _InstanceBody, store: _Store) -> Written:
    """Add an instance, or replace its whole record; in a fleet the instance stays on its hosts without `hosts`."""
    record = _read_instance(store, bodies.refuse_unlike(body, instance))
    return await store.put(Change(instances=[record]))


async def patch_instance(instance: InstanceOf, body: _InstanceBody, store: _Store) -> Written:
    """Change some keys of an instance (RFC 7396: null removes a key, lists are replaced).

    On a host, `password: null` clears the password that the guest posted.
    """
    patch = bodies.read_patch(body, instance, INSTANCE, *store.clearable)
    return await store.patch_instance(instance, patch)


async def remove_instance(instance: InstanceOf, store: _Store) -> Written:
    """Remove an instance."""
    return await store.remove_instance(instance)


async def put_records(
    request: Request,
    store: _Store,
    create: bodies.Creates = False,  # noqa: FBT002 - FastAPI passes it by name
) -> object:
    """Add or replace many networks and instances: all or none.

    A body of type `application/x-ndjson` has one record a line, `{"network": {…}}` or `{"instance": {…}}`, and may be
    of any length. The answer comes when all records are in force, which may take minutes: `/v1/progress` shows the
    progress.

    A hub checks more than forty records completely, then writes them in parts, even if the client disconnects:
    `/v1/imports/{name}` has the answer. To continue an interrupted import, send the same records again.
    """
    networks, instances = await bodies.read_records(request, store.collect(), store.tables)
    return await store.put_many(Change(networks, instances, create, bulk=True))


async def revoke_tokens(instance: InstanceOf, store: _Store) -> object:
    """Revoke the instance's tokens, on all its hosts; tokens issued later are valid."""
    return await store.revoke_tokens(instance)


async def reopen_instance(instance: InstanceOf, store: _Store) -> object:
    """Begin the instance's boot again: access that ends with the boot is open until the new boot is over."""
    return await store.reopen(instance)


async def show_password(instance: InstanceOf, store: _Store) -> object:
    """Show the password as the guest posted it: encrypted with the instance's key."""
    return await store.show_password(instance)


async def clear_password(instance: InstanceOf, store: _Store) -> Written:
    """Clear the posted password, so that the guest can post another."""
    return await store.clear_password(instance)


def _read_instance(store: RecordStore, body: object) -> Any:
    return bodies.read_record("instance", store.tables["instances"].read, body)
