"""The first tutorial, followed to the letter on a blank Debian 13.

    python -P -m support.vm.newcomer DISTRIBUTION

follows all of it, with the image of a distribution, and prints how long it took; `--ahead` only makes what it takes
minutes to make.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.blank_debian import blank_debian
from support.certificates import make_authority
from support.demonstration import REPOSITORY
from support.document_blocks import Block, blocks_of, find_fault, script_of
from support.lab import run
from support.openstack.servers import ends_with_us
from support.packages import build_packages
from support.patience import patience
from support.systemd_machine import Machine, systemd_machine

PAGE: Final = REPOSITORY / "docs/tutorials/first-vm.md"
LOGS: Final = REPOSITORY / ".cache" / "vm-logs"

_SITE: Final = "cloud.debian.org"
_PATH: Final = "images/cloud/trixie/latest/debian-13-genericcloud-amd64.qcow2"
_HOME: Final = "/root"
_TRUSTED: Final = "/etc/ssl/certs/ca-certificates.crt"
_FOLLOW_S: Final = 600
_BUILD_S: Final = 600


@dataclass(frozen=True, slots=True)
class Followed:
    """How it went.

    Attributes:
        fault: What did not go as the page says; empty when all did.
        took_s: From the first command to the last.
    """

    fault: str
    took_s: float


def page_blocks() -> list[Block]:
    """All commands of the page, in their order."""
    return blocks_of(PAGE, PAGE.read_text().partition("\n")[0])


def packages_of_the_page() -> list[str]:
    """What its first command installs beside imdsproxy."""
    (command,) = re.findall(r"apt-get install (.*)", page_blocks()[0].script.replace("\\\n", " "))
    return [word for word in command.split() if not word.startswith(("-", "."))]


def blank_tree() -> Path:
    """A blank Debian 13 with the archives of what the page installs, and of what Ansible needs on a host."""
    return blank_debian(build_packages().deb, [*packages_of_the_page(), "python3-apt"])


def vm_image(distribution: str) -> Path:
    """The disk image; made when there is none of this month and this recipe."""
    done = subprocess.run(
        [str(REPOSITORY / "script" / "vm-image"), distribution],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_BUILD_S * patience(),
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def follow(work: Path, distribution: str = "") -> Followed:
    """Do what the page says.

    Args:
        work: An empty directory.
        distribution: Whose image the guest boots, where the page says Debian's. Without one, its disk is empty, and
            what asks for the guest's address is not done.
    """
    blocks, name = page_blocks(), distribution or "empty"
    if distribution:
        image = vm_image(distribution)
    else:
        blocks = [one for one in blocks if "$(address)" not in one.script]
        image = work / "empty.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "3G")
    script = script_of(blocks).replace("debian@", f"{distribution.partition('-')[0]}@")
    with _blank_host(work) as machine, _site(machine, work, image):
        # Not by standard input: ssh would read the rest of it.
        machine.write("/srv/blocks", script)
        start = time.monotonic()
        limit_s = round(_FOLLOW_S * patience())
        command = f"cd {_HOME} && exec timeout {limit_s} bash -euo pipefail /srv/blocks"
        status, output = machine.attempt("sh", "-c", command, within_s=limit_s + 20)
        took_s = time.monotonic() - start
        journal = machine.journal()
        if status != 0:
            _keep_screen(machine, name)
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / f"{name}.log").write_text(f"{output}\n{journal}")
    return Followed(find_fault(blocks, status, output), took_s)


def _keep_screen(machine: Machine, name: str) -> None:
    """Keep what the guest's screen shows, if there is a guest: how far its boot came."""
    screen = "/srv/screen.ppm"
    if machine.attempt("virsh", "screenshot", "web-1", screen)[0] == 0:
        LOGS.mkdir(parents=True, exist_ok=True)
        shutil.copy(machine.root / screen.removeprefix("/"), LOGS / f"{name}.ppm")


@contextlib.contextmanager
def _blank_host(work: Path) -> Iterator[Machine]:
    """What the page takes for granted: Debian 13, the package, an SSH key; and a device for taps."""
    deb = build_packages().deb
    place = work / "machine"
    place.mkdir()
    with systemd_machine(place, lower=blank_tree()) as machine:
        machine.run("mkdir", "-p", "/dev/net", f"{_HOME}/.ssh")
        machine.run("mknod", "/dev/net/tun", "c", "10", "200")
        machine.run("install", "-m", "644", str(deb), f"{_HOME}/")
        key = work / "id_ed25519"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        for name in (key.name, f"{key.name}.pub"):
            machine.write(f"{_HOME}/.ssh/{name}", (work / name).read_text())
            machine.run("chmod", "600", f"{_HOME}/.ssh/{name}")
        yield machine


@contextlib.contextmanager
def _site(machine: Machine, work: Path, image: Path) -> Iterator[None]:
    """The image where the page downloads it from: a server of this name in the machine's network, which it trusts."""
    authority = make_authority(work, "authority")
    certificate = authority.issue("site", names=[f"DNS:{_SITE}"])
    machine.run("tee", "-a", "/etc/hosts", text=f"127.0.0.1 {_SITE}\n")
    machine.run("tee", "-a", _TRUSTED, text=authority.ca_file.read_text())
    file = work / "site" / _PATH
    file.parent.mkdir(parents=True)
    file.symlink_to(image)
    command = (
        *(*ends_with_us(), "nsenter", f"--net=/proc/{machine.init}/ns/net", "--"),
        *("openssl", "s_server", "-quiet", "-WWW", "-accept", "127.0.0.1:443"),
        *("-cert", str(certificate.certificate), "-key", str(certificate.key)),
    )
    with (work / "site.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=work / "site", stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    if sys.argv[1:] == ["--ahead"]:
        blank_tree()
        sys.exit()
    with tempfile.TemporaryDirectory(prefix="imdst-") as name:
        done = follow(Path(name), sys.argv[1])
    sys.stdout.write(f"{done.fault or f'as the page says, in {done.took_s:.0f} s'}\n")
    sys.exit(bool(done.fault))
