"""Whether a guest asks at all: cloud-init's `ds-identify`, as far as it concerns what is served here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from imdsproxy.core.doctor.crawl import Crawl
from imdsproxy.core.doctor.finding import Finding, Severity, Surroundings
from imdsproxy.core.model import Dialect
from imdsproxy.core.snippets.gate import looks_like_amazon

_OPENSTACK_NAMES: Final = frozenset({"OpenStack Nova", "OpenStack Compute"})
_OPENSTACK_TAGS: Final = _OPENSTACK_NAMES | {
    "OpenTelekomCloud",
    "SAP CCloud VM",
    "HUAWEICLOUD",
    "Samsung Cloud Platform",
}
_OUTSCALE: Final = ("3DS Outscale", "3DS Outscale VM")
_SHOWN: Final = ("sys_vendor", "product_name", "product_serial", "chassis_asset_tag")
_KEYS: Final = ("ds", "ci.ds", "ci.datasource")
_HOST_COMMAND: Final = "imdsproxy snippet {} --for qemu|libvirt|proxmox|incus"


def asked_by(around: Surroundings) -> frozenset[Dialect]:
    """Whose documents cloud-init asks for on such a machine, without a seed and without configuration."""
    named = _named(around.kernel)
    names = (named,) if named is not None else around.sources
    if names is not None:
        wanted = {one.lower().removesuffix("-net") for one in names}
        return frozenset(one for one in Dialect if one.value in wanted)
    found = set()
    dmi: Mapping[str, str] = around.dmi or {}
    if around.environment.get("product_name") == "OpenStack Nova":
        found.add(Dialect.OPENSTACK)
    if f" {dmi.get('product_serial', '')}".find(" ds=nocloud") >= 0:
        found.add(Dialect.NOCLOUD)
    if not around.container:
        if (
            dmi.get("product_name") in _OPENSTACK_NAMES
            or dmi.get("chassis_asset_tag") in _OPENSTACK_TAGS
        ):
            found.add(Dialect.OPENSTACK)
        if _is_ec2(dmi):
            found.add(Dialect.EC2)
    return frozenset(found)


def _named(kernel: str) -> str | None:
    named = None
    for word in kernel.split():
        key, equals, value = word.partition("=")
        if equals and key in _KEYS:
            named = value.partition(";")[0]
    return named


def _is_ec2(dmi: Mapping[str, str]) -> bool:
    return (
        looks_like_amazon(dmi.get("product_uuid", ""))
        or dmi.get("product_serial", "").endswith(".brightbox.com")
        or dmi.get("chassis_asset_tag", "").endswith(".zstack.io")
        or dmi.get("sys_vendor") == "e24cloud"
        or (dmi.get("sys_vendor"), dmi.get("product_name")) == _OUTSCALE
    )


def check_gate(crawl: Crawl, around: Surroundings) -> Iterator[Finding]:
    """What is served against what the guest would ask for."""
    served = {one for one in Dialect if crawl.serves(one)}
    if not served:
        if any(one.answer for one in crawl.exchanges) and not crawl.given_up:
            yield _nothing(around)
        return
    command = _HOST_COMMAND.format(around.instance or "INSTANCE")
    if around.dmi is not None:
        yield from _shut(served, around, command)
    elif not crawl.direct:
        yield Finding(
            "gate",
            Severity.NOTE,
            "cloud-init asks only where the machine looks like a cloud; what this guest shows is not known",
            f"`{command}` prints what its hypervisor must show",
            ("cloud-init", "systemd-imdsd"),
        )


def _shut(served: set[Dialect], around: Surroundings, command: str) -> Iterator[Finding]:
    asked = asked_by(around)
    if asked & served:
        return
    if around.sources is None and not around.dmi_complete:
        yield Finding(
            "gate-unseen",
            Severity.NOTE,
            "not all of the machine's SMBIOS may be read, so whether cloud-init asks is not known",
            "run it as root",
        )
        return
    dmi = around.dmi or {}
    shows = ", ".join(f"{name} {dmi[name]!r}" for name in _SHOWN if dmi.get(name)) or "nothing"
    wanted = f"asks for {', '.join(sorted(asked))}" if asked else "stays off"
    yield Finding(
        "gate-shut",
        Severity.ERROR,
        f"cloud-init {wanted}, and served are {', '.join(sorted(served))}; the machine's SMBIOS shows {shows}",
        f"on the host, `{command}` prints what the hypervisor must show (or set datasource_list in the image)",
        ("cloud-init",),
    )


def _nothing(around: Surroundings) -> Finding:
    told = ": " + "; ".join(around.why) if around.why else ""
    return Finding(
        "nothing-served",
        Severity.ERROR,
        f"somebody answers, and none of the EC2, OpenStack and NoCloud documents are there{told}",
        "see who the guest is taken for: `imdsproxy explain --network NET --from ADDRESS` on the host",
        ("every client",),
    )
