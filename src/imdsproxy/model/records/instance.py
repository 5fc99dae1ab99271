"""Schema of an instance's record."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from imdsproxy.errors import quoted
from imdsproxy.model.entities import Dialect, Instance, Port, SshKey, Upstream, free_name
from imdsproxy.model.records import values
from imdsproxy.model.records.network import POLICY
from imdsproxy.model.records.schema import (
    CONTROL,
    MAX_TEXT,
    Fault,
    Field,
    Json,
    Key,
    Kind,
    Table,
    list_of,
    refuse_repeated,
)

_SSH_KEY_PATTERN: Final = (
    r"^(?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[A-Za-z0-9@._-]+ [A-Za-z0-9+/]+={0,3}(?: (.+))?$"
)
_SSH_KEY_LINE: Final = re.compile(_SSH_KEY_PATTERN)
_SSH_KEY_WANTED: Final = "one line as in a .pub file: ssh-ed25519 AAAA… COMMENT"
_LONGEST_SSH_KEY: Final = 16384
# public-keys/ lists INDEX=NAME, which clients split at "=", and a name is a step of a path.
_SSH_KEY_NAME: Final = re.compile(rf"[^{CONTROL}\ud800-\udfff=/]{{1,{MAX_TEXT}}}")
_NOT_IN_DERIVED: Final = re.compile(r"[^A-Za-z0-9@._+-]+")
_LONGEST_TAG_VALUE: Final = 4096
_NOT_IN_TAG_VALUE: Final = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
_TAG_VALUE: Final = re.compile(rf"[^{_NOT_IN_TAG_VALUE}\ud800-\udfff]{{0,{_LONGEST_TAG_VALUE}}}")

PORT: Final = Table(
    "PortRecord",
    Port,
    "Connection of an instance to a network.",
    Key("network", values.NETWORK_ID, "The network's id.", required=True),
    Key(
        "mac",
        values.MAC,
        "The MAC. Without `addresses` the MAC alone identifies the guest, at any address.",
    ),
    Key(
        "addresses",
        list_of(values.GUEST_ADDRESS),
        "IPv4 and IPv6 addresses. Beside a MAC, both must match.",
    ),
    Key("project", values.PROJECT_ID, "The port's project, if it differs from the instance's."),
)


def _refuse_repeated(ports: Sequence[tuple[Field, Port]]) -> None:
    every = [(one.network, each) for _, one in ports for each in (one.mac, *one.addresses) if each]
    seen: set[tuple[object, object]] = set()
    for field, port in ports if len(set(every)) < len(every) else ():
        addresses = ((("addresses", index), one) for index, one in enumerate(port.addresses))
        for place, value in ((("mac",), port.mac), *addresses):
            if value is not None and (port.network, value) in seen:
                reason = f"{value} appears twice in network {port.network}"
                field.findings.add(Fault((*field.path, *place), reason))
            seen.add((port.network, value))


def _parse_key(field: Field) -> str:
    field.text(longest=_LONGEST_SSH_KEY)
    return field.matched(_SSH_KEY_LINE, _SSH_KEY_WANTED)


_SSH_KEY_TEXT: Final = Kind(
    _parse_key, {"type": "string", "maxLength": _LONGEST_SSH_KEY, "pattern": _SSH_KEY_PATTERN}
)


def _parse_key_name(field: Field) -> str:
    return field.matched(_SSH_KEY_NAME, "1 to 255 printable characters without = and /")


_SSH_KEY: Final = Table(
    "SshKeyRecord",
    SshKey,
    "A public key under a name.",
    Key(
        "name",
        Kind(
            _parse_key_name,
            {**values.one_line(MAX_TEXT), "pattern": f"^[^{CONTROL}=/]*$"},
        ),
        "Name under which guests see the key.",
        required=True,
    ),
    Key("key", _SSH_KEY_TEXT, "One line as in a .pub file.", required=True),
)


def _parse_bare_key(field: Field) -> SshKey:
    return SshKey("", _parse_key(field))


def _parse_ssh_keys(field: Field) -> tuple[SshKey, ...]:
    """Return the keys in their order, each with a unique name.

    A key given as a bare line is named by its comment (`key-N` without one; if the name is taken, `-2`, `-3` … is
    added).
    """
    found: list[tuple[int, SshKey]] = []
    named: set[str] = set()
    for index, item in enumerate(field.items()):
        bare = isinstance(item.value, str)
        key = item.read(_parse_bare_key if bare else _SSH_KEY.parse)
        if key is None:
            continue
        if key.name in named:
            item.child("name", key.name).refuse(f"the name {quoted(key.name)} appears twice")
        if key.name:
            named.add(key.name)
        found.append((index, key))
    return tuple(
        key if key.name else SshKey(_derived(key.key, index, named), key.key)
        for index, key in found
    )


def _derived(key: str, index: int, taken: set[str]) -> str:
    match = _SSH_KEY_LINE.fullmatch(key)
    comment = "" if match is None else match[1] or ""
    stem = _NOT_IN_DERIVED.sub("-", comment).strip("-")[:200] or f"key-{index + 1}"
    name = free_name(stem, taken)
    taken.add(name)
    return name


SSH_KEYS: Final = Kind(
    _parse_ssh_keys,
    render=lambda keys: [_SSH_KEY.render(key) for key in keys],
    item=Kind(_parse_key, _SSH_KEY_TEXT.schema, tables=(_SSH_KEY,)),
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


def _make_dialects(
    *, ec2: bool = True, openstack: bool = True, nocloud: bool = True
) -> frozenset[Dialect]:
    on = {Dialect.EC2: ec2, Dialect.OPENSTACK: openstack, Dialect.NOCLOUD: nocloud}
    return frozenset(one for one in Dialect if on[one])


_DIALECTS: Final = Table(
    "DialectsRecord",
    _make_dialects,
    "Trees of documents that the instance has; all are on unless false.",
    Key("ec2", values.SWITCH, "Serve the EC2 documents."),
    Key("openstack", values.SWITCH, "Serve the OpenStack documents."),
    Key("nocloud", values.SWITCH, "Serve the NoCloud documents."),
)


def _render_dialects(dialects: frozenset[Dialect]) -> dict[str, Json]:
    return {dialect.value: False for dialect in Dialect if dialect not in dialects}


_OF_NOVA: Final = ("id", "name", "hostname", "project", "ports", "upstream", "policy", "created_at")
"""Keys of a record with `upstream: nova`; Nova has all other data of its instances."""


def _check_instance(entries: Mapping[str, Field], record: dict[str, Any]) -> None:
    if record.keys() >= {"id", "name"}:
        record.setdefault("hostname", values.hostname_of(record["name"], record["id"]))
    named = entries.get("user_data_file")
    if named is not None and "user_data" in entries:
        named.refuse("cannot be combined with user_data", "keep one of the two")
    if record.get("upstream") is not Upstream.NOVA:
        return
    if "project" in record:
        record["project"] = entries["project"].read(values.PROJECT_ID.parse)
    elif "project" not in entries:
        entries["upstream"].refuse("needs project", "Nova needs the instance's project")
    for key in entries.keys() - set(_OF_NOVA):
        entries[key].refuse("is not allowed with upstream: nova", "Nova has this value")


INSTANCE: Final = Table(
    "InstanceRecord",
    Instance,
    "An instance.",
    Key(
        "id",
        values.INSTANCE_ID,
        "Id of the instance: 1 to 64 of `A-Z a-z 0-9 . _ -`, a letter or digit first. Documents show a UUID unchanged, "
        "and a UUID derived from any other id.",
        required=True,
    ),
    Key("name", values.TEXT, "A name for people; also in `meta_data.json`.", required=True),
    Key(
        "hostname",
        values.HOSTNAME,
        "Host name shown to the guest. Derived from the name by default.",
    ),
    Key(
        "project",
        values.TEXT,
        "Project that owns the instance. Documents show the project, and its policy applies.",
    ),
    Key("availability_zone", values.TEXT, "Availability zone shown to the guest."),
    Key("instance_type", values.TEXT, "Instance type shown to the guest."),
    Key("ports", list_of(PORT.kind, _refuse_repeated), "Connections of the instance to networks."),
    Key(
        "ssh_keys",
        SSH_KEYS,
        "Public keys, each with a name or as a line of a .pub file, which is named by its comment.",
    ),
    Key(
        "tags",
        Kind(
            _parse_tags,
            values.entries(
                f"^[^{CONTROL}]{{1,{MAX_TEXT}}}$",
                # Not a list of two types: Debian's FastAPI does not take that.
                {
                    "anyOf": [
                        {
                            "type": "string",
                            "maxLength": _LONGEST_TAG_VALUE,
                            "pattern": f"^[^{_NOT_IN_TAG_VALUE}]*$",
                        },
                        {"type": "null"},
                    ]
                },
            ),
            dict,
        ),
        "Names and values that the guest can read. EC2's documents have only names of letters, digits and `+-=.,_:@`, "
        "and list none with `=`.",
    ),
    Key(
        "user_data",
        values.USER_DATA,
        "Data that cloud-init runs: text, or `base64` of bytes that are not UTF-8. At most 16 MiB.",
    ),
    Key(
        "user_data_file",
        values.USER_DATA_FILE,
        "A file with the user data, relative to the record file. Instead of `user_data`.",
        attribute="user_data",
        only_in_files=True,
    ),
    Key(
        "vendor_data",
        values.VENDOR_DATA,
        "Vendor data of NoCloud and OpenStack; a mapping is kept as JSON.",
    ),
    Key(
        "dialects",
        Kind(_DIALECTS.parse, render=_render_dialects, tables=(_DIALECTS,)),
        "Trees of documents that the instance has.",
    ),
    Key(
        "upstream",
        values.choice_of(Upstream),
        "Server of the instance's documents; `nova` needs `project`. With `nova` only "
        f"{', '.join(f'`{one}`' for one in _OF_NOVA if one != 'upstream')} are allowed.",
    ),
    Key(
        "policy",
        POLICY.kind,
        "Policy of the instance. It overrides the network's; settings for the same instance override it.",
    ),
    Key(
        "created_at",
        values.MOMENT,
        "Time of the creation or rebuild: Unix time, or text of RFC 3339 with its zone. If the time is missing, the "
        "store sets the time of the first put. The boot grace begins then.",
    ),
    check=_check_instance,
)


@dataclass(frozen=True, slots=True)
class PlacedInstance(Instance):
    """Instance of a fleet, on one host, or two during a move."""

    hosts: tuple[str, ...] = ()


PLACED: Final = Table(
    "PlacedInstanceRecord",
    PlacedInstance,
    "An instance of a fleet, with its hosts.",
    *INSTANCE.keys,
    Key(
        "hosts",
        list_of(values.HOST_ID, refuse_repeated),
        "Hosts of the fleet that serve the instance; two during a move.",
    ),
    check=_check_instance,
)
