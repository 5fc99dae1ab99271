"""Checks of each dialect's documents, and of cloud-init's `ds-identify`, by which a guest asks for them or not."""

import base64
import binascii
import re
import zlib
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final, TypeAlias

from imdsproxy.model.entities import Dialect
from imdsproxy.tools.doctor import (
    CLOUD_INIT_OPENSTACK,
    NOCLOUD_FILES,
    REFUSED,
    TEXTS,
    Crawl,
    Finding,
    Severity,
    Surroundings,
    checks_http,
    found,
    seen,
)
from imdsproxy.tools.snippets import looks_like_amazon

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
_MAC: Final = re.compile(r"\b[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}\b")
_VIRTUAL: Final = ("bond", "vlan")
_ID: Final = re.compile(r"""^(?:instance-id|"instance-id"|'instance-id')\s*:\s*\S""", re.MULTILINE)
_GZIP: Final = b"\x1f\x8b"
_HEAD: Final = 4096
_HEADERS: Final = tuple(one.encode() for one in TEXTS["user-data-header"]["known"])
"""First bytes of user-data that cloud-init, Ignition or cloudbase-init process, in lower case."""

_Object: TypeAlias = Mapping[str, Any]
_Objects: TypeAlias = list[_Object]


def examine(crawl: Crawl, around: Surroundings) -> tuple[Finding, ...]:
    if {answer.status for answer in crawl.asked.values()} - {0} == {HTTPStatus.FORBIDDEN}:
        why = "; ".join(around.why)
        if around.verdict == "mismatch":
            why = why or "the guest has another MAC than the record of its address"
            return (found("mac-mismatch", case="refused", why=why),)
        return (found("refused", why=f": {why}" if why else ""),)
    findings = [
        *checks_http.check_transport(crawl),
        *check_smbios(crawl, around),
        *check_openstack(crawl),
        *check_network_data(crawl, around),
        *checks_http.check_listings(crawl),
        *checks_http.check_tokens(crawl),
        *check_nocloud(crawl),
        *check_user_data(crawl),
    ]
    return tuple(sorted(findings, key=lambda one: list(Severity).index(one.severity)))


def asked_by(around: Surroundings) -> frozenset[Dialect]:
    """Return the dialects for which cloud-init asks on such a machine, without a seed and without configuration."""
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


def check_smbios(crawl: Crawl, around: Surroundings) -> Iterator[Finding]:
    """Compare the served dialects with those for which the guest would ask."""
    command = _HOST_COMMAND.format(around.instance or "INSTANCE")
    if not crawl.served:
        if not crawl.given_up and any(answer.status for answer in crawl.asked.values()):
            yield found("nothing-served", why=": " + "; ".join(around.why) if around.why else "")
    elif around.dmi is None:
        if not crawl.direct:
            yield found("smbios-unknown", command=command)
    elif not (asked := asked_by(around)).intersection(crawl.served):
        if around.sources is None and not around.dmi_complete:
            yield found("smbios-unreadable")
            return
        shows = [f"{name} {around.dmi[name]!r}" for name in _SHOWN if around.dmi.get(name)]
        yield found(
            "smbios-mismatch",
            wanted=f"requests {', '.join(sorted(asked))}" if asked else "stays off",
            served=", ".join(sorted(crawl.served)),
            shows=", ".join(shows) or "nothing",
            command=command,
        )


def check_openstack(crawl: Crawl) -> Iterator[Finding]:
    """Check the listing, meta_data.json, the other files, the files named in it, and the password."""
    listing = crawl.answer("/openstack")
    status = listing.status
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        yield found("openstack-not-ready", "/openstack")
    elif listing.ok and not set(CLOUD_INIT_OPENSTACK) & set(listing.text.split()):
        yield found("openstack-versions", "/openstack", newest=CLOUD_INIT_OPENSTACK[-1])
    elif not listing.ok and status not in (0, HTTPStatus.NOT_FOUND, *REFUSED):
        yield found("openstack-probe", "/openstack", status=status)
    if crawl.version is None:
        return
    directory = f"/openstack/{crawl.version}"
    yield from _meta_data(crawl, f"{directory}/meta_data.json")
    names = ("vendor_data.json", "vendor_data2.json", "network_data.json")
    others = (f"{directory}/{one}" for one in names)
    yield from seen("json-unreadable", crawl.where(lambda one: one.ok and one.json is None, others))
    contents = [ask.path for ask in crawl.asked if ask.path.startswith("/openstack/content/")]
    yield from seen("content-unreadable", crawl.missing(contents).values())
    path = "/openstack/2013-04-04/password"
    password = crawl.answer(path).status
    if password not in (0, HTTPStatus.OK):
        yield found("password", path, status=password)


def _meta_data(crawl: Crawl, path: str) -> Iterator[Finding]:
    answer = crawl.answer(path)
    document = answer.json
    if not isinstance(document, Mapping):
        status = f"status {answer.status}" if answer.status else "no answer"
        yield found("meta-data-unreadable", path, status=status)
        return
    missing = [name for name in ("uuid", "hostname") if not isinstance(document.get(name), str)]
    if missing:
        yield found("meta-data-incomplete", path, missing=" and no ".join(missing))
    seed = document.get("random_seed")
    if seed is not None and (
        not isinstance(seed, str) or _decoded(seed.encode(errors="replace")) is None
    ):
        yield found("random-seed", path)
    for name, kind, what in (("public_keys", Mapping, "an object"), ("keys", list, "a list")):
        value = document.get(name)
        if value is not None and not isinstance(value, kind):
            yield found("meta-data-member", path, name=name, kind=what)


