"""The documents of each dialect, and whether a guest asks for them: cloud-init's `ds-identify`."""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Final

from imdsproxy.core.doctor.crawl import (
    CLOUD_INIT_OPENSTACK,
    NOCLOUD_FILES,
    Answer,
    Crawl,
    json_of,
)
from imdsproxy.core.doctor.finding import (
    TEXTS,
    Finding,
    Severity,
    Surroundings,
    found,
    seen,
    with_status,
)
from imdsproxy.core.model import Dialect
from imdsproxy.core.snippets import looks_like_amazon

_OPENSTACK_NAMES: Final = frozenset({"OpenStack Nova", "OpenStack Compute"})
_OPENSTACK_TAGS: Final = _OPENSTACK_NAMES | {
    "OpenTelekomCloud",
    "SAP CCloud VM",
    "HUAWEICLOUD",
    "Samsung Cloud Platform",
}
_OUTSCALE: Final = ("3DS Outscale", "3DS Outscale VM")
_SHOWN: Final = ("sys_vendor", "product_name", "product_serial", "chassis_asset_tag")
_DS_KEYS: Final = ("ds", "ci.ds", "ci.datasource")
_HOST_COMMAND: Final = "imdsproxy snippet {} --for qemu|libvirt|proxmox|incus"
_NOT_FOUND: Final = 404
_REFUSED: Final = (401, 403)
_RETRIED: Final = 503
_MAC: Final = re.compile(r"\b[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}\b")
_VIRTUAL: Final = frozenset({"bond", "vlan"})
_ID: Final = re.compile(r"""^(?:instance-id|"instance-id"|'instance-id')\s*:\s*\S""", re.MULTILINE)
_GZIP: Final = b"\x1f\x8b"
_HEAD: Final = 4096
_HEADERS: Final = tuple(one.encode() for one in TEXTS["user-data-header"]["known"])
"""How user-data begins that cloud-init, Ignition or cloudbase-init act upon, in lower case."""


def asked_by(around: Surroundings) -> frozenset[Dialect]:
    """Whose documents cloud-init asks for on such a machine, without a seed and without configuration."""
    words = (word.partition("=") for word in around.kernel.split())
    named = [value.partition(";")[0] for key, equals, value in words if equals and key in _DS_KEYS]
    names = named[-1:] or around.sources
    if names is not None:
        wanted = {one.lower().removesuffix("-net") for one in names}
        return frozenset(one for one in Dialect if one.value in wanted)
    dmi: Mapping[str, str] = around.dmi or {}
    shown = {} if around.container else dmi
    vendor, product = shown.get("sys_vendor"), shown.get("product_name")
    tag, serial = shown.get("chassis_asset_tag", ""), shown.get("product_serial", "")
    signs = {
        Dialect.OPENSTACK: around.environment.get("product_name") == "OpenStack Nova"
        or product in _OPENSTACK_NAMES
        or tag in _OPENSTACK_TAGS,
        Dialect.NOCLOUD: " ds=nocloud" in f" {dmi.get('product_serial', '')}",
        Dialect.EC2: looks_like_amazon(shown.get("product_uuid", ""))
        or serial.endswith(".brightbox.com")
        or tag.endswith(".zstack.io")
        or vendor == "e24cloud"
        or (vendor, product) == _OUTSCALE,
    }
    return frozenset(dialect for dialect, sign in signs.items() if sign)


def check_gate(crawl: Crawl, around: Surroundings) -> Iterator[Finding]:
    """What is served against what the guest would ask for."""
    served = {one for one in Dialect if crawl.serves(one)}
    command = _HOST_COMMAND.format(around.instance or "INSTANCE")
    if not served:
        if any(crawl.answers()) and not crawl.given_up:
            yield found("nothing-served", why=": " + "; ".join(around.why) if around.why else "")
    elif around.dmi is None:
        if not crawl.direct:
            yield found("gate", command=command)
    elif not (asked := asked_by(around)) & served:
        if around.sources is None and not around.dmi_complete:
            yield found("gate-unseen")
            return
        shows = [f"{name} {around.dmi[name]!r}" for name in _SHOWN if around.dmi.get(name)]
        yield found(
            "gate-shut",
            wanted=f"asks for {', '.join(sorted(asked))}" if asked else "stays off",
            served=", ".join(sorted(served)),
            shows=", ".join(shows) or "nothing",
            command=command,
        )


