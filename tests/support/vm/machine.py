"""A virtual machine: QEMU on a bridge of a lab's host, with two serial ports.

The first is the guest's console, kept as a file; on the second whatever runs in the guest reports, undisturbed by
the kernel.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.lab import ip, until, within
from support.vm.image import BARE, QEMU, Image

BOOT_S: Final = 150.0
"""How long a machine may take to come up where it is emulated, beside two others, on two processors."""

_MEMORY_MIB: Final = "512"
_CPU: Final = {"kvm": "host", "tcg": "qemu64"}
_ACCELERATION: Final = {"kvm": "kvm", "tcg": "tcg,thread=multi"}


@dataclass(slots=True)
class VirtualMachine:
    """One that boots the image; what it writes to its disk is gone with it.

    Attributes:
        name: Of its files and its network device (`v-NAME`, 15 characters in all).
        host: The namespace where its bridge is.
        extra: QEMU's words for what is special to it, as `imdsproxy snippet --for qemu` prints them; the network
            card on `net0` among them.
        directory: Where its two serial logs are kept.
    """

    name: str
    host: str
    bridge: str
    directory: Path
    extra: Sequence[str] = ()
    _process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def console(self) -> Path:
        return self.directory / f"{self.name}.console.log"

    @property
    def report(self) -> Path:
        return self.directory / f"{self.name}.report.log"

    @property
    def device(self) -> str:
        return f"v-{self.name}"

    def start(self, image: Image) -> None:
        """Plug it in and switch it on."""
        self.directory.mkdir(parents=True, exist_ok=True)
        # What an earlier one of the name reported is not to be taken for this one's.
        for log in (self.console, self.report):
            log.unlink(missing_ok=True)
        ip("-n", self.host, "tuntap", "add", self.device, "mode", "tap")
        ip("-n", self.host, "link", "set", self.device, "up", "master", self.bridge)
        acceleration = image.acceleration()
        words = (
            *(QEMU, "-accel", _ACCELERATION[acceleration], "-cpu", _CPU[acceleration]),
            *("-smp", "1", "-m", _MEMORY_MIB, *BARE),
            *("-kernel", str(image.kernel), "-append", "root=/dev/nvme0n1 ro console=ttyS0"),
            *("-drive", f"file={image.disk},format=raw,if=none,id=disk,snapshot=on"),
            *("-device", "nvme,serial=0,drive=disk"),
            *("-netdev", f"tap,id=net0,ifname={self.device},script=no,downscript=no"),
            *("-serial", f"file:{self.console}", "-serial", f"file:{self.report}"),
            *self.extra,
        )
        errors = self.directory / f"{self.name}.qemu.log"
        with errors.open("wb") as sink:
            # Its own session: Ctrl-C of the tests is not for it.
            self._process = subprocess.Popen(
                (*within(self.host), *words),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def plug(self, bridge: str) -> None:
        """Plug its network cable into another bridge."""
        ip("-n", self.host, "link", "set", self.device, "master", bridge)

    def wait_for(self, line: str, *, within_s: float = BOOT_S) -> float:
        """Wait until it has reported a line; how many seconds that took.

        Raises:
            AssertionError: Not in time, or it ended; names the console's log.
        """
        return until(
            lambda: self._reported(line), within_s=within_s, what=f"{line!r} by {self}", pause_s=0.2
        )

    def _reported(self, line: str) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"{self} ended: {self.directory}"
        return line in self.reported()

    def reported(self) -> list[str]:
        """What it has reported so far, without a line that is not complete."""
        if not self.report.exists():
            return []
        return self.report.read_text(errors="replace").replace("\r", "").split("\n")[:-1]

    def value(self, name: str) -> str:
        """What it reported as `NAME=…`, the last time; empty when it did not."""
        lines = [one for one in self.reported() if one.startswith(f"{name}=")]
        return lines[-1].partition("=")[2] if lines else ""

    def worked_s(self) -> float:
        """How long a processor has worked for it."""
        assert self._process is not None
        words = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Pull the plug."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __str__(self) -> str:
        return f"virtual machine {self.name} (its console: {self.console})"
