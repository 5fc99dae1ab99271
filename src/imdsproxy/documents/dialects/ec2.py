"""The EC2 dialect: `/`, `/VERSION/meta-data/…`, `/VERSION/user-data`, `/VERSION/dynamic/…`.

Categories, and the version that introduced each, come from AWS's "Instance metadata categories" page. A dated version
has the categories of that time. Data that imdsproxy does not truly know is neither listed nor served: public addresses,
further block devices, IAM, services, and the identity document. imdsproxy cannot sign that document, and agents with it
would report that they run at Amazon. `dynamic/instance-identity` exists and is empty, because cloud-init on a guest
with Amazon's DMI asks for it and spends minutes if it is missing.

If a name in a record is changed or missing in these documents, the operator gets a warning.
"""

import re
import uuid
from collections.abc import Iterable
from typing import Final

from imdsproxy.documents.compiled import DocumentPort, DocumentRecord
from imdsproxy.documents.dialects import tree
from imdsproxy.documents.dialects.tree import Node, directory, listing
from imdsproxy.errors import Problem, quoted
from imdsproxy.model.entities import Dialect, Instance, Upstream, region_of

VERSIONS: Final = (
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
    "latest",
)
"""Versions as real EC2 lists them, oldest first. `latest` is also the greatest as a text."""

_NO_IMAGE: Final = "ami-00000000"
"""Placeholder: records have no images, and every EC2 client expects an `ami-id`."""


_BLOCK_DEVICES: Final = directory({"ami": "vda", "root": "/dev/vda"})
"""Names of virtio disks; Nova asks the hypervisor (`nova/block_device.py`, `instance_block_mapping`)."""

TAG_KEY: Final = re.compile(r"(?!(?:\.{1,2}|_index)\Z)[A-Za-z0-9+\-=.,_:@]{1,128}")
"""EC2 permits up to 128 letters, digits and `+-=.,_:@` in a key, but not `.`, `..` or `_index`."""


def is_listed_tag(name: str) -> bool:
    """Return whether a permitted tag is listed: a tag with `=` in its key is readable and not listed.

    In any listing, crawlers take `a=b` for an entry of `public-keys`: os-collect-config asks for `a/`, cloud-init (if
    `a` is a number) for `a/openssh-key`. On the 404 both drop everything that they have read.
    """
    return "=" not in name


def _first(values: Iterable[str | None]) -> str | None:
    return next(filter(None, values), None)


def _first_address(record: DocumentRecord, *, ipv6: bool) -> str | None:
    addresses = (one for port in record["ports"] for one in port["addresses"])
    return _first(one["ip"] for one in addresses if tree.is_ipv6(one) is ipv6)


def _public_keys(record: DocumentRecord, _version: str) -> Node | None:
    keys = tree.named_keys(record)
    children = {
        str(index): directory({"openssh-key": key}) for index, key in enumerate(keys.values())
    }
    lines = listing(f"{index}={name}" for index, name in enumerate(keys))
    return Node(lines, children=children) if keys else None


def _placement(record: DocumentRecord, version: str) -> Node | None:
    zone = record["availability_zone"]
    region = record["region"] or region_of(zone) if version >= _REGION_SINCE else None
    return directory({"availability-zone": zone, "region": region}) if zone or region else None


def _tags(record: DocumentRecord, _version: str) -> Node | None:
    leaves = {
        name: Node(tree.encode_text(value))
        for name, value in record["tags"]
        if TAG_KEY.fullmatch(name)
    }
    listed = sorted(filter(is_listed_tag, leaves))
    return directory({"instance": Node(listing(listed), children=leaves)}) if listed else None


def _network(record: DocumentRecord, _version: str) -> Node | None:
    macs = {mac: _interface(record, port, n) for n, port, mac in tree.ports_with_mac(record)}
    return directory({"interfaces": directory({"macs": directory(macs)})}) if macs else None


def _interface(record: DocumentRecord, port: DocumentPort, number: int) -> Node:
    v4 = [one for one in port["addresses"] if not tree.is_ipv6(one)]
    v6 = [one for one in port["addresses"] if tree.is_ipv6(one)]
    leaves: dict[str, tree.Content] = {
        "device-number": str(number),
        "ipv6s": "\n".join(one["ip"] for one in v6),
        "local-hostname": record["hostname"],
        "local-ipv4s": "\n".join(one["ip"] for one in v4),
        "mac": port["mac"],
        "owner-id": record["project"],
        "subnet-ipv4-cidr-block": _first(one["cidr"] for one in v4),
        "subnet-ipv6-cidr-blocks": "\n".join(
            dict.fromkeys(one["cidr"] for one in v6 if one["cidr"])
        ),
    }
    return directory(leaves)


