"""An instance's record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from imdsproxy.core.model import Dialect, Instance, Port, SshKey, Upstream
from imdsproxy.core.records.fields import Field, Findings
from imdsproxy.core.records.network import POLICY
from imdsproxy.core.records.schema import (
    SWITCH,
    TEXT,
    Json,
    Key,
    Kind,
    Table,
    choice_of,
    list_of,
)
from imdsproxy.core.records.values import (
    GUEST_ADDRESS,
    HOSTNAME,
    INSTANCE_ID,
    MAC,
    MOMENT,
    NETWORK_ID,
    PROJECT_ID,
    USER_DATA,
    USER_DATA_FILE,
    VENDOR_DATA,
    hostname_of,
)
from imdsproxy.errors import quoted

_SSH_KEY_LINE: Final = re.compile(
    r"(?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[A-Za-z0-9@._-]+ [A-Za-z0-9+/]+={0,3}(?: (?P<comment>.+))?"
)
_SSH_KEY_WANTED: Final = "one line as in a .pub file: ssh-ed25519 AAAA… COMMENT"
_LONGEST_SSH_KEY: Final = 16384
# public-keys/ lists INDEX=NAME, which clients split at "=", and a name is a step of a path.
_SSH_KEY_NAME: Final = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff=/]{1,255}")
_NOT_IN_DERIVED: Final = re.compile(r"[^A-Za-z0-9@._+-]+")
_TAG_VALUE: Final = re.compile("[^\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]{0,4096}")

PORT: Final = Table(
    "PortRecord",
    Port,
    "An instance's place in a network.",
    Key("network", NETWORK_ID, "The network's id.", required=True),
    Key("mac", MAC, "The MAC. Without addresses the guest is known by it alone."),
    Key("addresses", list_of(GUEST_ADDRESS), "IPv4 and IPv6 addresses."),
    Key("project", PROJECT_ID, "The port's own, where it is another one than the instance's."),
)


def _parse_ports(field: Field) -> tuple[Port, ...]:
    ports: list[Port] = []
    seen: set[tuple[object, object]] = set()
    for item in field.items():
        port = item.read(PORT.parse)
        if port is None:
            continue
        ports.append(port)
        for value in filter(None, (port.mac, *port.addresses)):
            if (port.network, value) in seen:
                reason = f"{value} is there twice in network {port.network}"
                _last_place(item, value).refuse(reason)
            seen.add((port.network, value))
    return tuple(ports)


def _last_place(port: Field, value: object) -> Field:
    if isinstance(value, str):
        return port.child("mac", value)
    addresses = reversed(port.child("addresses", port.value["addresses"]).items())
    return next(
        one
        for one in addresses
        if Field(one.value, (), Findings()).read(GUEST_ADDRESS.parse) == value
    )


def _parse_key(field: Field) -> str:
    field.text(longest=_LONGEST_SSH_KEY)
    return field.matched(_SSH_KEY_LINE, _SSH_KEY_WANTED)


def _parse_key_name(field: Field) -> str:
    return field.matched(_SSH_KEY_NAME, "1 to 255 printable characters without = and /")


_SSH_KEY: Final = Table(
    "SshKeyRecord",
    SshKey,
    "A public key under a name.",
    Key("name", Kind(_parse_key_name, TEXT.schema), required=True),
    Key("key", Kind(_parse_key, TEXT.schema), required=True),
)


def _parse_ssh_keys(field: Field) -> tuple[SshKey, ...]:
    """The keys in their order, each under a name of its own.

    A key given as a bare line is named by its comment (`key-N` without one; `-2`, `-3` … is added
    to a name that is taken).
    """
    found: list[tuple[int, str | SshKey]] = []
    named: set[str] = set()
    for index, item in enumerate(field.items()):
        bare = isinstance(item.value, str)
        key: str | SshKey | None = item.read(_parse_key) if bare else item.read(_SSH_KEY.parse)
        if isinstance(key, SshKey):
            if key.name in named:
                item.child("name", key.name).refuse(f"the name {quoted(key.name)} is there twice")
            named.add(key.name)
        if key is not None:
            found.append((index, key))
    return tuple(
        key if isinstance(key, SshKey) else SshKey(_derived(key, index, named), key)
        for index, key in found
    )


def _derived(key: str, index: int, taken: set[str]) -> str:
    match = _SSH_KEY_LINE.fullmatch(key)
    comment = "" if match is None else match["comment"] or ""
    stem = _NOT_IN_DERIVED.sub("-", comment).strip("-")[:200] or f"key-{index + 1}"
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


SSH_KEYS: Final = Kind(
    _parse_ssh_keys,
    render=lambda keys: [_SSH_KEY.render(key) for key in keys],
    item=Kind(_parse_key, {"type": "string"}, tables=(_SSH_KEY,)),
)


def _parse_tags(field: Field) -> tuple[tuple[str, str], ...]:
    tags = []
    for key, entry in field.mapping().items():
        name, value = field.child(key, key).read(Field.text), entry.read(_parse_tag_value)
        if name is not None and value is not None:
            tags.append((name, value))
    return tuple(sorted(tags))


def _parse_tag_value(field: Field) -> str:
    return field.matched(_TAG_VALUE, "text, at most 4096 characters, no control characters")


@dataclass(frozen=True, slots=True)
class _Dialects:
    ec2: bool = True
    openstack: bool = True
    nocloud: bool = True


_DIALECTS: Final = Table(
    "DialectsRecord",
    _Dialects,
    "Which trees of documents the instance has; all are on unless false.",
    Key("ec2", SWITCH, "Serve the EC2 documents."),
    Key("openstack", SWITCH, "Serve the OpenStack documents."),
    Key("nocloud", SWITCH, "Serve the NoCloud documents."),
)


def _parse_dialects(field: Field) -> frozenset[Dialect]:
    chosen = _DIALECTS.parse(field)
    return frozenset(dialect for dialect in Dialect if getattr(chosen, dialect.value, True))


def _render_dialects(dialects: frozenset[Dialect]) -> dict[str, Json]:
    return {dialect.value: False for dialect in Dialect if dialect not in dialects}


_OF_NOVA: Final = ("id", "name", "hostname", "project", "ports", "upstream", "policy", "created_at")
"""What a record may have beside Nova, which has all else of its instances itself."""


def _check_instance(entries: Mapping[str, Field], values: dict[str, Any]) -> None:
    if values.keys() >= {"id", "name"}:
        values.setdefault("hostname", hostname_of(values["name"], values["id"]))
    named = entries.get("user_data_file")
    if named is not None and "user_data" in entries:
        named.refuse("stands beside user_data", "one of the two")
    if values.get("upstream") is not Upstream.NOVA:
        return
    if "project" in values:
        values["project"] = entries["project"].read(PROJECT_ID.parse)
    elif "project" not in entries:
        entries["upstream"].refuse("needs project", "Nova has to know whose instance it is")
    for key in entries.keys() - set(_OF_NOVA):
        entries[key].refuse("does not go with upstream: nova", "Nova has it")


INSTANCE: Final = Table(
    "InstanceRecord",
    Instance,
    "An instance.",
    Key("id", INSTANCE_ID, required=True),
    Key("name", TEXT, "A name for people.", required=True),
    Key("hostname", HOSTNAME, "Host name shown to the guest. Derived from the name by default."),
    Key("project", TEXT, "The project that owns it."),
    Key("availability_zone", TEXT, "Availability zone shown to the guest."),
    Key("instance_type", TEXT, "Instance type shown to the guest."),
    Key(
        "ports",
        Kind(_parse_ports, render=list_of(PORT.kind).render, item=PORT.kind),
        "Its places in networks.",
    ),
    Key("ssh_keys", SSH_KEYS, "Public keys, each under a name or as in a .pub file."),
    Key(
        "tags",
        Kind(_parse_tags, {"type": "object", "additionalProperties": {"type": "string"}}, dict),
    ),
    Key("user_data", USER_DATA, "At most 16 MiB."),
    Key(
        "user_data_file",
        USER_DATA_FILE,
        "A file with the user data, relative to the record file.",
        attribute="user_data",
        only_in_files=True,
    ),
    Key(
        "vendor_data",
        VENDOR_DATA,
        "Vendor data of NoCloud and OpenStack; a mapping is kept as JSON.",
    ),
    Key(
        "dialects",
        Kind(_parse_dialects, render=_render_dialects, tables=(_DIALECTS,)),
        "Which trees of documents it has.",
    ),
    Key("upstream", choice_of(Upstream), "Who has its documents; `nova` needs `project`."),
    Key("policy", POLICY.kind, "Wins over its network's."),
    Key(
        "created_at",
        MOMENT,
        "When it was made or built anew: Unix time, or text of RFC 3339 with its zone. Without it the store notes when "
        "it was first put. The boot grace counts from it.",
    ),
    check=_check_instance,
)
