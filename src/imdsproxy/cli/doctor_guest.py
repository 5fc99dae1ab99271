"""What the doctor sees of the machine it runs on: of the guest, or on a host of the guest's virtual machine."""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from imdsproxy.core.doctor.finding import Surroundings
from imdsproxy.core.model import METADATA_IPV4, METADATA_IPV6

_DMI: Final = ("sys_vendor", "product_name", "product_serial", "product_uuid", "chassis_asset_tag")
_SOURCES: Final = re.compile(r"^datasource_list:\s*\[(.*)\]", re.MULTILINE)
_QEMU_MAC: Final = re.compile(r"\bmac\"?[=:]\"?((?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2})")
_LOOPBACK: Final = "00:00:00:00:00:00"


def is_metadata_address(host: str) -> bool:
    """Whether a guest asks at this address: elsewhere the machine's own NICs and SMBIOS do not count."""
    try:
        return ip_address(host.partition("%")[0]) in {METADATA_IPV4, METADATA_IPV6}
    except ValueError:
        return False


def look_around(root: Path = Path("/")) -> Surroundings:
    """This machine's NICs, SMBIOS and kernel command line, as far as they may be read.

    Args:
        root: What stands for `/`.
    """
    container = (root / "run/systemd/container").exists()
    first = _text(root / "proc/1/cmdline").replace("\0", " ")
    pairs = [one.partition("=") for one in _text(root / "proc/1/environ").split("\0")]
    shown = root / "sys/class/dmi/id"
    dmi = {name: _text(shown / name).strip() for name in _DMI}
    return Surroundings(
        macs=frozenset(_macs(root / "sys/class/net")),
        dmi={name: value for name, value in dmi.items() if value},
        dmi_complete=all(
            os.access(shown / name, os.R_OK) for name in _DMI if (shown / name).exists()
        ),
        sources=_sources(_text(root / "run/cloud-init/cloud.cfg")),
        kernel=first if container else _text(root / "proc/cmdline"),
        environment={name: value for name, _, value in pairs if name},
        container=container,
    )


def machine_macs(known: frozenset[str], root: Path = Path("/")) -> frozenset[str] | None:
    """The MACs of the virtual machine on this host that has one of `known`; `None` where QEMU runs none.

    A NIC that was plugged in later is not on QEMU's command line. It is counted where a tap device has its MAC, with
    the first byte that libvirt gives these, `fe` (`virNetDevTapCreateInBridgePort`).

    Args:
        known: In lower case.
        root: What stands for `/`.
    """
    commands = (
        _text(process / "cmdline")
        for process in (root / "proc").iterdir()
        if process.name.isdigit()
    )
    machines = (
        {mac.lower() for mac in _QEMU_MAC.findall(command)}
        for command in commands
        if "qemu" in command.partition("\0")[0]
    )
    found = next((macs for macs in machines if macs & known), None)
    if found is None:
        return None
    taps = set(_macs(root / "sys/class/net"))
    return frozenset(found | {mac for mac in known if f"fe{mac[2:]}" in taps})


def _sources(result: str) -> tuple[str, ...] | None:
    """What `ds-identify` has written: `datasource_list: [ OpenStack, None ]`."""
    found = _SOURCES.search(result)
    return None if found is None else tuple(re.findall(r"\w[\w-]*", found[1]))


def _macs(devices: Path) -> list[str]:
    if not devices.is_dir():
        return []
    addresses = [_text(device / "address").strip().lower() for device in devices.iterdir()]
    return [mac for mac in addresses if mac and mac != _LOOPBACK]


def _text(path: Path) -> str:
    """A file's text; nothing where it is not there or not for this account, which is no fault here."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
