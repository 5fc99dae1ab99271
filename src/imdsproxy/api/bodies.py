"""Bodies of the admin API: readers, and models for OpenAPI.

`imdsproxy.model.records` reads the records and reports every problem with its field. The models of records are made of
its tables, and only describe records to clients.
"""

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, TypeAlias, TypeVar, Union

from fastapi import Depends, Query
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from imdsproxy.api.answers import NotServed
from imdsproxy.errors import Problem, RequestRefused
from imdsproxy.model import matching, records
from imdsproxy.model.addresses import normalise_address
from imdsproxy.model.entities import Instance, InstanceId, IpAddress, Network, NetworkId
from imdsproxy.model.observation import Conflict
from imdsproxy.model.records.grant import GRANT
from imdsproxy.model.records.network import POLICY
from imdsproxy.model.records.schema import Key, Kind, Table

MAX_BODY: Final = 64 * 1024 * 1024
"""Maximum size of a request in bytes: 16 MiB of user-data in base64, twice, or some 100,000 plain instances."""

PASSWORD: Final = "password"  # noqa: S105 - a key of a patch
"""Key that a patch can clear although it is not in an instance's record."""

_INLINE: Final = 64 * 1024
_MOST_PROBLEMS: Final = 1000
_SHOWN: Final = 5
_LINE_HINT: Final = '{"network": {…}} or {"instance": {…}}'
_T = TypeVar("_T")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


@cache
def _model_of(table: Table[Any]) -> Any:
    """Build a model of one of the core's tables; the model only describes the table to clients."""
    fields = {key.name: _field(table, key) for key in table.keys if not key.only_in_files}
    return create_model(table.name, __base__=_Record, __doc__=table.help, **fields)


def _field(table: Table[Any], key: Key) -> Any:
    kind, description = _type_of(key.kind), key.help or None
    if key.required:
        return kind, Field(description=description)
    default = table.default(key)
    rendered = None if default is None else key.kind.render(default)
    shown = None if rendered in ([], {}) else rendered
    return kind | None, Field(default=shown, description=description)


def _type_of(kind: Kind) -> Any:
    if kind.item is not None:
        return list[_type_of(kind.item)]  # type: ignore[misc] # a type that is made here
    kinds = [_model_of(table) for table in kind.tables]
    if kind.schema is not None:
        kinds.insert(0, Annotated[Any, WithJsonSchema(dict(kind.schema))])
    return Union[tuple(kinds)]  # noqa: UP007 - of a list


if TYPE_CHECKING:
    NetworkRecord: TypeAlias = BaseModel
    InstanceRecord: TypeAlias = BaseModel
    PlacedRecord: TypeAlias = BaseModel
    PolicyRecord: TypeAlias = BaseModel
    GrantRecord: TypeAlias = BaseModel
else:
    NetworkRecord, InstanceRecord = _model_of(records.NETWORK), _model_of(records.INSTANCE)
    PlacedRecord, PolicyRecord = _model_of(records.PLACED), _model_of(POLICY)
    GrantRecord = _model_of(GRANT)


class DocumentBody(BaseModel):
    """A document's bytes: `text` if they are UTF-8, else `base64`."""

    text: str | None = None
    base64: str | None = None

    @classmethod
    def of(cls, value: bytes) -> Self:
        """Set `text` or `base64`, never both."""
        try:
            return cls(text=value.decode())
        except UnicodeDecodeError:
            return cls(base64=b64encode(value).decode())


class DocumentView(BaseModel):
    """The answer that a guest gets."""

    status: int
    headers: list[list[str]]
    body: DocumentBody


class PasswordBody(_Record):
    """A password that a guest posted: `text` if it is UTF-8, else `base64`."""

    instance: str
    password: DocumentBody


class RotateBody(BaseModel):
    """Reason of a rotation of the issuer's keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    compromised: bool = False


class RecordsBody(_Record):
    """Many records at once; all are stored, or none."""

    networks: list[NetworkRecord] = Field(default_factory=list)
    instances: list[InstanceRecord] = Field(default_factory=list)


class NetworkView(_Record):
    """A network, its sources, and whether it is served."""

    record: NetworkRecord
    source: str
    instances: int
    serving: bool
    not_served: NotServed | None


class InstanceView(_Record):
    """An instance, its ids, its sources, and its conflicts."""

    record: InstanceRecord
    ec2_id: str
    uuid: str
    source: str
    revision: str
    conflicts: list[Conflict]
    pending: list[str] = Field(
        description="Reasons why guests do not get the record, or not its newest version."
    )


class InstanceSummary(InstanceView):
    """An instance as in `InstanceView`; the record is without payloads."""

    user_data_bytes: int
    vendor_data_bytes: int


class InstancePage(_Record):
    """One page of the matching instances."""

    found: int = Field(description="Number of matching instances on all pages.")
    instances: list[InstanceSummary]
    next: str | None = Field(
        description="To be given as `after` for the page behind; null where this is the last."
    )


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """Describe a route's body for OpenAPI; the routes read and check it themselves."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class RecordResponse(JSONResponse):
    """JSON answer whose content still has records and other values of the core."""

    def render(self, content: object) -> bytes:
        """Encode the content as UTF-8."""
        return _render(content)


