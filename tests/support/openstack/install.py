"""The environments of Nova and Neutron, made once below `.cache/openstack` and used by every lab of this checkout.

What is there is named after what it was made of.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.lab import run

REPOSITORY: Final = Path(__file__).resolve().parents[3]
INSIDE: Final = Path(__file__).with_name("inside")
_CACHE: Final = REPOSITORY / ".cache" / "openstack"
_REQUIREMENTS: Final = REPOSITORY / "requirements"
_INSTALL_S: Final = 600.0
_KEPT_S: Final = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Environments:
    """Nova's and Neutron's virtual environments."""

    path: Path

    def python(self, name: str) -> Path:
        return self.path / name / "bin" / "python"

    def uwsgi(self, name: str) -> Path:
        return self.path / name / "bin" / "uwsgi"

    def paste(self, name: str) -> Path:
        """The api-paste.ini that the package brings."""
        return self.path / name / "etc" / name / "api-paste.ini"


def made_once(prefix: str, stamp: str, make: Callable[[Path], None]) -> Path:
    """The directory `prefix-stamp`, made if it is not there; then others go that were not used for a week.

    Args:
        make: Gets the directory, empty and already under its last name: environments know their own path.
    """
    _CACHE.mkdir(parents=True, exist_ok=True)
    path = _CACHE / f"{prefix}-{stamp}"
    complete = path / ".complete"
    with (_CACHE / f"{prefix}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            for other in _CACHE.glob(f"{prefix}-*"):
                if other == path or time.time() - other.stat().st_mtime > _KEPT_S:
                    shutil.rmtree(other)
            path.mkdir()
            make(path)
            complete.touch()
        os.utime(path)
    return path


def environments() -> Environments:
    """Nova's and Neutron's environments, for the Python that runs this."""
    files = (*sorted(_REQUIREMENTS.glob("lab-*.txt")), Path(__file__))
    stamp = stamp_of(files, sys.version, str(REPOSITORY))
    return Environments(made_once("environments", stamp, _install))


def stamp_of(files: tuple[Path, ...], *words: str) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    for word in words:
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()[:12]


def _install(path: Path) -> None:
    tools = path / "tools"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    requirements = str(_REQUIREMENTS / "lab-tools.txt")
    _run(*pip, "--require-hashes", "--target", str(tools), "-r", requirements)
    uv = str(tools / "bin" / "uv")
    for name in ("nova", "neutron"):
        target = str(path / name)
        _run(uv, "venv", "--quiet", "--no-managed-python", "--python", sys.executable, target)
        _run(
            *(uv, "pip", "sync", "--quiet", "--require-hashes"),
            *("--python", f"{target}/bin/python", "--build-constraints", requirements),
            str(_REQUIREMENTS / f"lab-{name}.txt"),
        )
    shutil.rmtree(tools)


def _run(*words: str) -> None:
    # Index and certificates by which the machine's pip works; uv does not read pip's variables.
    pairs = (
        ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
        ("PIP_EXTRA_INDEX_URL", "UV_INDEX"),
        ("PIP_CERT", "SSL_CERT_FILE"),
    )
    own = {uvs: os.environ[pips] for pips, uvs in pairs if pips in os.environ}
    # ovs comes as source; its C part is optional and left out everywhere, whether there is a compiler or not.
    run(*words, timeout_s=_INSTALL_S, environment={**own, **os.environ, "CC": "false"})


if __name__ == "__main__":
    environments()
