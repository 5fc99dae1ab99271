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
    "An instance's place in a network.",
    Key("network", values.NETWORK_ID, "The network's id.", required=True),
    Key(
        "mac",
        values.MAC,
        "The MAC. Without `addresses` the guest is known by it alone, at whatever address it has.",
    ),
    Key(
        "addresses",
        list_of(values.GUEST_ADDRESS),
        "IPv4 and IPv6 addresses. Beside a MAC, both must match.",
    ),
    Key(
        "project", values.PROJECT_ID, "The port's own, where it is another one than the instance's."
    ),
)


def _refuse_repeated(ports: Sequence[tuple[Field, Port]]) -> None:
    every = [(one.network, each) for _, one in ports for each in (one.mac, *one.addresses) if each]
    seen: set[tuple[object, object]] = set()
    for field, port in ports if len(set(every)) < len(every) else ():
        addresses = ((("addresses", index), one) for index, one in enumerate(port.addresses))
        for place, value in ((("mac",), port.mac), *addresses):
            if value is not None and (port.network, value) in seen:
                reason = f"{value} is there twice in network {port.network}"
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
        "What guests see it listed as.",
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
            item.child("name", key.name).refuse(f"the name {quoted(key.name)} is there twice")
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
    "Which trees of documents the instance has; all are on unless false.",
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
        named.refuse("stands beside user_data", "one of the two")
    if record.get("upstream") is not Upstream.NOVA:
        return
    if "project" in record:
        record["project"] = entries["project"].read(values.PROJECT_ID.parse)
    elif "project" not in entries:
        entries["upstream"].refuse("needs project", "Nova has to know whose instance it is")
    for key in entries.keys() - set(_OF_NOVA):
        entries[key].refuse("does not go with upstream: nova", "Nova has it")


INSTANCE: Final = Table(
    "InstanceRecord",
    Instance,
    "An instance.",
    Key(
        "id",
        values.INSTANCE_ID,
        "What it is known by: 1 to 64 of `A-Z a-z 0-9 . _ -`, a letter or digit first. A UUID is used as such in "
        "documents; of any other id one is made.",
        required=True,
    ),
    Key("name", values.TEXT, "A name for people. `meta_data.json` has it too.", required=True),
    Key(
        "hostname",
        values.HOSTNAME,
        "Host name shown to the guest. Derived from the name by default.",
    ),
    Key(
        "project",
        values.TEXT,
        "The project that owns it. Documents show it, and the policy of that project is for it.",
    ),
    Key("availability_zone", values.TEXT, "Availability zone shown to the guest."),
    Key("instance_type", values.TEXT, "Instance type shown to the guest."),
    Key("ports", list_of(PORT.kind, _refuse_repeated), "Its places in networks."),
    Key(
        "ssh_keys",
        SSH_KEYS,
        "Public keys, each under a name or as in a .pub file. One as in a file is named by its comment.",
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
        "What cloud-init runs: text, or `base64` of bytes that are no UTF-8. At most 16 MiB.",
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
        "Which trees of documents it has.",
    ),
    Key(
        "upstream",
        values.choice_of(Upstream),
        "Who has its documents; `nova` needs `project`. Beside `nova` only "
        f"{', '.join(f'`{one}`' for one in _OF_NOVA if one != 'upstream')} may stand.",
    ),
    Key(
        "policy",
        POLICY.kind,
        "Wins over its network's. Settings for the same instance win over it.",
    ),
    Key(
        "created_at",
        values.MOMENT,
        "When it was made or built anew: Unix time, or text of RFC 3339 with its zone. Without it the store notes when "
        "it was first put. The boot grace counts from it.",
    ),
    check=_check_instance,
)


@dataclass(frozen=True, slots=True)
class PlacedInstance(Instance):
    """Instance of a fleet.

    Attributes:
        hosts: Hosts that serve the instance; two during a move.
    """

    hosts: tuple[str, ...] = ()


def _refuse_repeated_hosts(hosts: Sequence[tuple[Field, str]]) -> None:
    seen: set[str] = set()
    for field, host in hosts:
        if host in seen:
            field.refuse(f"{host} is there twice")
        seen.add(host)


PLACED: Final = Table(
    "PlacedInstanceRecord",
    PlacedInstance,
    "An instance of a fleet, and where it is.",
    *INSTANCE.keys,
    Key(
        "hosts",
        list_of(values.HOST_ID, _refuse_repeated_hosts),
        "The fleet's hosts that serve it; two while it moves.",
    ),
    check=_check_instance,
)
