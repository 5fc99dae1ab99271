"""The environments of Nova and Neutron, made once below `.cache/openstack` and used by every lab of this checkout.

What is there is named after what it was made of. Who uses it holds a shared lock on it, so that somebody who makes
the next takes away only what nobody uses any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[3]
INSIDE: Final = Path(__file__).with_name("inside")
_CACHE: Final = REPOSITORY / ".cache" / "openstack"
_REQUIREMENTS: Final = REPOSITORY / "requirements"
_NAMES: Final = ("nova", "neutron")
_INSTALL_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Made:
    """A directory that is complete, and the lock that keeps it.

    Attributes:
        lock: A descriptor; whoever inherits it keeps the directory, too.
    """

    path: Path
    lock: int

    def release(self) -> None:
        os.close(self.lock)


@dataclass(frozen=True, slots=True)
class Environments:
    """Nova's and Neutron's virtual environments."""

    made: Made

    def python(self, name: str) -> Path:
        return self.made.path / name / "bin" / "python"

    def uwsgi(self, name: str) -> Path:
        return self.made.path / name / "bin" / "uwsgi"

    def paste(self, name: str) -> Path:
        """The api-paste.ini that the package brings."""
        return self.made.path / name / "etc" / name / "api-paste.ini"


def run(
    argv: list[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: str | None = None,
    timeout_s: float = _INSTALL_S,
) -> str:
    """Runs a program to its end; its standard output.

    Raises:
        RuntimeError: It did not end with 0; with the end of what it said.
    """
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    if done.returncode != 0:
        told = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"{' '.join(argv[:4])} ended with {done.returncode}:\n{told}")
    return done.stdout


def made_once(prefix: str, stamp: str, make: Callable[[Path], None]) -> Made:
    """The directory `prefix-stamp`, made if it is not there; older ones go that nobody uses.

    Args:
        make: Gets the directory, empty and already under its last name: environments know their own path.
    """
    _CACHE.mkdir(parents=True, exist_ok=True)
    path = _CACHE / f"{prefix}-{stamp}"
    complete = path / ".complete"
    with _one_at_a_time(_CACHE / f"{prefix}.lock"):
        if not complete.exists():
            _sweep(prefix)
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            make(path)
            complete.touch()
        return Made(path, _hold(path, fcntl.LOCK_SH))


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
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    requirements = _REQUIREMENTS / "lab-tools.txt"
    run([*pip, "--require-hashes", "--target", str(tools), "-r", str(requirements)])
    uv = str(tools / "bin" / "uv")
    # ovs comes as source; its C part is optional and left out everywhere, whether there is a compiler or not.
    environment = {**_as_pip_is_told(), "CC": "false"}
    for name in _NAMES:
        target = path / name
        run([uv, "venv", "--quiet", "--no-managed-python", "--python", sys.executable, str(target)])
        run(
            [
                *(uv, "pip", "sync", "--quiet", "--require-hashes"),
                *("--python", str(target / "bin" / "python")),
                *("--build-constraints", str(requirements)),
                str(_REQUIREMENTS / f"lab-{name}.txt"),
            ],
            environment=environment,
        )
    shutil.rmtree(tools)


def _as_pip_is_told() -> dict[str, str]:
    """Index and certificates by which the machine's pip works; uv does not read pip's variables."""
    pairs = (
        ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
        ("PIP_EXTRA_INDEX_URL", "UV_INDEX"),
        ("PIP_CERT", "SSL_CERT_FILE"),
    )
    return {
        uvs: os.environ[pips] for pips, uvs in pairs if pips in os.environ and uvs not in os.environ
    }


def _sweep(prefix: str) -> None:
    for path in _CACHE.glob(f"{prefix}-*"):
        try:
            lock = _hold(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        shutil.rmtree(path)
        os.close(lock)


def _hold(path: Path, how: int) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
