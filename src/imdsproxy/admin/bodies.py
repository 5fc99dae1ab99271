"""Bodies of the admin API: how they are read, and how OpenAPI describes them.

Records are read by `imdsproxy.core.records`, which tells every problem with its field; the models
here only describe the same shapes to clients. A test keeps the two together.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from imdsproxy.admin.reports import LeftOut
from imdsproxy.config.policy import PolicyRulesSettings
from imdsproxy.core.model import ID_PATTERN
from imdsproxy.core.observation import Conflict
from imdsproxy.core.packed import PackedInstances
from imdsproxy.core.records import Records, Refused, parse_instance, parse_network, parse_records
from imdsproxy.core.records.fields import MAX_TEXT
from imdsproxy.core.records.network import MTU_BOUNDS
from imdsproxy.core.records.scalars import DEVICE_PATTERN, MAC_PATTERN, NAMESPACE_PATTERN
from imdsproxy.errors import Problem, RequestRefused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from starlette.requests import Request

    from imdsproxy.admin.record_reports import RecordReports
    from imdsproxy.core.model import Instance, Network

__all__ = [
    "DocumentBody",
    "InstanceRecord",
    "InstanceSummary",
    "InstanceView",
    "MAX_BODY",
    "NetworkRecord",
    "NetworkView",
    "PASSWORD",
    "PasswordBody",
    "RecordsBody",
    "merge_patch",
    "name_networks",
    "read_instance",
    "read_json",
    "read_lines",
    "read_network",
    "read_records",
    "refuse_unclearable",
    "refuse_unlike",
]

MAX_BODY: Final = 64 * 1024 * 1024
"""Bytes of a request: 16 MiB of user-data in base64, twice, or some 100,000 plain instances."""

PASSWORD: Final = "password"  # noqa: S105 - a key of a patch
"""What can be cleared beside the keys of an instance's record."""

_INLINE: Final = 64 * 1024
_MOST_PROBLEMS: Final = 1000
_LINE_HINT: Final = '{"network": {…}} or {"instance": {…}}'
_T = TypeVar("_T")


_Id = Annotated[str, Field(pattern=ID_PATTERN)]
_Device = Annotated[str, Field(pattern=DEVICE_PATTERN)]
_Line = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]


def _number(bounds: tuple[int, int], description: str | None = None) -> Any:  # noqa: ANN401 - as pydantic's Field
    return Field(default=None, description=description, ge=bounds[0], le=bounds[1])


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NamespaceListenerRecord(_Record):
    """An existing network namespace."""

    namespace: str = Field(pattern=NAMESPACE_PATTERN)
    device: _Device | None = None
    manage_addresses: bool = False


class InterfaceListenerRecord(_Record):
    """A host interface."""

    interface: _Device


class BridgeListenerRecord(_Record):
    """A bridge of the host."""

    bridge: _Device


class SubnetRecord(_Record):
    """An address range of a network."""

    cidr: str
    gateway: str | None = None
    dns: list[str] = Field(default_factory=list)


class PolicyRecord(PolicyRulesSettings):
    """What guests may read and how; what is missing is left to less specific scopes.

    Settings have the same fields for the host, networks, projects and instances, and win over a record of the same
    scope.
    """


class NetworkRecord(_Record):
    """A network."""

    id: _Id
    name: _Line | None = None
    project: _Id | None = None
    listener: NamespaceListenerRecord | InterfaceListenerRecord | BridgeListenerRecord
    subnets: list[SubnetRecord] = Field(default_factory=list)
    mtu: int | None = _number(MTU_BOUNDS)
    scope: Literal["network", "router"] = Field(
        default="network", description="`router` where the id is a router's."
    )
    mac_check: bool = Field(
        default=True,
        description="Believe an address only together with its MAC; off where guests are behind a router.",
    )
    policy: PolicyRecord | None = Field(
        default=None, description="For the guests that are reached through it."
    )


