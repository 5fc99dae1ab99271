"""The EC2 dialect: `/`, `/VERSION/meta-data/…`, `/VERSION/user-data`, `/VERSION/dynamic/…`.

Categories and the version that brought each are those of AWS's "Instance metadata categories" page; a dated
version has what it had there. What this service cannot say truthfully is neither listed nor served: public
addresses, further block devices, IAM, services, and the identity document, which cannot be signed here and would make
agents report that they run at Amazon. `dynamic/instance-identity` is there, empty, because cloud-init on a guest
with Amazon's DMI asks for it and spends minutes on its absence.

Names in a record that these documents change or lack give warnings.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Final

from imdsproxy.core.compiled import DocumentPort, DocumentRecord
from imdsproxy.core.documents.network import is_ipv6, ports_with_mac
from imdsproxy.core.documents.tree import BINARY, Node, directory, encode_text, listing
from imdsproxy.core.model import Dialect, Instance, Upstream
from imdsproxy.errors import Problem, quoted

LATEST: Final = "latest"

EC2_VERSIONS: Final = (
    "1.0",
    "2007-01-19",
    "2007-03-01",
    "2007-08-29",
    "2007-10-10",
    "2007-12-15",
    "2008-02-01",
    "2008-09-01",
    "2009-04-04",
    "2011-01-01",
    "2011-05-01",
    "2012-01-12",
    "2014-02-25",
    "2014-11-05",
    "2015-10-20",
    "2016-04-19",
    "2016-06-30",
    "2016-09-02",
    "2018-03-28",
    "2018-08-17",
    "2018-09-24",
    "2019-10-01",
    "2020-10-27",
    "2021-01-03",
    "2021-03-23",
    "2021-07-15",
    "2022-07-09",
    "2022-09-24",
)
"""As real EC2 lists them, oldest first; `latest` comes after."""

_NO_IMAGE: Final = "ami-00000000"
"""No record knows of images, and every EC2 client expects an `ami-id`."""

_LETTERED_ZONE: Final = re.compile(r"(.*\d)-?[a-z]")
"""A region and a letter, as `eu-west-1a` (EC2) and `europe-west4-a` (GCE)."""

_ROOT_DEVICE: Final = b"vda"
"""Where virtio disks are; Nova has its name from the hypervisor (`nova/block_device.py`, `instance_block_mapping`)."""

_TAG_KEY: Final = re.compile(r"(?!(?:\.{1,2}|_index)\Z)[A-Za-z0-9+\-=.,_:@]+")
"""EC2 permits letters, digits and `+-=.,_:@` in a key, and not `.`, `..` or `_index`."""

_UNLISTABLE: Final = re.compile(r"[=/\s\x00-\x1f\x7f]+")


def ec2_generation(version: str) -> str | None:
    """The oldest version with the same documents; `None` for a version that there is not."""
    return _GENERATIONS.get(EC2_VERSIONS[-1] if version == LATEST else version)


def ec2_directory(record: DocumentRecord, version: str) -> Node:
    """Everything below `/VERSION` (one of `EC2_VERSIONS`)."""
    meta_data = {
        name: node
        for since, name, make in _CATEGORIES
        if since <= version and (node := make(record)) is not None
    }
    children = {"meta-data": directory(meta_data)}
    if record["user_data"] is not None:
        children["user-data"] = Node(record["user_data"], BINARY)
    if version >= _DYNAMIC_SINCE:
        children["dynamic"] = directory({"instance-identity": directory({})})
    # Without slashes, as EC2 lists these.
    return Node(listing(sorted(children)), children=children)


def is_listed_tag(name: str) -> bool:
    """A permitted tag with `=` in its key can be read and is not listed.

    In any listing crawlers take `a=b` for an entry of `public-keys`: os-collect-config asks for `a/`, cloud-init
    (where `a` is a number) for `a/openssh-key`, and on the 404 both drop everything that they have read.
    """
    return "=" not in name


def unique_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names of ssh keys fit for a listing, each once and in the order given.

    Afterburn and cloudbase-init split `0=name` at every `=`, and a slash at the end makes a directory of it;
    of two keys with one name cloud-init keeps the last.
    """
    taken: set[str] = set()
    result: list[str] = []
    for index, name in enumerate(names):
        clean = _UNLISTABLE.sub("-", name).strip("-") or f"key-{index}"
        candidate, number = clean, 1
        while candidate in taken:
            number += 1
            candidate = f"{clean}-{number}"
        taken.add(candidate)
        result.append(candidate)
    return tuple(result)


