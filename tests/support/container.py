"""imdsproxy's container image, and a machine whose Podman runs it."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY
from support.lab import run
from support.packages import EPOCH, Packages
from support.systemd_machine import Machine, systemd_machine

RECIPE: Final = REPOSITORY / "packaging/container"
CAPABILITIES: Final = frozenset(
    re.findall(r"\bCAP_\w+", (RECIPE / "imdsproxy.container").read_text())
)
"""All that the unit grants."""

_CACHE: Final = REPOSITORY / ".cache" / "images"
_BUILD_S: Final = 300


def build_image(packages: Packages) -> Path:
    """The image of these packages, built once; the last one is kept."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((RECIPE / "build").read_bytes() + packages.deb.read_bytes())
    place = _CACHE / digest.hexdigest()[:16]
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.is_dir():
            for old in _CACHE.glob("*/"):
                shutil.rmtree(old)
            part = place.with_suffix(".part")
            command = (str(REPOSITORY / "script/container"), str(part), str(packages.deb))
            run(*command, timeout_s=_BUILD_S, environment={"SOURCE_DATE_EPOCH": EPOCH})
            part.rename(place)
        os.utime(place)
    (image,) = place.glob("*.tar")
    return image


@contextlib.contextmanager
def podman_machine(work: Path) -> Iterator[Machine]:
    """A machine that has Podman, and no image."""
    with systemd_machine(work) as machine:
        # An overlay cannot lie over another one; no image of this host's is in it.
        machine.run("mkdir", "-p", "/var/lib/containers")
        machine.run("mount", "-t", "tmpfs", "none", "/var/lib/containers")
        # The pids controller may be the host's other hierarchy's.
        machine.write(
            "/etc/containers/containers.conf.d/test.conf", "[containers]\npids_limit = 0\n"
        )
        yield machine
