"""The image of virtual machines."""

import subprocess
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY

_BUILD_S: Final = 600


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
