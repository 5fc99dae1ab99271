"""Single files out of Debian packages: downloaded, unpacked into the checkout's cache, never installed."""

from __future__ import annotations

import fcntl
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY

_CACHE: Final = REPOSITORY / ".cache" / "debian-files"
_APT: Final = ("apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "DPkg::Lock::Timeout=120")


def unpacked(package: str) -> Path:
    """The root that the package unpacks to; the first call fetches it."""
    target = _CACHE / package
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / f"{package}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=_CACHE, prefix=f"{package}.") as name:
            building = Path(name)
            _fetch(package, building)
            (deb,) = building.glob("*.deb")
            _run("dpkg-deb", "--extract", str(deb), str(building / "root"), cwd=building)
            (building / "root").rename(target)
    return target


def _fetch(package: str, into: Path) -> None:
    try:
        _run(*_APT, "download", package, cwd=into)
    except subprocess.CalledProcessError:
        # No list of packages yet, or one whose versions are gone.
        _run(*_APT, "update", cwd=into)
        _run(*_APT, "download", package, cwd=into)


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=300)
