"""Site that the how-to pages of identity tokens speak of: imdsproxy, a guest, and the machine of a verifier.

All have one `/etc` of the site's own, over the machine's: with names, the site's CA among the trusted ones, and
imdsproxy's settings. The host and the verifier share the host's network. Blocks of a page say where they run.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.certificates import Authority, make_authority
from support.daemon import instance
from support.demonstration import REPOSITORY
from support.document_blocks import Block, blocks_of, missing_lines, section
from support.guest import Guest
from support.identity.requests import identity_settings
from support.lab import NETNS, ip
from support.openstack.servers import ends_with_us
from support.patience import patience
from support.world import World, open_world

PROJECT: Final = "0123456789abcdef0123456789abcdef"
OTHER_PROJECT: Final = "22222222222222222222222222222222"
ADDRESS: Final = "10.0.0.250"
"""Address of the host, and so of the verifier, in the guest's network."""

_INSTANCE: Final = "web-1"
_ISSUER: Final = "id.cloud.example"
_VERIFIERS: Final = ("bao.example", "keystone.example", "kubernetes.example", "service.example")
_WITHIN_S: Final = 120
_PLACE: Final = re.compile(r"# (in the guest|where .+|on .+)\n")
_ENTER: Final = """
set -eu
mount -t tmpfs -o mode=755 site "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay -o "lowerdir=/etc,upperdir=$1/upper,workdir=$1/work" site /etc
printf '%s' "$3" >/etc/hosts
cat "$4" >>/etc/ssl/certs/ca-certificates.crt
mkdir -p /etc/imdsproxy
mount --bind "$2" /etc/imdsproxy
echo ready
exec sleep infinity
"""


@dataclass(slots=True)
class Site:
    """A world whose daemon signs, and the machines around it.

    Attributes:
        authority: CA that all machines of the site trust.
        directory: Working directory and home of all machines.
        variables: Environment of an administrator of the verifier.
    """

    world: World
    authority: Authority
    directory: Path
    _holder: subprocess.Popen[str]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def guest(self) -> Guest:
        """The guest that is `web-1`, which reaches the host by its bridge."""
        return self.world.guests["blue"]

    @property
    def programs(self) -> Path:
        """Directory of programs that stand before the machine's."""
        return self.directory / "bin"

    def have_guest(self, project: str | None = PROJECT) -> None:
        """Have `web-1` in a project."""
        fields = {} if project is None else {"project": project}
        record = instance("blue-5", "blue", fields={"name": _INSTANCE, **fields})
        assert self.world.daemon.put(instances=[record])["applied"]

    def within(self, namespace: str) -> tuple[str, ...]:
        """Return the words before a command that runs in a namespace, with the site's `/etc`."""
        mounts = f"--mount=/proc/{self._holder.pid}/ns/mnt"
        return ("/usr/bin/nsenter", mounts, f"--net={NETNS / namespace}", "--")

    def run(self, script: str, *, in_guest: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a script on the host, which is the verifier's machine as well, or in the guest."""
        environment = {
            "HOME": str(self.directory / "guest" if in_guest else self.directory),
            "LANG": "C.UTF-8",
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            **({} if in_guest else self.variables),
        }
        namespace = self.guest.namespace if in_guest else self.world.lab.host
        shell = ("bash", "-euo", "pipefail", "-c", f"cd {self.directory}\n{script}")
        return subprocess.run(
            (*self.within(namespace), *shell),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
            timeout=_WITHIN_S * patience(),
        )

    def succeed(self, script: str, *, in_guest: bool = False) -> str:
        """Run a script as `run`, fail unless it succeeds, and return what it prints."""
        done = self.run(script, in_guest=in_guest)
        assert done.returncode == 0, done
        return done.stdout

    def follow(self, page: str, *headings: str) -> None:
        """Run all blocks below headings, and fail unless each goes as the page says."""
        for heading in headings:
            for block in blocks_of(REPOSITORY / "docs/how-to" / page, heading):
                done = self.run(block.script, in_guest=_is_in_guest(block))
                missing = missing_lines(block, done.stdout)
                place = f"{heading}, line {block.line}, without {missing}: {done}"
                assert (done.returncode, missing) == (0, []), place

    def failures(self, page: str) -> list[str]:
        """Return the first cells of the page's table of failures: what a program prints, with `…` for what varies."""
        _, lines = section(REPOSITORY / "docs/how-to" / page, "## If it does not work")
        rows = [line.split("|")[1].strip() for line in lines if line.startswith("| `")]
        return [cell.split("`")[1] for cell in rows]

    def write(self, path: str, text: str) -> None:
        """Write a file below `/etc`."""
        self.succeed(f"mkdir -p $(dirname {path}); cat >{path} <<'SITE'\n{text}SITE")

    def install(self, name: str, script: str) -> None:
        """Have a program before the machine's."""
        program = self.programs / name
        program.write_text(script)
        program.chmod(0o755)

    def close(self) -> None:
        """End the process that holds `/etc`."""
        self._holder.kill()
        self._holder.communicate()


def _is_in_guest(block: Block) -> bool:
    place = _PLACE.match(block.script)
    return place is not None and place[1] == "in the guest"


@contextlib.contextmanager
def open_site(directory: Path, policy: Mapping[str, object] | None = None) -> Iterator[Site]:
    """Open a site that is gone without a trace at the end."""
    section, issuer = identity_settings(directory, name=_ISSUER)
    for name in ("bin", "guest", "etc"):
        (directory / name).mkdir()
    (directory / "bin/imdsproxy").symlink_to(Path(sys.executable).with_name("imdsproxy"))
    with open_world({"identity": section, "policy": policy or {}}) as world:
        (world.daemon.directory / "conf.d").mkdir()
        ip("-n", world.lab.host, "address", "add", f"{ADDRESS}/24", "dev", "blue")
        authority = make_authority(directory, "ca")
        trusted = directory / "trusted.pem"
        trusted.write_text(issuer.ca_file.read_text() + authority.ca_file.read_text())
        names = f"127.0.0.1 localhost {_ISSUER}\n{ADDRESS} {' '.join(_VERIFIERS)}\n"
        words = (str(directory / "etc"), str(world.daemon.directory), names, str(trusted))
        holder = subprocess.Popen(
            (*ends_with_us(), "unshare", "--mount", "sh", "-c", _ENTER, "sh", *words),
            stdout=subprocess.PIPE,
            text=True,
        )
        site = Site(world, authority, directory, holder)
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            yield site
        finally:
            site.close()
