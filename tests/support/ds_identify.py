"""cloud-init's genuine `ds-identify`, run on a machine that exists only as files."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.packages import unpacked
from support.patience import patience

DMI_OF_SMBIOS: Final[Mapping[tuple[int, str], str]] = {
    (1, "manufacturer"): "sys_vendor",
    (1, "product"): "product_name",
    (1, "serial"): "product_serial",
    (1, "uuid"): "product_uuid",
    (2, "product"): "board_name",
    (3, "asset"): "chassis_asset_tag",
}
"""Linux' names below /sys/class/dmi/id for QEMU's names of SMBIOS fields (drivers/firmware/dmi-id.c)."""

_PLAIN_QEMU: Final = {
    "sys_vendor": "QEMU",
    "product_name": "Standard PC (Q35 + ICH9, 2009)",
    "product_serial": "",
    "product_uuid": "5f0b1c52-90ab-4c1d-8e7f-001122334455",
    "board_name": "",
    "chassis_asset_tag": "",
}
_LIST: Final = re.compile(r"^datasource_list: \[ (.*) \]$", re.MULTILINE)


@dataclass(frozen=True)
class Machine:
    """What a guest sees of itself; without more, a plain machine of QEMU's.

    Attributes:
        seeded: Whether an image for Incus has put its NoCloud seed there.
    """

    dmi: Mapping[str, str] = field(default_factory=dict)
    virtualization: str = "vm:kvm"
    kernel: str = "BOOT_IMAGE=/vmlinuz root=LABEL=root ro"
    init: tuple[str, ...] = ("/sbin/init",)
    environment: Mapping[str, str] = field(default_factory=dict)
    seeded: bool = False


def identify(machine: Machine, root: Path) -> list[str]:
    """The data sources that it finds, in their order; none where cloud-init stays off."""
    write_dmi(machine, root / "sys/class/dmi/id")
    (root / "run/systemd").mkdir(parents=True)
    proc = root / "proc/1"
    proc.mkdir(parents=True)
    (root / "proc/cmdline").write_text(f"{machine.kernel}\n")
    (root / "proc/uptime").write_text("3.14 2.71\n")
    (proc / "cmdline").write_bytes(_zero_ended(machine.init))
    (proc / "environ").write_bytes(_zero_ended(f"{k}={v}" for k, v in machine.environment.items()))
    if machine.seeded:
        seed = root / "var/lib/cloud/seed/nocloud-net"
        seed.mkdir(parents=True)
        (seed / "meta-data").write_text("instance-id: of-incus\n")
        (seed / "user-data").write_text("")
    ran = subprocess.run(
        [unpacked("cloud-init") / "usr/lib/cloud-init/ds-identify"],
        env={
            "PATH": os.environ["PATH"],
            "PATH_ROOT": str(root),
            "SYSTEMD_VIRTUALIZATION": machine.virtualization,
            "DEBUG_LEVEL": "2",
        },
        capture_output=True,
        text=True,
        timeout=60 * patience(),
        check=False,
    )
    log = (root / "run/cloud-init/ds-identify.log").read_text()
    assert ran.returncode in {0, 1}, f"{ran.stderr}\n{log}"
    if ran.returncode == 1:
        return []
    found = _LIST.search((root / "run/cloud-init/cloud.cfg").read_text())
    assert found is not None, log
    return [name for name in found[1].split(", ") if name != "None"]


def write_dmi(machine: Machine, directory: Path) -> None:
    """The machine's SMBIOS as Linux shows it."""
    directory.mkdir(parents=True)
    for name, value in {**_PLAIN_QEMU, **machine.dmi}.items():
        (directory / name).write_text(f"{value}\n")


def _zero_ended(words: Iterable[str]) -> bytes:
    return b"".join(f"{word}\0".encode() for word in words)