_REGION_SINCE: Final = "2020-10-27"

_CATEGORIES: Final[tree.Rows] = (
    ("1.0", "ami-id", lambda *_: _NO_IMAGE),
    ("1.0", "ami-launch-index", lambda *_: "0"),
    ("1.0", "ami-manifest-path", lambda *_: "(unknown)"),
    ("1.0", "hostname", lambda record, _: record["hostname"]),
    ("1.0", "instance-id", lambda record, _: record["ec2_id"]),
    ("1.0", "local-ipv4", lambda record, _: _first_address(record, ipv6=False)),
    ("1.0", "public-keys", _public_keys),
    ("1.0", "reservation-id", lambda record, _: f"r-{uuid.UUID(record['uuid']).hex[:17]}"),
    ("1.0", "security-groups", lambda *_: "default"),
    ("2007-01-19", "local-hostname", lambda record, _: record["hostname"]),
    ("2007-08-29", "instance-type", lambda record, _: record["instance_type"]),
    ("2007-12-15", "block-device-mapping", lambda *_: _BLOCK_DEVICES),
    ("2008-02-01", "placement", _placement),
    ("2008-09-01", "instance-action", lambda *_: "none"),
    ("2011-01-01", "mac", lambda record, _: _first(port["mac"] for port in record["ports"])),
    ("2011-01-01", "network", _network),
    ("2021-01-03", "ipv6", lambda record, _: _first_address(record, ipv6=True)),
    ("2021-03-23", "tags", _tags),
)

CATEGORIES: Final = tuple(name for _, name, _ in _CATEGORIES)
"""All possible categories of `meta-data`."""


def _meta_data(record: DocumentRecord, version: str) -> Node:
    return directory(tree.make_documents(_CATEGORIES, record, version))


FILES: Final[tree.Rows] = (
    ("2009-04-04", "dynamic", lambda *_: directory({"instance-identity": directory({})})),
    ("1.0", "meta-data", _meta_data),
    ("1.0", "user-data", tree.user_data),
)
"""Everything below `/VERSION`."""

_SINCE: Final = {since for since, _, _ in (*_CATEGORIES, *FILES)} | {_REGION_SINCE}
GENERATIONS: Final = {version: max(one for one in _SINCE if one <= version) for version in VERSIONS}
"""Oldest version with the same documents, by version."""

_SHOWN: Final = 20
_KEY_HINT: Final = "names in documents have no blanks, = or /, and each is there once"
_UNLISTED_HINT: Final = "clients take a name with = for an ssh key"
_TAG_HINT: Final = (
    "keys there have up to 128 letters, digits and +-=.,_:@, and are not `.`, `..` or `_index`"
)


def warn_of_names(instance: Instance) -> tuple[Problem, ...]:
    """Return a warning for each ssh key that guests see under another name, and each tag that EC2's documents lack."""
    if instance.upstream is Upstream.NOVA:
        return ()
    keys = tuple([key.name for key in instance.ssh_keys])
    found = [
        (f"ssh_keys[{quoted(name)}]", f"guests see this key as {quoted(seen)}", _KEY_HINT)
        for name, seen in zip(keys, tree.unique_names(keys), strict=True)
        if name != seen
    ]
    for name, _ in instance.tags if Dialect.EC2 in instance.dialects else ():
        kept = TAG_KEY.fullmatch(name) is not None
        if not kept or not is_listed_tag(name):
            what, hint = ("list", _UNLISTED_HINT) if kept else ("have", _TAG_HINT)
            reason = f"EC2's tags/instance does not {what} this tag"
            found.append((f"tags[{quoted(name)}]", reason, hint))
    where = f"instances.{instance.id}"
    return tuple(Problem(f"{where}.{field}", reason, hint) for field, reason, hint in found)


def list_warnings(warnings: Iterable[Problem]) -> tuple[str, ...]:
    """Return one line per warning, at most twenty, and a line with the number of the others."""
    found = list(warnings)
    more = len(found) - _SHOWN
    lines = [str(one) for one in found[:_SHOWN]]
    return (*lines, f"and {more} more") if more > 0 else tuple(lines)