def check_openstack(crawl: Crawl) -> Iterator[Finding]:
    """The listing, meta_data.json, the other files, the files that it names, and the password."""
    listing = crawl.answer("/openstack")
    if listing is None:
        return
    if listing.status == _RETRIED:
        yield found("openstack-not-ready", "/openstack")
    elif not listing.ok and listing.status != _NOT_FOUND and listing.status not in _REFUSED:
        yield found("openstack-probe", "/openstack", status=listing.status)
    elif listing.ok and not set(CLOUD_INIT_OPENSTACK) & set(listing.text.split()):
        yield found("openstack-versions", "/openstack", newest=CLOUD_INIT_OPENSTACK[-1])
    if crawl.version is None:
        return
    path = f"/openstack/{crawl.version}/meta_data.json"
    yield from _meta_data(crawl.answer(path), path)
    names = ("vendor_data.json", "vendor_data2.json", "network_data.json")
    others = (f"/openstack/{crawl.version}/{one}" for one in names)
    yield from seen(
        "json-unreadable", crawl.where(lambda one: one.ok and json_of(one) is None, others)
    )
    bad = crawl.where(lambda one: not one.ok)
    gone = {one: bad[one] for one in bad if one.startswith("/openstack/content/")}
    yield from seen("content-unreadable", with_status(gone))
    password = "/openstack/2013-04-04/password"  # noqa: S105 - a path
    if password in bad:
        yield found("password", password, status=bad[password].status)


def _meta_data(answer: Answer | None, path: str) -> Iterator[Finding]:
    document = json_of(answer)
    if not isinstance(document, Mapping):
        status = "no answer" if answer is None else f"status {answer.status}"
        yield found("meta-data-unreadable", path, status=status)
        return
    missing = [name for name in ("uuid", "hostname") if not isinstance(document.get(name), str)]
    if missing:
        yield found("meta-data-incomplete", path, missing=" and no ".join(missing))
    seed = document.get("random_seed")
    if seed is not None and (not isinstance(seed, str) or _decoded(seed.encode()) is None):
        yield found("random-seed", path)
    for name, kind, what in (("public_keys", Mapping, "an object"), ("keys", list, "a list")):
        value = document.get(name)
        if value is not None and not isinstance(value, kind):
            yield found("meta-data-member", path, name=name, kind=what)


def check_network_data(crawl: Crawl, around: Surroundings) -> Iterator[Finding]:
    """network_data.json against itself, and the MACs in all dialects against the NICs that are there."""
    path = f"/openstack/{crawl.version}/network_data.json"
    document = json_of(crawl.answer(path))
    links: list[Mapping[str, object]] = []
    if isinstance(document, Mapping):
        links = _objects(document.get("links"))
        yield from _links(document, links, path)
    if around.macs is not None:
        yield from _guest_macs(crawl, links, around.macs, path)
    elif links:
        yield from _host_macs(around, path)


