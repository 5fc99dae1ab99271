"""A virtual machine: QEMU on a bridge of a lab's host, with two serial ports.

The first is the guest's console, kept as a file; on the second whatever runs in the guest reports, undisturbed by
the kernel. It is emulated wherever it runs: below some hypervisors /dev/kvm is there and its machines stand still.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY
from support.lab import ip, until, within

_BUILD_S: Final = 600
_PORTS: Final = ("console", "report")
_BOOT_S: Final = 150.0
"""How long a machine may take to come up beside two others, on two processors."""


def vm_image() -> Path:
    """The directory with `disk.ext4` and `vmlinuz`; made when there is none of this month and this recipe."""
    done = subprocess.run(
        [str(REPOSITORY / "script" / "vm-image")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_BUILD_S,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@dataclass(slots=True)
class VirtualMachine:
    """One that boots the image; what it writes to its disk is gone with it.

    Attributes:
        name: Of its files and its network device (`v-NAME`, 15 characters in all).
        host: The namespace where its bridge is.
        directory: Where its two serial logs are kept.
        extra: QEMU's words for what is special to it, as `imdsproxy snippet --for qemu` prints them; the network
            card on `net0` among them.
    """

    name: str
    host: str
    bridge: str
    directory: Path
    extra: Sequence[str] = ()
    _process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self, image: Path) -> None:
        """Plug it in and switch it on."""
        self.directory.mkdir(parents=True, exist_ok=True)
        console, report = (self.directory / f"{self.name}.{one}.log" for one in _PORTS)
        # What an earlier one of the name reported is not to be taken for this one's.
        report.unlink(missing_ok=True)
        device = f"v-{self.name}"
        ip("-n", self.host, "tuntap", "add", device, "mode", "tap")
        ip("-n", self.host, "link", "set", device, "up", "master", self.bridge)
        words = (
            *("/usr/bin/qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "qemu64"),
            *("-smp", "1", "-m", "512", "-no-reboot"),
            *("-display", "none", "-nodefaults", "-no-user-config"),
            *("-kernel", str(image / "vmlinuz"), "-append", "root=/dev/nvme0n1 ro console=ttyS0"),
            *("-drive", f"file={image}/disk.ext4,format=raw,if=none,id=disk,snapshot=on"),
            *("-device", "nvme,serial=0,drive=disk"),
            *("-netdev", f"tap,id=net0,ifname={device},script=no,downscript=no"),
            *("-serial", f"file:{console}", "-serial", f"file:{report}"),
            *self.extra,
        )
        with (self.directory / f"{self.name}.qemu.log").open("wb") as sink:
            # Its own session: Ctrl-C of the tests is not for it.
            self._process = subprocess.Popen(
                (*within(self.host), *words),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def wait_up(self) -> None:
        """Wait until it has reported `up`, its last line."""
        until(self._is_up, within_s=_BOOT_S, what=f"the boot of {self}", pause_s=0.2)

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"{self} ended"
        return "\nup\n" in self._reported()

    def _reported(self) -> str:
        report = self.directory / f"{self.name}.{_PORTS[1]}.log"
        return report.read_text(errors="replace").replace("\r", "") if report.exists() else ""

    def value(self, name: str) -> str:
        """What it reported as `NAME=…`; empty when it did not."""
        lines = (line.partition("=") for line in self._reported().splitlines())
        return next((value for found, _, value in lines if found == name), "")

    def stop(self) -> None:
        """Pull the plug."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __str__(self) -> str:
        return f"virtual machine {self.name} (its logs: {self.directory}/{self.name}.*)"
