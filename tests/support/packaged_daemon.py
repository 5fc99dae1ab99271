"""imdsproxy installed from its Debian package in a machine of its own, as an operator installs it."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from support.lab import run
from support.packages import CACHE, RECOMMENDED, Packages, download_dependencies
from support.systemd_daemon import UnitDaemon
from support.systemd_machine import Machine, systemd_machine

_APT: Final = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--yes", "--quiet=2")
_COMPILE: Final = "/usr/local/sbin/py3compile"
_LIBRARIES: Final = "/usr/lib/python3/dist-packages"
_ARCHIVES: Final = "/var/cache/apt/archives"
_STATUS: Final = Path("/var/lib/dpkg/status")


@contextlib.contextmanager
def machine_with_dependencies(work: Path, packages: Packages) -> Iterator[Machine]:
    """A machine that has all that the package depends on, and not the package.

    Raises:
        AssertionError: Debian's packages cannot be had, or do not satisfy it.
    """
    with systemd_machine(work, changes=_dependencies(work, packages)) as machine:
        yield machine


def _dependencies(work: Path, packages: Packages) -> Path:
    """What installing the dependencies changes in a machine; made once for a state of this host and of the package."""
    archives = download_dependencies(packages.deb)
    own = run("dpkg-deb", "--field", str(packages.deb), "Depends").strip()
    depends = ", ".join((own, *RECOMMENDED))
    names = sorted(path.name for path in archives.glob("*.deb"))
    state = "\n".join([depends, *names, _STATUS.read_text(), Path(__file__).read_text()])
    target = CACHE / f"dependencies-{hashlib.sha256(state.encode()).hexdigest()[:16]}.tar"
    with (CACHE / "dependencies.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in CACHE.glob("dependencies-*.tar"):
                old.unlink()
            part = target.with_suffix(".part")
            with systemd_machine(work) as machine:
                _install(machine, archives, depends)
                machine.save_changes(part)
            part.rename(target)
    return target


def _install(machine: Machine, archives: Path, depends: str) -> None:
    # What a container's image brings so that nothing is ever started.
    machine.run("rm", "-f", "/usr/sbin/policy-rc.d")
    # The index of all manual pages would be made anew each time.
    machine.write("/etc/dpkg/dpkg.cfg.d/machine", "path-exclude=/usr/share/man/*\n")
    # A machine has no network.
    machine.write("/etc/apt/apt.conf.d/machine", 'APT::Install-Recommends "false";\n')
    machine.run("sh", "-c", f"cp {archives}/*.deb {_ARCHIVES} 2>/dev/null || true")
    # All at once instead of one package after the other: half a minute becomes some seconds.
    machine.write(_COMPILE, "#!/bin/sh\n")
    machine.run("chmod", "755", _COMPILE)
    machine.run(*_APT, "satisfy", depends)
    machine.run("rm", _COMPILE)
    machine.attempt("/usr/bin/python3", "-m", "compileall", "-q", "-j", "0", _LIBRARIES)
    machine.run("sh", "-c", f"rm -f {_ARCHIVES}/*.deb")


@dataclass(slots=True)
class PackagedDaemon(UnitDaemon):
    """The installed package."""

    def apt_install(self, packages: Packages) -> str:
        """Install a package as docs/how-to/install.md says; what was printed."""
        # apt's own account reads it from there.
        place = f"/tmp/{packages.deb.name}"  # noqa: S108 - of the machine
        self.machine.run("install", "-m", "644", str(packages.deb), place)
        return self.machine.run(*_APT, "--no-install-recommends", "install", place)

    def replace(self, packages: Packages) -> str:
        """Install over what is installed, without looking for dependencies; what was printed."""
        return self.machine.run("dpkg", "--install", str(packages.deb))

    def apt(self, *arguments: str) -> str:
        """Run apt-get, which must succeed; what it printed."""
        return self.machine.run(*_APT, *arguments)

    def command(self, *arguments: str) -> str:
        """Run the package's command line, which must succeed."""
        return self.machine.run("/usr/bin/imdsproxy", *arguments)

    def status(self) -> Mapping[str, Any]:
        """What the package's `imdsproxy status --json` says."""
        return cast("Mapping[str, Any]", json.loads(self.command("status", "--json")))