def named_keys(record: DocumentRecord) -> dict[str, str]:
    """The record's ssh keys, by the names that documents have for them."""
    names = unique_names(name for name, _ in record["ssh_keys"])
    return dict(zip(names, (key.strip() for _, key in record["ssh_keys"]), strict=True))


def _text(value: str | None) -> Node | None:
    return Node(encode_text(value)) if value else None


def _first(values: Iterable[str | None]) -> Node | None:
    return _text(next(filter(None, values), None))


def _lines(values: Iterable[str]) -> Node | None:
    return _text("\n".join(values))


def _some(children: Mapping[str, Node | None]) -> Node | None:
    present = {name: node for name, node in children.items() if node is not None}
    return directory(present) if present else None


def _first_address(record: DocumentRecord, *, ipv6: bool) -> Node | None:
    addresses = (one for port in record["ports"] for one in port["addresses"])
    return _first(one["ip"] for one in addresses if is_ipv6(one) is ipv6)


def _public_keys(record: DocumentRecord) -> Node | None:
    keys = named_keys(record)
    children = {
        str(index): directory({"openssh-key": Node(encode_text(key))})
        for index, key in enumerate(keys.values())
    }
    lines = listing(f"{index}={name}" for index, name in enumerate(keys))
    return Node(lines, children=children) if keys else None


def _placement(record: DocumentRecord, *, with_region: bool = False) -> Node | None:
    zone = record["availability_zone"]
    region = record["region"] or _region_of(zone) if with_region else None
    return _some({"availability-zone": _text(zone), "region": _text(region)})


def _region_of(zone: str | None) -> str | None:
    """A zone that is not named after its region counts as a region of its own."""
    match = None if zone is None else _LETTERED_ZONE.fullmatch(zone)
    return zone if match is None else match[1]


def _tags(record: DocumentRecord) -> Node | None:
    leaves = {
        name: Node(encode_text(value)) for name, value in record["tags"] if _TAG_KEY.fullmatch(name)
    }
    listed = sorted(filter(is_listed_tag, leaves))
    return directory({"instance": Node(listing(listed), children=leaves)}) if listed else None


def _network(record: DocumentRecord) -> Node | None:
    macs = {mac: _interface(record, port, n) for n, port, mac in ports_with_mac(record)}
    return directory({"interfaces": directory({"macs": directory(macs)})}) if macs else None


def _interface(record: DocumentRecord, port: DocumentPort, number: int) -> Node:
    v4 = [one for one in port["addresses"] if not is_ipv6(one)]
    v6 = [one for one in port["addresses"] if is_ipv6(one)]
    leaves = {
        "device-number": _text(str(number)),
        "ipv6s": _lines(one["ip"] for one in v6),
        "local-hostname": _text(record["hostname"]),
        "local-ipv4s": _lines(one["ip"] for one in v4),
        "mac": _text(port["mac"]),
        "owner-id": _text(record["project"]),
        "subnet-ipv4-cidr-block": _first(one["cidr"] for one in v4),
        "subnet-ipv6-cidr-blocks": _lines(dict.fromkeys(one["cidr"] for one in v6 if one["cidr"])),
    }
    return _some(leaves) or directory({})


_DYNAMIC_SINCE: Final = "2009-04-04"

_BLOCK_DEVICES: Final = directory(
    {"ami": Node(_ROOT_DEVICE), "root": Node(b"/dev/" + _ROOT_DEVICE)}
)

