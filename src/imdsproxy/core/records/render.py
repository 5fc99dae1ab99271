"""Networks and instances as mappings fit for JSON, which the parsers take back unchanged."""

from __future__ import annotations

import base64
from typing import TypeAlias, assert_never

from imdsproxy.core.model import (
    BridgeListener,
    Dialect,
    Instance,
    InterfaceListener,
    Listener,
    NamespaceListener,
    Network,
    Port,
    Scope,
    Subnet,
    Upstream,
)
from imdsproxy.core.policy import NOTHING_SAID, RULES, PolicyRules, TokenMode

__all__ = ["Json", "render_instance", "render_network", "render_record"]

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
"""What JSON can carry."""


def render_record(record: Network | Instance) -> dict[str, Json]:
    """The record's mapping; what has its default is left out."""
    return render_network(record) if isinstance(record, Network) else render_instance(record)


def render_network(network: Network) -> dict[str, Json]:
    """A network's mapping."""
    mapping: dict[str, Json] = {"id": network.id}
    if network.name:
        mapping["name"] = network.name
    if network.project is not None:
        mapping["project"] = network.project
    mapping["listener"] = _render_listener(network.listener)
    if network.subnets:
        mapping["subnets"] = [_render_subnet(subnet) for subnet in network.subnets]
    if network.mtu is not None:
        mapping["mtu"] = network.mtu
    if network.scope is not Scope.NETWORK:
        mapping["scope"] = network.scope.value
    if not network.mac_check:
        mapping["mac_check"] = False
    if network.policy != NOTHING_SAID:
        mapping["policy"] = _render_policy(network.policy)
    return mapping


def render_instance(instance: Instance) -> dict[str, Json]:
    """An instance's mapping. User data that is no UTF-8 becomes `{"base64": …}`."""
    mapping: dict[str, Json] = {
        "id": instance.id,
        "name": instance.name,
        "hostname": instance.hostname,
    }
    texts = {
        "project": instance.project,
        "availability_zone": instance.availability_zone,
        "instance_type": instance.instance_type,
    }
    mapping.update({key: text for key, text in texts.items() if text is not None})
    if instance.ports:
        mapping["ports"] = [_render_port(port) for port in instance.ports]
    if instance.ssh_keys:
        mapping["ssh_keys"] = [{"name": key.name, "key": key.key} for key in instance.ssh_keys]
    if instance.tags:
        mapping["tags"] = dict(instance.tags)
    if instance.user_data is not None:
        mapping["user_data"] = _render_bytes(bytes(instance.user_data))
    if instance.vendor_data is not None:
        mapping["vendor_data"] = instance.vendor_data.decode()
    off = [dialect for dialect in Dialect if dialect not in instance.dialects]
    if off:
        mapping["dialects"] = {dialect.value: False for dialect in off}
    if instance.upstream is not Upstream.EMBEDDED:
        mapping["upstream"] = instance.upstream.value
    if instance.policy != NOTHING_SAID:
        mapping["policy"] = _render_policy(instance.policy)
    if instance.created_at is not None:
        mapping["created_at"] = instance.created_at
    return mapping


def _render_listener(listener: Listener) -> dict[str, Json]:
    match listener:
        case NamespaceListener():
            mapping: dict[str, Json] = {"namespace": listener.namespace}
            if listener.device is not None:
                mapping["device"] = listener.device
            if listener.manage_addresses:
                mapping["manage_addresses"] = True
            return mapping
        case InterfaceListener():
            return {"interface": listener.device}
        case BridgeListener():
            return {"bridge": listener.bridge}
    assert_never(listener)


def _render_subnet(subnet: Subnet) -> dict[str, Json]:
    mapping: dict[str, Json] = {"cidr": str(subnet.cidr)}
    if subnet.gateway is not None:
        mapping["gateway"] = str(subnet.gateway)
    if subnet.dns:
        mapping["dns"] = [str(server) for server in subnet.dns]
    return mapping


def _render_port(port: Port) -> dict[str, Json]:
    mapping: dict[str, Json] = {"network": port.network}
    if port.mac is not None:
        mapping["mac"] = port.mac
    if port.addresses:
        mapping["addresses"] = [str(address) for address in port.addresses]
    if port.project is not None:
        mapping["project"] = port.project
    return mapping


def _render_policy(rules: PolicyRules) -> dict[str, Json]:
    values = ((key, getattr(rules, key)) for key in RULES if key != "paths")
    mapping: dict[str, Json] = {
        key: value.value if isinstance(value, TokenMode) else value
        for key, value in values
        if value is not None
    }
    if rules.paths:
        mapping["paths"] = {path: word.value for path, word in rules.paths}
    return mapping


def _render_bytes(payload: bytes) -> Json:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(payload).decode()}