def _objects(value: object) -> list[Mapping[str, object]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _links(
    document: Mapping[str, object], links: list[Mapping[str, object]], path: str
) -> Iterator[Finding]:
    ids = [link.get("id") for link in links]
    used = [one.get("link") for one in _objects(document.get("networks"))]
    used += [link.get("vlan_link") for link in links if link.get("type") == "vlan"]
    if lost := [link for link in used if link not in ids]:
        yield found("link-missing", path, link=lost[0])
    bare = [link.get("id") for link in links if not _is_virtual(link) and not _mac(link)]
    if bare:
        yield found("link-without-mac", path, link=bare[0])
    if len(set(ids)) < len(ids):
        yield found("link-twice", path)
    if not links and "links" in document:
        yield found("network-data-empty", path)


def _is_virtual(link: Mapping[str, object]) -> bool:
    return link.get("type") in _VIRTUAL


def _mac(link: Mapping[str, object]) -> str:
    return str(link.get("ethernet_mac_address") or "").lower()


def _guest_macs(
    crawl: Crawl, links: list[Mapping[str, object]], macs: frozenset[str], path: str
) -> Iterator[Finding]:
    has = f"(it has {', '.join(sorted(macs)) or 'none'})"
    described = [_mac(link) for link in links if not _is_virtual(link) and _mac(link)]
    if foreign := [mac for mac in described if mac not in macs]:
        what = (
            f"network_data.json describes a NIC {foreign[0]}, which the guest does not have {has}"
        )
        yield found("mac-mismatch", path, what=what)
    paths = [one for one in crawl.listed if one.endswith("/network/interfaces/macs/")]
    for other in ("/nocloud/network-config", *paths, f"{crawl.base}/meta-data/mac"):
        answer = crawl.good(other)
        named = set(_MAC.findall(answer.text.lower())) if answer else set()
        if named - macs:
            yield found(
                "mac-mismatch",
                other,
                severity=None if other.startswith("/nocloud") else Severity.WARNING,
                clients=("cloud-init", "amazon-ec2-net-utils"),
                what=f"{min(named - macs)} is the MAC of no NIC of the guest {has}",
            )


def _host_macs(around: Surroundings, path: str) -> Iterator[Finding]:
    """What the host knows of the record's NICs, where the guest's are not known."""
    answering = any(card.mac in card.seen for card in around.cards)
    for card in around.cards:
        if card.seen and card.mac not in card.seen:
            what = (
                f"network_data.json describes a NIC {card.mac} in network {card.network}, and the guest "
                f"has {', '.join(sorted(card.seen))} at its address there"
            )
            yield found("mac-mismatch", path, what=what)
        elif answering and not card.seen:
            yield found("card-unseen", path, mac=card.mac, network=card.network)


def check_nocloud(crawl: Crawl) -> Iterator[Finding]:
    """All four files are there, and meta-data has an instance id."""
    if not crawl.serves(Dialect.NOCLOUD):
        return
    gone = crawl.where(lambda one: not one.ok, (f"/nocloud/{name}" for name in NOCLOUD_FILES))
    severity = Severity.ERROR if "/nocloud/user-data" in gone else None
    yield from seen("nocloud-missing", with_status(gone), severity=severity)
    meta_data = crawl.answer("/nocloud/meta-data")
    if meta_data is not None and not _ID.search(meta_data.text):
        yield found("nocloud-instance-id", "/nocloud/meta-data")


def check_user_data(crawl: Crawl) -> Iterator[Finding]:
    """Whether a client knows what to do with the first user-data of any dialect."""
    for path in (
        f"/openstack/{crawl.version}/user_data",
        f"{crawl.base}/user-data",
        "/nocloud/user-data",
    ):
        answer = crawl.good(path)
        if answer and answer.body:
            yield from _content(answer.body, path)
            return
        # NoCloud's has to be there, even if it is empty.
        if answer and not path.startswith("/nocloud/"):
            yield found("user-data-empty", path)


def _content(body: bytes, path: str) -> Iterator[Finding]:
    plain = _unpacked(body)
    if not is_known(plain):
        inner = _decoded(plain)
        what = f"user-data begins with nothing that clients know: {_shown(plain)}"
        change = (
            "begin it with #cloud-config, #! and an interpreter, or another header of cloud-init's"
        )
        if inner is not None and is_known(_unpacked(inner)):
            what = "user-data is base64 of something that would be understood"
            change = "store what is inside: it is sent as it is stored"
        yield found("user-data-header", path, what=what, change=change)
    elif plain[:2] == b"#!" and b"\r\n" in plain[:_HEAD]:
        yield found("user-data-crlf", path)


def is_known(data: bytes) -> bool:
    """Whether a client acts upon user-data that begins so."""
    head = data[:_HEAD].lstrip().lower()
    return head.startswith(_HEADERS) or b"mime-version:" in head


def _unpacked(data: bytes) -> bytes:
    if not data.startswith(_GZIP):
        return data
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data, _HEAD)
    except zlib.error:
        return data


def _decoded(data: bytes) -> bytes | None:
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _shown(data: bytes) -> str:
    first = data[:40].split(b"\n")[0]
    return repr(first.decode("utf-8", "replace"))