_CATEGORIES: Final[tuple[tuple[str, str, Callable[[DocumentRecord], Node | None]], ...]] = (
    ("1.0", "ami-id", lambda _: _text(_NO_IMAGE)),
    ("1.0", "ami-launch-index", lambda _: _text("0")),
    ("1.0", "ami-manifest-path", lambda _: _text("(unknown)")),
    ("1.0", "hostname", lambda record: _text(record["hostname"])),
    ("1.0", "instance-id", lambda record: _text(record["ec2_id"])),
    ("1.0", "local-ipv4", lambda record: _first_address(record, ipv6=False)),
    ("1.0", "public-keys", _public_keys),
    ("1.0", "reservation-id", lambda record: _text(f"r-{uuid.UUID(record['uuid']).hex[:17]}")),
    ("1.0", "security-groups", lambda _: _text("default")),
    ("2007-01-19", "local-hostname", lambda record: _text(record["hostname"])),
    ("2007-08-29", "instance-type", lambda record: _text(record["instance_type"])),
    ("2007-12-15", "block-device-mapping", lambda _: _BLOCK_DEVICES),
    ("2008-02-01", "placement", _placement),
    ("2008-09-01", "instance-action", lambda _: _text("none")),
    ("2011-01-01", "mac", lambda record: _first(port["mac"] for port in record["ports"])),
    ("2011-01-01", "network", _network),
    ("2020-10-27", "placement", lambda record: _placement(record, with_region=True)),
    ("2021-01-03", "ipv6", lambda record: _first_address(record, ipv6=True)),
    ("2021-03-23", "tags", _tags),
)

EC2_CATEGORIES: Final = tuple(dict.fromkeys(name for _, name, _ in _CATEGORIES))
"""All that `meta-data` can have."""


_SINCE: Final = {since for since, _, _ in _CATEGORIES} | {_DYNAMIC_SINCE}
_GENERATIONS: Final = {
    version: max(one for one in _SINCE if one <= version) for version in EC2_VERSIONS
}

_SHOWN: Final = 20
_TAG_HINT: Final = (
    "keys there have letters, digits and +-=.,_:@ only, and are not `.`, `..` or `_index`"
)


def warn_of_names(instance: Instance) -> tuple[Problem, ...]:
    """A warning for each ssh key that guests see under another name, and each tag that EC2's documents lack."""
    if instance.upstream is Upstream.NOVA:
        return ()
    tags = instance.tags if Dialect.EC2 in instance.dialects else ()
    found = _find_changed(
        tuple(key.name for key in instance.ssh_keys), tuple(name for name, _ in tags)
    )
    return tuple(
        Problem(f"instances.{instance.id}.{field}", why, hint) for field, why, hint in found
    )


@lru_cache(1024)
def _find_changed(keys: tuple[str, ...], tags: tuple[str, ...]) -> tuple[tuple[str, str, str], ...]:
    """Which of these names guests do not see as they are, why, and a hint: many instances have the same ones."""
    found = [
        (
            f"ssh_keys[{quoted(name)}]",
            f"guests see this key as {quoted(seen)}",
            "names in documents have no blanks, = or /, and each is there once",
        )
        for name, seen in zip(keys, unique_names(keys), strict=True)
        if name != seen
    ]
    for name in tags:
        field = f"tags[{quoted(name)}]"
        if not _TAG_KEY.fullmatch(name):
            found.append((field, "EC2's tags/instance does not have this tag", _TAG_HINT))
        elif not is_listed_tag(name):
            reason = "EC2's tags/instance does not list this tag"
            found.append((field, reason, "clients take a name with = for an ssh key"))
    return tuple(found)


def list_warnings(warnings: Iterable[Problem]) -> tuple[str, ...]:
    """A line for each, up to twenty; the others are counted."""
    found = list(warnings)
    more = len(found) - _SHOWN
    lines = [str(one) for one in found[:_SHOWN]]
    return (*lines, f"and {more} more") if more > 0 else tuple(lines)
