"""The tree of a Debian 13 as its installation leaves it, and in it the archives of what tests install offline."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY
from support.lab import run

_CACHE: Final = REPOSITORY / ".cache" / "blank-debian"
_ARCHIVES: Final = "var/cache/apt/archives"
_MAKE: Final = """
set -eu
part=$1 packages=$2
LC_ALL=C.UTF-8 mmdebstrap --quiet --mode=root --variant=important --format=directory \\
    --include=ca-certificates --dpkgopt=force-unsafe-io --skip=cleanup/apt/lists \\
    --dpkgopt='path-exclude=/usr/share/man/*' \\
    --aptopt='Acquire::Languages "none"; Acquire::Check-Valid-Until "false"' trixie "$part"
cp /etc/resolv.conf "$part/etc/resolv.conf"
chroot "$part" apt-get satisfy --quiet --yes --no-install-recommends --download-only "$packages"
: >"$part/etc/resolv.conf"
"""
_MAKE_S: Final = 500
_KEPT: Final = 2


def blank_debian(deb: Path, packages: Sequence[str]) -> Path:
    """The tree, which is never written to; made when there is none of this month for these packages.

    Args:
        deb: A package that is installed from a file; what it depends on is in the tree.
        packages: What else is to be installed.

    Raises:
        AssertionError: Debian's packages cannot be had.
    """
    depends = run("dpkg-deb", "--field", str(deb), "Depends").strip()
    wanted = ", ".join([depends, *packages])
    key = f"{_MAKE}{time.strftime('%Y-%m', time.gmtime())}{wanted}"
    tree = _CACHE / hashlib.sha256(key.encode()).hexdigest()[:16]
    _CACHE.mkdir(parents=True, exist_ok=True)
    with _CACHE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.is_dir():
            part = tree.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            run("sh", "-c", _MAKE, "sh", str(part), wanted, timeout_s=_MAKE_S)
            part.rename(tree)
        os.utime(tree)
        # A machine may be running on the last one.
        for old in sorted(_CACHE.iterdir(), key=lambda one: one.stat().st_mtime)[:-_KEPT]:
            shutil.rmtree(old)
    return tree