def _render(content: object) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=_render_part)
    return text.encode()


def _render_part(value: Any) -> object:
    return records.render_record(value) if isinstance(value, Network | Instance) else asdict(value)


def stream_list(values: AsyncIterator[object]) -> StreamingResponse:
    """Send a list as JSON, part by part, however long it is; values as of `RecordResponse`."""
    return StreamingResponse(_render_list(values), media_type="application/json")


async def _render_list(values: AsyncIterator[object]) -> AsyncIterator[bytes]:
    part = bytearray(b"[")
    async for value in values:
        part += b"," if not part.endswith(b"[") else b""
        part += _render(value)
        if len(part) > _INLINE:
            yield bytes(part)
            part.clear()
    yield bytes(part + b"]")


async def read_json(request: Request) -> object:
    """Return the request's body.

    Raises:
        RequestRefused: The body is too large, not JSON, or has a key twice.
    """
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY:
            raise _refused("is too large", f"at most {MAX_BODY // 1024 // 1024} MiB")
        chunks.append(chunk)
    raw = b"".join(chunks)
    # Large bodies are decoded in a thread: guests in the resolver wait for the loop.
    return _decode(raw) if size <= _INLINE else await asyncio.to_thread(_decode, raw)


InNetwork: TypeAlias = Annotated[
    str | None, Query(description="Only instances with a port in this network.")
]
SearchText: TypeAlias = Annotated[
    str,
    Query(
        max_length=200,
        description="Words that each must be in an id, name, host name, project, MAC, address or tag, in any case.",
    ),
]
OfProject: TypeAlias = Annotated[str | None, Query(description="Only instances of this project.")]
AfterPage: TypeAlias = Annotated[str | None, Query(description="`next` of the previous page.")]
PageSize: TypeAlias = Annotated[
    int, Query(ge=1, le=matching.MOST, description="Maximum number of instances of a page.")
]
"""Parameters of lists and searches of instances, on a host and on a hub."""

JsonBody: TypeAlias = Annotated[object, Depends(read_json)]
Named: TypeAlias = Annotated[str, Field(description="The id, or a name that only one record has.")]
Creates: TypeAlias = Annotated[bool, Query(description="Refuse ids that exist.")]


