"""A genuine libvirtd with its drivers for QEMU and networks, in namespaces and directories of its own."""

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from support.lab import until, within
from support.openstack.servers import ends_with_us

_CAPABILITIES: Final = Path(__file__).parents[2] / ".cache" / "libvirt"
"""What libvirtd finds out about QEMU takes ten seconds the first time; it notices when QEMU is another."""

_BOUND: Final = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "run": "/run/libvirt",
}

_UNSHARE: Final = "/usr/bin/unshare"

_SETTINGS: Final = """\
unix_sock_dir = "{home}/socket"
host_uuid = "{uuid}"
auth_unix_ro = "none"
auth_unix_rw = "none"
"""

_QEMU: Final = """\
security_driver = "none"
user = "root"
group = "root"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
remember_owner = 0
"""

# Not every kernel has the action with which old DHCP clients get their checksums; no guest here needs it.
_NO_TC: Final = "#!/bin/sh\nexit 0\n"

_INSIDE: Final = """\
set -e
hostname {hostname}
mount --make-rprivate /
{mounts}
ip link set lo up
export PATH={home}/bin:$PATH
touch {home}/started
while :; do
    while [ -e {home}/stay-down ]; do sleep 0.02; done
    libvirtd --config {home}/libvirtd.conf --pid-file {home}/libvirtd.pid >>{home}/libvirtd.out 2>&1 || :
    sleep 0.1
done
"""


class Libvirtd:
    """What tests do with it.

    Attributes:
        home: Everything of it; `libvirtd.out` has its messages.
    """

    def __init__(self, home: Path, holder: subprocess.Popen[bytes]) -> None:
        self.home = home
        self._holder = holder
        self._connection: Any = None

    @property
    def uri(self) -> str:
        """For who only reads."""
        return f"qemu+unix:///system?socket={self.home}/socket/libvirt-sock-ro"

    @property
    def connection(self) -> Any:
        """A connection that may change things."""
        if self._connection is None or not self._connection.isAlive():
            library = importlib.import_module("libvirt")
            library.registerErrorHandler(lambda *_: None, None)
            address = f"qemu+unix:///system?socket={self.home}/socket/libvirt-sock"
            self._connection = library.open(address)
        return self._connection

    def clear(self) -> None:
        """Take all domains and networks away."""
        for one in (*self.connection.listAllDomains(), *self.connection.listAllNetworks()):
            # What is not persistent is gone once it is destroyed.
            persistent = one.isPersistent()
            if one.isActive():
                one.destroy()
            if persistent:
                one.undefine()

    def stop(self) -> None:
        """End libvirtd; guests and networks go on. It stays down until `start`.

        It gets what systemd sends it: asked to end while it still starts, libvirtd 11 hangs now and then.
        """
        (self.home / "stay-down").touch()
        pid = self.pid
        self.disconnect()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(AssertionError):
                os.kill(pid, number)
                until(lambda: self._find() is None, within_s=3)
                return
        raise AssertionError("libvirtd does not end")

    def start(self) -> None:
        """Have it run again."""
        (self.home / "stay-down").unlink(missing_ok=True)
        try:
            until(self._answers, within_s=30, what="libvirtd answers")
        except AssertionError as error:
            output = (self.home / "libvirtd.out").read_text()[-2000:]
            raise AssertionError(f"{error}: {output}") from error

    @property
    def pid(self) -> int:
        """Of libvirtd."""
        found = self._find()
        assert found is not None, (self.home / "libvirtd.out").read_text()
        return found

    def disconnect(self) -> None:
        """Close the test's own connection."""
        if self._connection is not None:
            with contextlib.suppress(importlib.import_module("libvirt").libvirtError):
                self._connection.close()
            self._connection = None

    def _answers(self) -> bool:
        try:
            return bool(self.connection.getVersion())
        except importlib.import_module("libvirt").libvirtError:
            return False

    def _find(self) -> int | None:
        pending = [self._holder.pid]
        while pending:
            pid = pending.pop()
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip() == "libvirtd":
                    return pid
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
                pending += map(int, children.split())
        return None


@contextlib.contextmanager
def open_libvirtd(
    namespace: str | None = None, scripts: Mapping[str, str] | None = None
) -> Iterator[Libvirtd]:
    """One that has no domain and no network; it, its guests and its networks are gone afterwards.

    Args:
        namespace: Its network namespace; without it one of its own.
        scripts: By place in its directory: those in `bin` are found before all others, `etc/hooks/qemu.d` has hooks.
    """
    # Not below pytest's own directory: a socket's path has 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="imdst-libvirt-"))
    try:
        _lay_out(home, {"bin/tc": _NO_TC, **(scripts or {})})
        mounts = [
            f"mkdir -p {place} && mount --bind {home}/{name} {place}"
            for name, place in _BOUND.items()
        ]
        _CAPABILITIES.mkdir(parents=True, exist_ok=True)
        mounts.append(
            f"mkdir -p /var/cache/libvirt && mount --bind {_CAPABILITIES} /var/cache/libvirt"
        )
        # No guest migrates between two of one name, or UUID. One without a dot would be looked up in DNS.
        script = _INSIDE.format(
            home=home, hostname=f"{uuid.uuid4().hex}.example", mounts="\n".join(mounts)
        )
        own = ["--mount", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child=SIGKILL"]
        where = () if namespace is None else within(namespace)
        own += ["--net"] if namespace is None else []
        with (home / "holder.out").open("wb") as output:
            holder = subprocess.Popen(
                [*ends_with_us(), *where, _UNSHARE, *own, "sh", "-c", script],
                stdout=output,
                stderr=output,
            )
        libvirtd = Libvirtd(home, holder)
        try:
            until(
                lambda: (home / "started").exists() or holder.poll() is not None,
                what="the namespaces are there",
            )
            assert holder.poll() is None, (home / "holder.out").read_text()
            libvirtd.start()
            yield libvirtd
        finally:
            libvirtd.disconnect()
            holder.kill()
            holder.wait()
    finally:
        shutil.rmtree(home)


def _lay_out(home: Path, scripts: Mapping[str, str]) -> None:
    for name in (*_BOUND, "socket", "bin"):
        (home / name).mkdir()
    home.chmod(0o755)
    (home / "libvirtd.conf").write_text(_SETTINGS.format(home=home, uuid=uuid.uuid4()))
    (home / "etc" / "qemu.conf").write_text(_QEMU)
    for place, text in scripts.items():
        path = home / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