class PortRecord(_Record):
    """An instance's place in a network."""

    network: _Id
    mac: str | None = Field(default=None, pattern=MAC_PATTERN)
    addresses: list[str] = Field(default_factory=list)
    project: _Id | None = Field(
        default=None, description="The port's own, where it is another one than the instance's."
    )


class SshKeyRecord(_Record):
    """A public key under a name."""

    name: str
    key: str


class Base64(_Record):
    """Bytes that are no UTF-8 text."""

    base64: str


class DialectsRecord(_Record):
    """Which trees of documents the instance has; all are on unless false."""

    ec2: bool = True
    openstack: bool = True
    nocloud: bool = True


class InstanceRecord(_Record):
    """An instance."""

    id: _Id
    name: _Line
    hostname: str | None = Field(default=None, description="Made of the name when left out.")
    project: _Id | None = None
    ports: list[PortRecord] = Field(default_factory=list)
    ssh_keys: list[str | SshKeyRecord] = Field(default_factory=list)
    tags: dict[str, str] = Field(default_factory=dict)
    user_data: str | Base64 | None = Field(default=None, description="At most 16 MiB.")
    vendor_data: str | dict[str, object] | None = None
    availability_zone: str | None = None
    instance_type: str | None = None
    dialects: DialectsRecord | None = None
    upstream: Literal["embedded", "nova"] = Field(
        default="embedded", description="Who has its documents; `nova` needs `project`."
    )
    policy: PolicyRecord | None = Field(default=None, description="Wins over its network's.")
    created_at: int | str | None = Field(
        default=None,
        description="When it was made or built anew: Unix time, or text of RFC 3339 with its zone. Without it the "
        "store notes when it was first put. The boot grace counts from it.",
    )


class DocumentBody(BaseModel):
    """A document's bytes: `text` where they are UTF-8, else `base64`."""

    text: str | None = None
    base64: str | None = None


class PasswordBody(_Record):
    """A password that a guest posted: `text` where it is UTF-8, else `base64`."""

    instance: str
    password: DocumentBody


_PARTS: Final[Mapping[str, tuple[type[BaseModel], ...]]] = {
    "listener": (NamespaceListenerRecord, InterfaceListenerRecord, BridgeListenerRecord),
    "policy": (PolicyRecord,),
    "dialects": (DialectsRecord,),
}
"""The parts of records whose keys are known, each of which can be cleared."""


class RecordsBody(_Record):
    """Many records at once; all are stored, or none."""

    networks: list[NetworkRecord] = Field(default_factory=list)
    instances: list[InstanceRecord] = Field(default_factory=list)


class NetworkView(_Record):
    """A network, where it comes from, and whether it is served."""

    record: NetworkRecord
    source: str
    instances: int
    serving: bool
    left_out: LeftOut | None


class InstanceView(_Record):
    """An instance, its ids, where it comes from, and what contests it."""

    record: InstanceRecord
    ec2_id: str
    uuid: str
    source: str
    revision: str
    conflicts: list[Conflict]
    pending: list[str] = Field(description="Why guests do not get it, or not its newest version.")


class InstanceSummary(InstanceView):
    """The same; the record is without payloads."""

    user_data_bytes: int
    vendor_data_bytes: int


async def read_json(request: Request) -> object:
    """The request's body.

    Raises:
        RequestRefused: It is too large, no JSON, or has a key twice.
    """
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY:
            raise _refused("is too large", f"at most {MAX_BODY // 1024 // 1024} MiB")
        chunks.append(chunk)
    raw = b"".join(chunks)
    # Large bodies are decoded in a thread: the loop has guests waiting in the resolver.
    return _decode(raw) if size <= _INLINE else await asyncio.to_thread(_decode, raw)


def read_network(body: object) -> Network:
    """The network of a body; `RequestRefused` with every field that is wrong."""
    return _good("network", parse_network(body))


def read_instance(body: object) -> Instance:
    """The instance of a body; `RequestRefused` with every field that is wrong."""
    return _good("instance", parse_instance(body))


