"""A network's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from imdsproxy.core.model import (
    BridgeListener,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    Scope,
    Subnet,
)
from imdsproxy.core.records.fields import Field
from imdsproxy.core.records.policy import POLICY
from imdsproxy.core.records.schema import (
    SWITCH,
    TEXT,
    Key,
    Kind,
    Table,
    choice_of,
    list_of,
    number_between,
)
from imdsproxy.core.records.values import ADDRESS, CIDR, DEVICE, NAMESPACE, NETWORK_ID

MTU_BOUNDS: Final = (68, 65535)


def _check_namespace(entries: Mapping[str, Field], values: dict[str, Any]) -> None:
    if values.get("manage_addresses") and "device" not in entries:
        entries["manage_addresses"].refuse(
            "needs device", "name the device that is to carry the metadata addresses"
        )


_LISTENERS: Final[dict[type[Listener], Table[Any]]] = {
    NamespaceListener: Table(
        "NamespaceListenerRecord",
        NamespaceListener,
        "An existing network namespace.",
        Key("namespace", NAMESPACE, "Reached through this network namespace.", required=True),
        Key("device", DEVICE, "The namespace's device that guests are behind."),
        Key(
            "manage_addresses",
            SWITCH,
            "Put the metadata addresses on the device, or leave that to others.",
        ),
        check=_check_namespace,
    ),
    InterfaceListener: Table(
        "InterfaceListenerRecord",
        InterfaceListener,
        "A host interface.",
        Key(
            "interface",
            DEVICE,
            "Reached through this interface of the host.",
            "device",
            required=True,
        ),
    ),
    BridgeListener: Table(
        "BridgeListenerRecord",
        BridgeListener,
        "A bridge of the host.",
        Key("bridge", DEVICE, "Reached through this bridge of the host.", required=True),
    ),
}
_KINDS: Final = {table.names[0]: table for table in _LISTENERS.values()}
LISTENER_KEYS: Final = tuple(name for table in _LISTENERS.values() for name in table.names)


def _parse_listener(field: Field) -> Listener | None:
    entries = field.mapping(LISTENER_KEYS)
    if entries is None:
        return None
    kinds = [kind for kind in _KINDS if kind in entries]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        field.refuse(f"has {found}", f"exactly one of {', '.join(_KINDS)}")
        return None
    table = _KINDS[kinds[0]]
    for key in entries.keys() - set(table.names):
        entries[key].refuse(f"does not go with {kinds[0]}", "only with namespace")
    listener: Listener | None = table.build(entries)
    return listener


def _check_subnet(entries: Mapping[str, Field], values: dict[str, Any]) -> None:
    gateway, cidr = values.get("gateway"), values.get("cidr")
    if gateway is not None and cidr is not None and gateway.version != cidr.version:
        entries["gateway"].refuse(
            f"{gateway} is IPv{gateway.version}", f"IPv{cidr.version}, as {cidr}"
        )


_SUBNET: Final = Table(
    "SubnetRecord",
    Subnet,
    "An address range of a network.",
    Key("cidr", CIDR, required=True),
    Key("gateway", ADDRESS),
    Key("dns", list_of(ADDRESS)),
    check=_check_subnet,
)


def _parse_subnets(field: Field) -> tuple[Subnet, ...]:
    subnets: dict[object, Subnet] = {}
    for item in field.items():
        subnet = _SUBNET.parse(item)
        if subnet is not None:
            if subnet.cidr in subnets:
                item.refuse(f"{subnet.cidr} is there twice")
            subnets[subnet.cidr] = subnet
    return tuple(subnets.values())


def _check_network(entries: Mapping[str, Field], values: dict[str, Any]) -> None:
    if values.get("mac_check") and values.get("scope") is Scope.ROUTER:
        entries["mac_check"].refuse(
            "does not go with scope router", "a router hides the MACs of the guests behind it"
        )


NETWORK: Final = Table(
    "NetworkRecord",
    Network,
    "A network.",
    Key("id", NETWORK_ID, required=True),
    Key("name", TEXT, "A name for people."),
    Key("project", TEXT, "The project that owns it."),
    Key(
        "listener",
        Kind(
            _parse_listener,
            render=lambda listener: _LISTENERS[type(listener)].render(listener),
            tables=tuple(_LISTENERS.values()),
        ),
        "How guests are reached.",
        required=True,
    ),
    Key(
        "subnets",
        Kind(_parse_subnets, render=list_of(_SUBNET.kind).render, item=_SUBNET.kind),
        "Address ranges of guests.",
    ),
    Key("mtu", number_between(*MTU_BOUNDS), "MTU shown to guests, in bytes."),
    Key(
        "scope",
        choice_of(Scope),
        "What the id stands for: a network, or a router with several networks behind it.",
    ),
    Key(
        "mac_check",
        SWITCH,
        "Believe an address only together with its MAC. Off where guests are behind a router.",
    ),
    Key("policy", POLICY.kind, "For the guests that are reached through it."),
    check=_check_network,
)
