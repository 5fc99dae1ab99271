"""imdsproxy's own packages: built once for each state of the sources, and Debian's that they depend on."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY
from support.patience import patience

_CACHE: Final = REPOSITORY / ".cache" / "packages"
_SOURCES: Final = ("src", "packaging", "docs", "pyproject.toml", "LICENSE")
RECOMMENDED: Final = "python3-openstacksdk (>= 4.0)"
"""Of what the package recommends, what its tests need."""
_LISTS: Final = Path("/var/lib/apt/lists")
_INSTALLED: Final = Path("/var/lib/dpkg/status")
_KEPT: Final = 4
EPOCH: Final = "1767225600"
_BUILD_S: Final = 100
_DOWNLOAD_S: Final = 300


@dataclass(frozen=True, slots=True)
class Packages:
    """What a build gives."""

    wheel: Path
    deb: Path


def build_packages(version: str | None = None) -> Packages:
    """The packages of the sources as they are now, or of another version of them; the last few are kept."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = _CACHE / f"{_digest()}-{version or 'own'}"
        if not place.is_dir():
            _build(place, version)
            _forget_old()
        os.utime(place)
    (wheel,), (deb,) = place.glob("*.whl"), place.glob("*.deb")
    return Packages(wheel, deb)


def download_dependencies(deb: Path) -> Path:
    """A directory with every package that this host lacks for one to be installed, as apt lays them down."""
    place = REPOSITORY / ".cache" / "package-archives"
    options = ("-q", "-o", "APT::Sandbox::User=root", "-o", "DPkg::Lock::Timeout=120")
    install = ("install", "--yes", "--no-install-recommends", "--download-only")
    recommended = RECOMMENDED.split()[0]
    place_option = ("-o", f"Dir::Cache::archives={place}")
    command = ["apt-get", *options, *place_option, *install, str(deb), recommended]
    depends = run(["dpkg-deb", "--field", str(deb), "Depends"], timeout_s=20) + recommended
    with (place.parent / "package-archives.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = place / "stamp"
        if stamp.is_file() and stamp.read_text() == _situation(depends):
            return place
        (place / "partial").mkdir(parents=True, exist_ok=True)
        try:
            run(command, timeout_s=_DOWNLOAD_S)
        except AssertionError:  # lists that are too old, or none
            run(["apt-get", *options, "update"], timeout_s=_DOWNLOAD_S)
            run(command, timeout_s=_DOWNLOAD_S)
        stamp.write_text(_situation(depends))
    return place


def _situation(depends: str) -> str:
    """What is asked for, what is installed, and what apt knows of: then the archives are those needed."""
    lists = sorted((one.name, one.stat().st_mtime_ns) for one in _LISTS.glob("*Packages*"))
    return hashlib.sha256(f"{depends}\0{_INSTALLED.read_text()}\0{lists}".encode()).hexdigest()


def run(command: list[str], *, timeout_s: float, **environment: str) -> str:
    """Run what must succeed; what it printed."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s * patience(),
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def _build(place: Path, version: str | None) -> None:
    work = place.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)
    sources = work / "sources"
    for path in _sources():
        copy = sources / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # Neither time nor mode is part of what is built.
        shutil.copyfile(path, copy)
        copy.chmod(0o700 if os.access(path, os.X_OK) else 0o600)
    if version is not None:
        _set_version(sources, version)
    command = [str(sources / "packaging/build"), sys.executable, str(work)]
    run(command, timeout_s=_BUILD_S, SOURCE_DATE_EPOCH=EPOCH)
    shutil.rmtree(sources)
    work.rename(place)


def _set_version(sources: Path, version: str) -> None:
    init = sources / "src/imdsproxy/__init__.py"
    own = init.read_text().split('__version__ = "')[1].split('"')[0]
    init.write_text(init.read_text().replace(f'"{own}"', f'"{version}"'))


def _sources() -> Iterator[Path]:
    for name in _SOURCES:
        path = REPOSITORY / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (one for one in found if one.is_file() and "__pycache__" not in one.parts)
    yield from sorted(REPOSITORY.glob("*.md"))


def _digest() -> str:
    digest = hashlib.sha256()
    for path in _sources():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(REPOSITORY)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _forget_old() -> None:
    kept = sorted(
        (one for one in _CACHE.iterdir() if one.is_dir()),
        key=lambda one: one.stat().st_mtime,
        reverse=True,
    )
    for one in kept[_KEPT:]:
        shutil.rmtree(one)