def check_network_data(crawl: Crawl, around: Surroundings) -> Iterator[Finding]:
    """Check network_data.json for consistency, and the MACs in all dialects against the guest's NICs."""
    path = f"/openstack/{crawl.version}/network_data.json"
    document = crawl.answer(path).json
    links = _objects(document, "links")
    nics = [link for link in links if link.get("type") not in _VIRTUAL]
    if isinstance(document, Mapping):
        yield from _links(document, links, nics, path)
    if around.macs is not None:
        yield from _guest_macs(crawl, nics, around.macs, path)
    elif links:
        yield from _host_macs(around, path)


def _objects(document: object, name: str) -> _Objects:
    value = document.get(name) if isinstance(document, Mapping) else None
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _links(document: _Object, links: _Objects, nics: _Objects, path: str) -> Iterator[Finding]:
    ids = [_name(link.get("id")) for link in links]
    used = [one.get("link") for one in _objects(document, "networks")]
    used += [link.get("vlan_link") for link in links if link.get("type") == "vlan"]
    described = set(ids)
    if lost := [link for link in map(_name, used) if link not in described]:
        yield found("link-missing", path, link=lost[0])
    if bare := [link for link in nics if not _mac(link)]:
        yield found("link-without-mac", path, link=_name(bare[0].get("id")))
    if len(described) < len(ids):
        yield found("link-twice", path)
    if not links and "links" in document:
        yield found("network-data-empty", path)


def _name(value: object) -> object:
    """Return a JSON value that should be a name; for a list or an object, which have no hash, return its type."""
    return f"({type(value).__name__})" if isinstance(value, list | dict) else value


def _mac(link: _Object) -> str:
    return str(_name(link.get("ethernet_mac_address") or "")).lower()


def _guest_macs(crawl: Crawl, nics: _Objects, macs: frozenset[str], path: str) -> Iterator[Finding]:
    has = ", ".join(sorted(macs)) or "none"
    if foreign := [mac for nic in nics if (mac := _mac(nic)) and mac not in macs]:
        yield found("mac-mismatch", path, mac=foreign[0], has=has)
    paths = [one for one in crawl.listed if one.endswith("/network/interfaces/macs/")]
    for other in ("/nocloud/network-config", *paths, f"{crawl.base}/meta-data/mac"):
        named = set(_MAC.findall(crawl.good(other).text.lower()))
        severity = None if other.startswith("/nocloud") else Severity.WARNING
        if lacked := named - macs:
            mac = min(lacked)
            yield found("mac-mismatch", other, severity=severity, case="named", mac=mac, has=has)


def _host_macs(around: Surroundings, path: str) -> Iterator[Finding]:
    """Check the record's NICs by the host's data, for use if the guest's are unknown."""
    answering = any(nic.mac in nic.seen for nic in around.nics)
    for nic in around.nics:
        shown: dict[str, Any] = {"mac": nic.mac, "network": nic.network}
        if nic.seen and nic.mac not in nic.seen:
            has = ", ".join(sorted(nic.seen))
            yield found("mac-mismatch", path, case="answering", has=has, **shown)
        elif answering and not nic.seen:
            yield found("nic-not-seen", path, **shown)


def check_nocloud(crawl: Crawl) -> Iterator[Finding]:
    """Check that all four files exist, and that meta-data has an instance id."""
    if Dialect.NOCLOUD not in crawl.served:
        return
    gone = crawl.missing(f"/nocloud/{name}" for name in NOCLOUD_FILES)
    severity = Severity.ERROR if "/nocloud/user-data" in gone else None
    yield from seen("nocloud-missing", gone.values(), severity=severity)
    if not _ID.search(crawl.answer("/nocloud/meta-data").text):
        yield found("nocloud-instance-id", "/nocloud/meta-data")


def check_user_data(crawl: Crawl) -> Iterator[Finding]:
    for path in (
        f"/openstack/{crawl.version}/user_data",
        f"{crawl.base}/user-data",
        "/nocloud/user-data",
    ):
        answer = crawl.good(path)
        if answer.body:
            yield from _content(answer.body, path)
            return
        # NoCloud's user-data must exist, even if it is empty.
        if answer.ok and not path.startswith("/nocloud/"):
            yield found("user-data-empty", path)


def _content(body: bytes, path: str) -> Iterator[Finding]:
    plain = _unpacked(body)
    if is_known(plain):
        if plain.startswith(b"#!") and b"\r\n" in plain[:_HEAD]:
            yield found("user-data-crlf", path)
    elif is_known(_unpacked(_decoded(plain) or b"")):
        yield found("user-data-header", path, case="base64")
    else:
        begin = repr(plain[:40].split(b"\n")[0].decode("utf-8", "replace"))
        yield found("user-data-header", path, begin=begin)


def is_known(data: bytes) -> bool:
    """Return whether a client processes user-data with this beginning."""
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
