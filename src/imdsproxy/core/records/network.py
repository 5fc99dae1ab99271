"""Parse a network's record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imdsproxy.core.model import (
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    Scope,
    Subnet,
)
from imdsproxy.core.policy import NOTHING_SAID
from imdsproxy.core.records.fields import Field, LineOf, Path, Refused, optional, root
from imdsproxy.core.records.policy import parse_policy
from imdsproxy.core.records.scalars import (
    parse_address,
    parse_cidr,
    parse_device,
    parse_namespace,
    parse_network_id,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MTU_BOUNDS", "NETWORK_KEYS", "parse_network"]

NETWORK_KEYS: Final = (
    "id",
    "name",
    "project",
    "listener",
    "subnets",
    "mtu",
    "scope",
    "mac_check",
    "policy",
)
_KINDS: Final = ("namespace", "interface", "bridge")
_LISTENER_KEYS: Final = (*_KINDS, "device", "manage_addresses")
MTU_BOUNDS: Final = (68, 65535)


def parse_network(
    record: object, *, file: str | None = None, line_of: LineOf | None = None, path: Path = ()
) -> Network | Refused:
    """A network, or everything that is wrong with its record.

    Args:
        record: The mapping, as YAML or JSON gives it.
        file: The file it comes from, for the problems.
        line_of: Where its parts stand in that file.
        path: Where the record stands in its document, as `("networks", 3)`.
    """
    field, findings = root(record, file=file, line_of=line_of, path=path)
    entries = field.mapping(NETWORK_KEYS, required=("id", "listener"))
    if entries is None:
        return Refused(tuple(findings.problems))
    network_id = optional(entries, "id", parse_network_id)
    listener = optional(entries, "listener", _parse_listener)
    name = optional(entries, "name", Field.text)
    project = optional(entries, "project", Field.text)
    subnets = _parse_subnets(entries["subnets"]) if "subnets" in entries else ()
    mtu = optional(entries, "mtu", lambda mtu: mtu.whole_number(*MTU_BOUNDS))
    scope = optional(entries, "scope", _parse_scope)
    mac_check = optional(entries, "mac_check", Field.boolean)
    policy = optional(entries, "policy", parse_policy)
    if mac_check and scope is Scope.ROUTER:
        entries["mac_check"].refuse(
            "does not go with scope router", "nobody sees a guest's MAC through a router"
        )
    if findings.problems or network_id is None or listener is None:
        return Refused(tuple(findings.problems), network_id)
    return Network(
        network_id,
        listener,
        name or "",
        project,
        subnets,
        mtu,
        scope or Scope.NETWORK,
        mac_check is not False,
        policy or NOTHING_SAID,
    )


def _parse_scope(field: Field) -> Scope | None:
    word = field.one_of([scope.value for scope in Scope])
    return None if word is None else Scope(word)


def _parse_listener(field: Field) -> Listener | None:
    entries = field.mapping(_LISTENER_KEYS)
    if entries is None:
        return None
    kinds = [kind for kind in _KINDS if kind in entries]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        field.refuse(f"has {found}", f"exactly one of {', '.join(_KINDS)}")
        return None
    if kinds == ["namespace"]:
        return _parse_namespace_listener(entries)
    for key in ("device", "manage_addresses"):
        if key in entries:
            entries[key].refuse(f"does not go with {kinds[0]}", "only with namespace")
    device = parse_device(entries[kinds[0]])
    if device is None:
        return None
    return InterfaceListener(device) if kinds == ["interface"] else BridgeListener(device)


def _parse_namespace_listener(entries: Mapping[str, Field]) -> NamespaceListener | None:
    namespace = parse_namespace(entries["namespace"])
    device = optional(entries, "device", parse_device)
    manage = optional(entries, "manage_addresses", Field.boolean)
    if manage and "device" not in entries:
        entries["manage_addresses"].refuse(
            "needs device", "name the device that is to carry the metadata addresses"
        )
    if namespace is None:
        return None
    return NamespaceListener(namespace, device, manage_addresses=bool(manage))


def _parse_subnets(field: Field) -> tuple[Subnet, ...]:
    subnets = []
    seen = set()
    for item in field.items():
        subnet = _parse_subnet(item)
        if subnet is None:
            continue
        if subnet.cidr in seen:
            item.refuse(f"{subnet.cidr} is there twice")
        seen.add(subnet.cidr)
        subnets.append(subnet)
    return tuple(subnets)


def _parse_subnet(field: Field) -> Subnet | None:
    entries = field.mapping(("cidr", "gateway", "dns"), required=("cidr",))
    if entries is None:
        return None
    cidr = optional(entries, "cidr", parse_cidr)
    gateway = optional(entries, "gateway", parse_address)
    dns = entries["dns"].items() if "dns" in entries else []
    servers = [parse_address(item) for item in dns]
    if cidr is None:
        return None
    if gateway is not None and gateway.version != cidr.version:
        entries["gateway"].refuse(
            f"{gateway} is IPv{gateway.version}", f"IPv{cidr.version}, as {cidr}"
        )
    return Subnet(cidr, gateway, tuple(server for server in servers if server is not None))
