"""The disk image that virtual machines boot from, and what runs them: hardware or emulation."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY

QEMU: Final = "/usr/bin/qemu-system-x86_64"

_BUILD_S: Final = 600
_TRIAL_S: Final = 20.0
# The kernel has come up and looks for the disk that it is not given.
_CAME_UP: Final = b"VFS: Unable to mount root fs"


@dataclass(frozen=True, slots=True)
class Image:
    """A stock Debian with cloud-init, as `script/vm-image` makes it.

    Attributes:
        made_in_s: How long it took to have it; next to nothing when it was there.
    """

    directory: Path
    made_in_s: float

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def disk(self) -> Path:
        return self.directory / "disk.ext4"

    def acceleration(self) -> str:
        """`kvm` where it is proved to boot this kernel on this host, else `tcg`; asked once for each host kernel."""
        verdict = self.directory / "acceleration.json"
        host = f"{platform.release()} {platform.version()}"
        if verdict.is_file():
            known: dict[str, str] = json.loads(verdict.read_text())
            if known["host"] == host:
                return known["acceleration"]
        found = "kvm" if self._boots_with_kvm() else "tcg"
        verdict.write_text(json.dumps({"host": host, "acceleration": found}))
        return found

    def _boots_with_kvm(self) -> bool:
        # A device /dev/kvm says little: below some hypervisors it is there and its machines stand still.
        if not Path("/dev/kvm").exists():
            return False
        words = (QEMU, "-accel", "kvm", "-cpu", "host", "-m", "256", *BARE)
        kernel = ("-kernel", str(self.kernel), "-append", "console=ttyS0 panic=-1")
        try:
            done = subprocess.run(
                (*words, "-serial", "stdio", *kernel),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=_TRIAL_S,
            )
        except subprocess.TimeoutExpired as error:
            return _CAME_UP in (error.stdout or b"")
        return _CAME_UP in done.stdout


BARE: Final = ("-display", "none", "-nodefaults", "-no-user-config", "-no-reboot")
"""QEMU's options for a machine that has nothing but what it is given."""


def vm_image() -> Image:
    """The image; made when there is none of this month and this recipe."""
    start = time.monotonic()
    done = subprocess.run(
        [str(REPOSITORY / "script" / "vm-image")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_BUILD_S,
    )
    assert done.returncode == 0, done.stderr
    return Image(Path(done.stdout.strip()), time.monotonic() - start)
