"""cloud-init's Debian packages: downloaded, kept, unpacked into a directory; never installed."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from demo.processes import CommandError, run

__all__ = ["download", "parse_packages", "unpack"]

_APT: Final = ("-q", "-o", "APT::Sandbox::User=root", "-o", "DPkg::Lock::Timeout=120")
_DEPENDS: Final = (
    *("apt-cache", "depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts"),
    *("--no-breaks", "--no-replaces", "--no-enhances", "cloud-init"),
)
_INTERPRETER: Final = frozenset({"python3-minimal", "python3-distutils", "python3-lib2to3"})


def parse_packages(depends: str) -> list[str]:
    """cloud-init and the Python libraries that it needs, out of `apt-cache depends --recurse`.

    What is not a Python library (`locales`, `eject`, …) is of no use in a root without an init.
    """
    names = {line.strip() for line in depends.splitlines() if line[:1].isalnum()}
    wanted = {name for name in names if name.startswith("python3-") and ":" not in name}
    return sorted(({"cloud-init"} & names) | (wanted - _INTERPRETER))


def download(cache: Path, *, say: Callable[[str], None]) -> Path:
    """The directory with the packages, filled now or by an earlier run; one run at a time fills it.

    They are kept as long as the system's Python stays the same: some hold compiled modules.

    Raises:
        CommandError: The packages cannot be had.
    """
    python = run(["/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])"])
    target = cache / f"cloud-init-debs-python{'.'.join(python.out.decode().split())}"
    building = cache / "cloud-init-debs.part"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "cloud-init-debs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        say("downloading cloud-init's packages (to be unpacked here, not installed)")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            _fill(building)
            building.rename(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


def unpack(debs: Path, target: Path) -> None:
    """Makes `target` anew, with the packages' `usr/` and `etc/`.

    Raises:
        CommandError: A package is damaged; it is deleted, so that the next run fetches it again.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for deb in sorted(debs.glob("*.deb")):
        try:
            run(["dpkg-deb", "--extract", str(deb), str(target)])
        except CommandError:
            shutil.rmtree(debs)
            raise
    # As Debian does when it installs them: without, every start of cloud-init compiles it all.
    libraries = target / "usr" / "lib" / "python3" / "dist-packages"
    run(
        ["/usr/bin/python3", "-m", "compileall", "-q", "-j", "0", str(libraries)],
        must_succeed=False,
    )


def _fill(debs: Path) -> None:
    packages = parse_packages(run(_DEPENDS, must_succeed=False).out.decode())
    if "cloud-init" in packages and _try_download(packages, debs) is None:
        return
    run(["apt-get", *_APT, "update"], timeout_s=300)
    packages = parse_packages(run(_DEPENDS).out.decode())
    refusal = _try_download(packages, debs)
    if refusal is not None:
        raise CommandError(refusal)


def _try_download(packages: list[str], debs: Path) -> str | None:
    """Why it failed, or `None`."""
    script = 'cd "$0" && exec apt-get "$@"'
    argv = ["sh", "-c", script, str(debs), *_APT, "download", *packages]
    output = run(argv, timeout_s=300, must_succeed=False)
    return None if output.status == 0 else output.err