async def read_records(body: object) -> Records:
    """The records of a bulk body; `RequestRefused` with every field of every record."""
    records = await asyncio.to_thread(parse_records, body)
    if records.all_problems:
        raise RequestRefused(
            "nothing was stored: some records are not acceptable", problems=records.all_problems
        )
    return records


async def read_lines(request: Request) -> tuple[list[Network], PackedInstances]:
    """The records of a bulk body that has one a line: `{"network": {…}}` or `{"instance": {…}}`.

    Each is read as it comes, so the body may be of any length.

    Raises:
        RequestRefused: With every field of every record that is wrong, the first thousand of them.
    """
    networks: list[Network] = []
    instances = PackedInstances()
    problems: list[Problem] = []
    counts = {"network": 0, "instance": 0}
    async for raw in _lines(request):
        body = _decode(raw)
        kind = next(iter(body)) if isinstance(body, dict) and len(body) == 1 else ""
        if not isinstance(body, dict) or kind not in counts:
            raise _refused("has a line that is neither a network nor an instance", _LINE_HINT)
        path = (f"{kind}s", counts[kind])
        counts[kind] += 1
        if kind == "network":
            network = parse_network(body[kind], path=path)
            if isinstance(network, Refused):
                problems += network.problems
            else:
                networks.append(network)
            continue
        instance = parse_instance(body[kind], path=path)
        if isinstance(instance, Refused):
            problems += instance.problems
        elif instance.id in instances:
            problems.append(Problem(f"instances[{path[1]}].id", f"{instance.id} is there twice"))
        else:
            instances[instance.id] = instance
    if problems:
        raise RequestRefused(
            "nothing was stored: some records are not acceptable",
            problems=problems[:_MOST_PROBLEMS],
        )
    return networks, instances


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
    """The body with the id of its address in it; `RequestRefused` when it names another."""
    if not isinstance(body, dict):
        raise _refused("is no JSON object", "{…}")
    if body.get("id", identity) != identity:
        raise RequestRefused(
            "the record's id differs from the one in the address",
            problems=[Problem("id", f"is not {identity}", hint="leave it out")],
        )
    return {**body, "id": identity}


def refuse_unclearable(patch: Mapping[str, object], record: type[BaseModel], *more: str) -> None:
    """Refuse null for what no record of this kind can be without, and for what none has.

    Args:
        patch: RFC 7396.
        record: Which kind of record it changes.
        more: What else can be cleared.
    """
    fields = record.model_fields.items()
    clearable = [name for name, field in fields if not field.is_required()] + [*more]
    problems = list(_unclearable(patch, clearable))
    for part, models in _PARTS.items():
        inner = patch.get(part)
        if isinstance(inner, dict):
            known = [name for model in models for name in model.model_fields]
            problems += _unclearable(inner, known, f"{part}.")
    if problems:
        names = ", ".join(one.field for one in problems)
        raise RequestRefused(f"{names} cannot be cleared", hint=problems[0].hint, problems=problems)


def _unclearable(
    patch: Mapping[str, object], clearable: Sequence[str], prefix: str = ""
) -> Iterator[Problem]:
    for key, value in patch.items():
        if value is None and key not in clearable:
            hint = f"can be cleared: {', '.join(clearable)}"
            yield Problem(f"{prefix}{key}", "cannot be cleared", hint=hint)


def name_networks(body: object, reports: RecordReports) -> object:
    """An instance's body with the ids of the networks that its ports name."""
    ports = body.get("ports") if isinstance(body, dict) else None
    for port in ports if isinstance(ports, list) else ():
        if isinstance(port, dict) and isinstance(port.get("network"), str):
            port["network"] = reports.network_id(port["network"])
    return body


def merge_patch(target: object, patch: object) -> object:
    """RFC 7396: mappings are merged, null takes a key away, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def _good(what: str, parsed: _T | Refused) -> _T:
    if isinstance(parsed, Refused):
        raise RequestRefused(f"the {what} is not acceptable", problems=parsed.problems)
    return parsed


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
    return RequestRefused(
        f"the body {reason}", hint=hint, problems=[Problem("body", reason, hint=hint)]
    )
