"""imdsproxy's own packages: built once for each state of the sources, and Debian's that they or tests need."""

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY
from support.lab import run

CACHE: Final = REPOSITORY / ".cache"
_CACHE: Final = CACHE / "packages"
_SOURCES: Final = ("src", "packaging", "docs", "pyproject.toml", "LICENSE")
RECOMMENDED: Final = ("python3-jinja2", "python3-openstacksdk (>= 4.0)")
"""Of what the package recommends, what its tests need."""
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
    place = CACHE / "package-archives"
    names = [one.split()[0] for one in RECOMMENDED]
    install = ("install", "--yes", "--no-install-recommends", "--download-only", str(deb))
    with (place.parent / "package-archives.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (place / "partial").mkdir(parents=True, exist_ok=True)
        apt_get("-o", f"Dir::Cache::archives={place}", *install, *names)
    return place


def archive_of(package: str) -> Path:
    """A package of Debian's as it is now."""
    place = CACHE / "debian-archives" / package
    place.mkdir(parents=True, exist_ok=True)
    with (place.parent / f"{package}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # What is there and right is not fetched again.
        apt_get("download", package, cwd=place)
        return max(place.glob("*.deb"), key=lambda path: path.stat().st_mtime)


def unpacked(package: str) -> Path:
    """The root that a package of Debian's unpacks to, which is not installed; the first call fetches it."""
    cache = CACHE / "debian-files"
    target = cache / package
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{package}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{package}.") as name:
                apt_get("download", package, cwd=Path(name))
                (deb,) = Path(name).glob("*.deb")
                run("dpkg-deb", "--extract", str(deb), f"{name}/root")
                Path(name, "root").rename(target)
    return target


def apt_get(*words: str, cwd: Path | None = None) -> None:
    """Run apt-get, a second time with new lists where they are too old, or none."""
    options = ("-q", "-o", "APT::Sandbox::User=root", "-o", "DPkg::Lock::Timeout=120")
    try:
        run("apt-get", *options, *words, cwd=cwd, timeout_s=_DOWNLOAD_S)
    except AssertionError:
        run("apt-get", *options, "update", timeout_s=_DOWNLOAD_S)
        run("apt-get", *options, *words, cwd=cwd, timeout_s=_DOWNLOAD_S)


def _build(place: Path, version: str | None) -> None:
    work = place.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)
    sources = work / "sources"
    command = [str(REPOSITORY / "script/package"), str(work)]
    if version is not None:
        for path in _sources():
            copy = sources / path.relative_to(REPOSITORY)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        _set_version(sources, version)
        command = [str(sources / "packaging/build"), sys.executable, str(work)]
    printed = run(*command, timeout_s=_BUILD_S, environment={"SOURCE_DATE_EPOCH": EPOCH})
    shutil.rmtree(sources, ignore_errors=True)
    assert printed.splitlines()[-2:] == sorted(map(str, work.iterdir()))
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
    built = [one for one in _CACHE.iterdir() if one.is_dir()]
    for one in sorted(built, key=lambda one: one.stat().st_mtime)[:-_KEPT]:
        shutil.rmtree(one)
