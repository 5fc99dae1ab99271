"""Schema of a network's record, and of the policy in records of networks and instances."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from imdsproxy.model import entities, path_rules
from imdsproxy.model.policy import MOST_NAMES, NO_RULES, RULES, PolicyRules, Rule, TokenMode
from imdsproxy.model.records import values
from imdsproxy.model.records.schema import Field, Json, Key, Kind, Table, list_of, refuse_repeated

MTU_BOUNDS: Final = (68, 65535)
_MODE: Final = values.choice_of(TokenMode)
_WORD: Final = values.choice_of(path_rules.PathWord)


def _parse_mode(field: Field) -> TokenMode:
    if field.value is False:
        # `off` without quotes is false in YAML 1.1.
        return TokenMode.OFF
    if not isinstance(field.value, str):
        raise field.error("is not a token mode", f"one of {', '.join(TokenMode)}")
    return TokenMode(_MODE.parse(field))


def _parse_paths(field: Field) -> path_rules.PathRules | None:
    entries = field.mapping()
    if len(field.value) > path_rules.MOST_PATH_RULES:
        raise field.error(f"has {len(field.value)} paths", f"at most {path_rules.MOST_PATH_RULES}")
    words = ((path, entry.read(_parse_word)) for path, entry in entries.items())
    return tuple(sorted((path, word) for path, word in words if word is not None)) or None


def _parse_word(field: Field) -> path_rules.PathWord:
    fault = path_rules.find_path_fault(str(field.path[-1]))
    if fault is not None:
        raise field.error(*fault)
    return path_rules.PathWord(_WORD.parse(field))


_RULE_KINDS: Final[dict[type[object], Kind]] = {
    bool: values.SWITCH,
    TokenMode: Kind(_parse_mode, {"enum": [*TokenMode, False]}, _MODE.render),
    tuple: Kind(
        _parse_paths,
        {
            **values.entries(path_rules.PATH_PATTERN, {"enum": [*path_rules.PathWord, None]}),
            "maxProperties": path_rules.MOST_PATH_RULES,
        },
        lambda rules: {path: word.value for path, word in rules},
    ),
}


def _names(pattern: str) -> Kind:
    """Return the kind of a list of names; an empty list is a value: it undoes the list of a less specific scope."""
    compiled = re.compile(pattern)

    def parse(field: Field) -> tuple[str, ...]:
        items = list(field.items())
        if len(items) > MOST_NAMES:
            raise field.error(f"has {len(items)} names", f"at most {MOST_NAMES}")
        words = (item.read(lambda one: one.matched(compiled, pattern)) for item in items)
        return tuple(sorted({word for word in words if word is not None}))

    item: Json = {"type": "string", "pattern": pattern}
    schema: dict[str, Json] = {"type": "array", "items": item, "maxItems": MOST_NAMES}
    return Kind(parse, schema, list)


def _kind(rule: Rule) -> Kind:
    if rule.names is not None:
        return _names(rule.names)
    return _RULE_KINDS[rule.kind] if rule.bounds is None else values.number_between(*rule.bounds)


def _key(rule: Rule) -> Key:
    kind = _kind(rule)
    return Key(rule.name, kind, rule.help, since=rule.since, limits=rule.limits)


POLICY: Final = Table(
    "PolicyRecord",
    lambda **rules: PolicyRules(**rules) if rules else NO_RULES,
    "Access of guests to documents. A missing field takes its value from a less specific scope. Settings have the same "
    "fields for the host, networks, projects and instances, and override a record of the same scope.",
    *map(_key, RULES.values()),
)


def _check_namespace(entries: Mapping[str, Field], found: dict[str, Any]) -> None:
    if found.get("manage_addresses") and "device" not in entries:
        entries["manage_addresses"].refuse(
            "needs device", "name the device for the metadata addresses"
        )
    if found.get("redirected") and "device" in entries:
        entries["redirected"].refuse(
            "cannot be combined with device", "remove device: all devices are covered"
        )


_LISTENERS: Final[dict[type[entities.Listener], Table[Any]]] = {
    entities.NamespaceListener: Table(
        "NamespaceListenerRecord",
        entities.NamespaceListener,
        "An existing network namespace.",
        Key(
            "namespace", values.NAMESPACE, "Reached through this network namespace.", required=True
        ),
        Key("device", values.DEVICE, "Device of the namespace with the guests behind it."),
        Key(
            "manage_addresses",
            values.SWITCH,
            "Put the metadata addresses on the device; if off, another program does.",
        ),
        Key(
            "redirected",
            values.SWITCH,
            "imdsproxy's rules in the namespace redirect requests from its `qr-` devices. For a namespace of a Neutron "
            "router.",
        ),
        check=_check_namespace,
    ),
    entities.InterfaceListener: Table(
        "InterfaceListenerRecord",
        entities.InterfaceListener,
        "A host interface.",
        Key(
            "interface",
            values.DEVICE,
            "Reached through this interface of the host.",
            "device",
            required=True,
        ),
    ),
    entities.BridgeListener: Table(
        "BridgeListenerRecord",
        entities.BridgeListener,
        "A bridge of the host.",
        Key("bridge", values.DEVICE, "Reached through this bridge of the host.", required=True),
    ),
}
_KINDS: Final = {table.names[0]: table for table in _LISTENERS.values()}
LISTENER_KEYS: Final = tuple(name for table in _LISTENERS.values() for name in table.names)


def _parse_listener(field: Field) -> entities.Listener | None:
    entries = field.mapping(LISTENER_KEYS)
    kinds = [kind for kind in _KINDS if kind in entries]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        raise field.error(f"has {found}", f"exactly one of {', '.join(_KINDS)}")
    table = _KINDS[kinds[0]]
    for key in entries.keys() - set(table.names):
        entries[key].refuse(f"is not allowed with {kinds[0]}", "only with namespace")
    listener: entities.Listener | None = table.build(entries)
    return listener


LISTENER: Final = Kind(
    _parse_listener,
    render=lambda listener: _LISTENERS[type(listener)].render(listener),
    tables=tuple(_LISTENERS.values()),
)


def _check_subnet(entries: Mapping[str, Field], found: dict[str, Any]) -> None:
    gateway, cidr = found.get("gateway"), found.get("cidr")
    if gateway is not None and cidr is not None and gateway.version != cidr.version:
        entries["gateway"].refuse(
            f"{gateway} is IPv{gateway.version}", f"IPv{cidr.version}, as {cidr}"
        )


_SUBNET: Final = Table(
    "SubnetRecord",
    entities.Subnet,
    "An address range of a network.",
    Key("cidr", values.CIDR, "Its addresses, as `10.0.0.0/24`.", required=True),
    Key("gateway", values.ADDRESS, "The default route that guests read."),
    Key("dns", list_of(values.ADDRESS), "Name servers that guests read."),
    check=_check_subnet,
)


def _check_network(entries: Mapping[str, Field], found: dict[str, Any]) -> None:
    if found.get("mac_check") and found.get("scope") is entities.Scope.ROUTER:
        entries["mac_check"].refuse(
            "is not allowed with scope router", "a router hides the MACs of the guests behind it"
        )


NETWORK: Final = Table(
    "NetworkRecord",
    entities.Network,
    "A network.",
    Key(
        "id",
        values.NETWORK_ID,
        "Id of the network, for ports and settings: 1 to 64 of `A-Z a-z 0-9 . _ -`, a letter or digit first.",
        required=True,
    ),
    Key("name", values.TEXT, "A name for people."),
    Key(
        "project",
        values.TEXT,
        "Project that owns the network. A project's policy applies to its instances, not to its networks.",
    ),
    Key("listener", LISTENER, "Place where imdsproxy listens for guests.", required=True),
    Key(
        "subnets",
        list_of(_SUBNET.kind, partial(refuse_repeated, of=lambda subnet: subnet.cidr)),
        "Address ranges of guests, shown to guests in `network_data.json` and `network-config`.",
    ),
    Key("mtu", values.number_between(*MTU_BOUNDS), "MTU shown to guests, in bytes."),
    Key(
        "scope",
        values.choice_of(entities.Scope),
        "Kind of the id: a network, or a router with several networks behind it.",
    ),
    Key(
        "mac_check",
        values.SWITCH,
        "Accept an address only with its MAC. Off with `scope: router`, because a router hides the MACs of guests.",
    ),
    Key(
        "policy",
        POLICY.kind,
        "Policy of guests in the network. Settings for the same network override it.",
    ),
    check=_check_network,
)