def choose_named(text: str, found: Collection[str]) -> str:
    """Return the only id of records with the name `text`; without one the text itself.

    Raises:
        RequestRefused: Several records have the name.
    """
    if len(found) > 1:
        shown = ", ".join(sorted(found)[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        raise RequestRefused(f"{len(found)} have the name {text}", hint=f"use an id: {shown}")
    return next(iter(found), text)


def read_address(text: str) -> IpAddress:
    """Return a guest's address in its normal form; raise `RequestRefused` for another text."""
    try:
        return normalise_address(ip_address(text))
    except ValueError as error:
        problem = Problem("address", f"{text} is no IP address", "10.0.0.5 or 2001:db8::5")
        raise RequestRefused(problem.reason, problems=[problem]) from error


def read_record(kind: str, parse: Callable[[object], _T | records.Refused], body: object) -> _T:
    """Return the record of a body; raise `RequestRefused` with every wrong field."""
    parsed = parse(body)
    if isinstance(parsed, records.Refused):
        raise RequestRefused(f"the {kind} is not acceptable", problems=parsed.problems)
    return parsed


read_network = partial(read_record, "network", records.parse_network)


def read_patch(body: object, identity: str, record: Table[Any], *more: str) -> dict[str, object]:
    """Return the merge patch of a record; arguments as of `refuse_unlike` and `refuse_unclearable`."""
    patch = refuse_unlike(body, identity)
    refuse_unclearable(patch, record, *more)
    return patch


async def read_records(
    request: Request,
    instances: MutableMapping[InstanceId, Any],
    tables: records.Tables = records.TABLES,
) -> tuple[list[Network], Collection[Any]]:
    """Return the networks and instances of a bulk body.

    The records of a body of type `application/x-ndjson` are read as they come, so it may be of any length.

    A body with one record a line, `{"network": {…}}` or `{"instance": {…}}`, adds its instances to `instances`.

    Raises:
        RequestRefused: Records are wrong; `problems` has every wrong field, up to a thousand in such a body.
    """
    if request.headers.get("content-type") != "application/x-ndjson":
        body = await read_json(request)
        read = await asyncio.to_thread(records.parse_records, body, tables=tables)
        _refuse_bad(read.all_problems)
        return read.networks, read.instances
    networks: list[Network] = []
    problems: list[Problem] = []
    counts = {"network": 0, "instance": 0}
    async for raw in _lines(request):
        line = _decode(raw)
        kind = next(iter(line)) if isinstance(line, dict) and len(line) == 1 else ""
        if not isinstance(line, dict) or kind not in counts:
            raise _refused("has a line that is neither a network nor an instance", _LINE_HINT)
        path = (f"{kind}s", counts[kind])
        counts[kind] += 1
        match records.parse_listed(path, line[kind], tables=tables):
            case records.Refused(problems=found):
                problems += found
            case Network() as network:
                networks.append(network)
            case instance if instance.id in instances:
                field = f"instances[{path[1]}].id"
                problems.append(Problem(field, f"{instance.id} appears twice"))
            case instance:
                instances[instance.id] = instance
    _refuse_bad(problems[:_MOST_PROBLEMS])
    return networks, instances.values()


def _refuse_bad(problems: Sequence[Problem]) -> None:
    if problems:
        message = "no record was stored: some are not acceptable"
        raise RequestRefused(message, problems=problems)


async def _lines(request: Request) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in request.stream():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_BODY:
            raise _refused("has a line that is too long", f"at most {MAX_BODY // 1024 // 1024} MiB")
        for line in filter(None, lines):
            yield line
        await asyncio.sleep(0)
    if rest:
        yield rest


def refuse_unlike(body: object, identity: str) -> dict[str, object]:
    """Return the body with the id of its URL; raise `RequestRefused` if the body has another id."""
    if not isinstance(body, dict):
        raise _refused("is no JSON object", "{…}")
    if body.get("id", identity) != identity:
        raise RequestRefused(
            "the record's id differs from the one in the address",
            problems=[Problem("id", f"is not {identity}", hint="leave it out")],
        )
    return {**body, "id": identity}


def refuse_unclearable(patch: Mapping[str, object], record: Table[Any], *more: str) -> None:
    """Refuse null in a merge patch (RFC 7396) for required and for unknown keys, except the keys in `more`."""
    optional = [key.name for key in record.keys if not (key.required or key.only_in_files)]
    levels: list[tuple[str, Mapping[str, object], list[str]]] = [("", patch, [*optional, *more])]
    for key in record.keys:
        inner = patch.get(key.name)
        if key.kind.tables and isinstance(inner, dict):
            known = [name for table in key.kind.tables for name in table.names]
            levels.append((f"{key.name}.", inner, known))
    problems = [
        Problem(f"{prefix}{key}", "cannot be cleared", f"can be cleared: {', '.join(clearable)}")
        for prefix, values, clearable in levels
        for key, value in values.items()
        if value is None and key not in clearable
    ]
    if problems:
        names = ", ".join(one.field for one in problems)
        raise RequestRefused(f"{names} cannot be cleared", hint=problems[0].hint, problems=problems)


def name_networks(body: object, find: Callable[[str], NetworkId]) -> object:
    """Replace network names in an instance's ports by ids; return the body."""
    ports = body.get("ports") if isinstance(body, dict) else None
    for port in ports if isinstance(ports, list) else ():
        if isinstance(port, dict) and isinstance(port.get("network"), str):
            port["network"] = find(port["network"])
    return body


def merge_patch(target: object, patch: object) -> object:
    """Apply a merge patch (RFC 7396): mappings are merged, null removes a key, everything else replaces.

    Raises:
        RequestRefused: The patch is nested too deeply.
    """
    try:
        return _merge(target, patch)
    except RecursionError as error:
        raise _refused("is nested too deeply", "a record has few levels") from error


def _merge(target: object, patch: object) -> object:
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged


def _decode(raw: bytes) -> object:
    try:
        return json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _refused(f"is not JSON: {error}", "UTF-8 JSON, each key once") from error


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f"the key {twice!r} stands twice")
    return result


def _no_constant(word: str) -> object:
    raise ValueError(f"JSON has no {word}")


def _refused(reason: str, hint: str) -> RequestRefused:
    problem = Problem("body", reason, hint=hint)
    return RequestRefused(f"the body {reason}", hint=hint, problems=[problem])
