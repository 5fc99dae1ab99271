"""A real systemd as the first process of namespaces of its own, over a throw-away copy of this host's files.

Its root is an overlay, its /run, /dev and network are its own, and its control group is a child of ours: what
is installed, started or broken in it is gone with it. Ending its first process ends all of it.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from support.demonstration import REPOSITORY
from support.lab import until
from support.openstack.servers import ends_with_us
from support.patience import patience

BOOT_DEADLINE_S: Final = 40.0
_INIT: Final = "/usr/lib/systemd/systemd"

# Runs as process 1 of the new namespaces; everything it mounts goes with them.
_SET_UP: Final = r"""
set -eu
work=$1 python=$2 repository=$3 propagation=$4 group=$5 lower=$6 changes=$7
# The control group named here becomes the root of the machine's own hierarchy.
mount --make-rprivate /
mkdir "$work/groups"
mount -t cgroup2 none "$work/groups"
mkdir "$work/groups/$group"
echo $$ >"$work/groups/$group/cgroup.procs"
exec unshare --cgroup sh -eu -c '
work=$1 python=$2 repository=$3 propagation=$4 lower=$5 changes=$6
mount -t tmpfs none "$work"
mkdir "$work/upper" "$work/work" "$work/root" "$work/proc"
root=$work/root
[ -z "$changes" ] || tar --extract --xattrs --xattrs-include="*" --file "$changes" --directory "$work/upper"
mount -t overlay none -o "lowerdir=$lower,upperdir=$work/upper,workdir=$work/work" "$root"
mount -t tmpfs -o mode=755 none "$root/run"
mount -t tmpfs -o mode=1777 none "$root/tmp"
for path in "$repository" "$python"; do
    # The system'"'"'s own Python is in the overlay, which must stay writable there.
    case $path in /usr | /usr/local) continue ;; esac
    # As they are now: a file that changes below an overlay need not show in it.
    mkdir -p "$root$path"
    mount --bind "$path" "$root$path"
    mount -o remount,bind,ro "$root$path"
done
mount -t proc none "$root/proc"
# Kernel settings belong to the whole computer; those of the network are the namespace'"'"'s own.
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t proc none "$work/proc"
mount --bind "$work/proc/sys/net" "$root/proc/sys/net"
mount -t sysfs -o ro none "$root/sys"
mount -t cgroup2 none "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 none "$root/dev"
for device in null zero full random urandom tty; do cp -a "/dev/$device" "$root/dev/$device"; done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 none "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
for unit in systemd-sysctl systemd-udevd systemd-random-seed systemd-timesyncd systemd-modules-load \
    systemd-journal-catalog-update systemd-journal-flush systemd-update-done ldconfig networking; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit.service"
done
# RabbitMQ brings this one, and basic.target starts all sockets.
ln -sf /dev/null "$root/etc/systemd/system/epmd.socket"
for unit in dev-hugepages dev-mqueue sys-kernel-debug sys-kernel-tracing sys-fs-fuse-connections; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit.mount"
done
rm -rf "$root/etc/imdsproxy" "$root/var/lib/imdsproxy" "$root/var/lib/imdsproxy-hub" "$root/var/log/journal"
printf "[Unit]\nRequires=basic.target\nAfter=basic.target\n" >"$root/etc/systemd/system/imdst.target"
ip link set lo up
cd "$root"
mkdir -p .host
pivot_root . .host
# For `save_changes`.
mount --bind "/.host$work/upper" /mnt
umount -l /.host
mount "--make-r$propagation" /
exec env -i container=imdst PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 INIT --system --unit=imdst.target --show-status=no --log-target=journal
' sh "$work" "$python" "$repository" "$propagation" "$lower" "$changes"
""".replace("INIT", _INIT)


@dataclass(slots=True)
class Machine:
    """A booted systemd.

    Attributes:
        init: The pid of its first process, as this host sees it.
    """

    init: int
    _journal_from: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """Its root directory, seen from this host."""
        return Path(f"/proc/{self.init}/root")

    def arguments(self, *command: str) -> list[str]:
        """The command line that runs a command inside."""
        enter = f"--target={self.init}"
        environment = (
            "env",
            "-i",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
            "LANG=C.UTF-8",
        )
        kinds = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wdns=/")
        return ["/usr/bin/nsenter", enter, *kinds, "--", *environment, *command]

    def attempt(
        self, *command: str, text: str | None = None, within_s: float = 100
    ) -> tuple[int, str]:
        """Run a command inside: its exit status, and all that it printed."""
        done = subprocess.run(
            self.arguments(*command),
            input=text,
            stdin=None if text is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=within_s * patience(),
            check=False,
        )
        return done.returncode, done.stdout

    def run(self, *command: str, text: str | None = None) -> str:
        """Run a command inside that must succeed; what it printed."""
        status, output = self.attempt(*command, text=text)
        assert status == 0, f"{' '.join(command)} ended with {status}:\n{output}"
        return output.strip()

    def write(self, path: str, text: str) -> None:
        """Write a file inside."""
        self.run("mkdir", "-p", str(Path(path).parent))
        self.run("tee", path, text=text)

    def unit(self, name: str, what: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={what}", name)

    def main_pid(self, name: str) -> int:
        """A unit's main process, as the machine counts; 0 when it has none."""
        return int(self.unit(name, "MainPID"))

    def journal(self, *units: str, options: Sequence[str] = ("--output=short-precise",)) -> str:
        """What units have logged, or the whole machine, since `forget_journal`."""
        chosen = [f"--unit={unit}" for unit in units]
        return self.run("journalctl", "--no-pager", *self._journal_from, *options, *chosen)

    def save_changes(self, target: Path) -> None:
        """Write all that has changed in its files into an archive, for `systemd_machine`."""
        options = ("--create", "--xattrs", "--xattrs-include=*", "--directory=/mnt", ".")
        with target.open("wb") as sink:
            subprocess.run(self.arguments("tar", *options), stdout=sink, check=True, timeout=100)

    def forget_journal(self) -> None:
        """Have `journal` show only what is logged from now on."""
        self.run("journalctl", "--sync")
        last = self.run("journalctl", "--lines=0", "--show-cursor", "--quiet")
        self._journal_from = (f"--after-cursor={last.partition('cursor: ')[2].strip()}",)


@contextlib.contextmanager
def systemd_machine(
    work: Path,
    *,
    propagation: Literal["shared", "private"] = "shared",
    lower: Path = Path("/"),
    changes: Path | None = None,
) -> Iterator[Machine]:
    """Boot it; it is gone at the end.

    Args:
        work: An empty directory; stays empty on this host.
        propagation: How its mounts are: `shared`, as systemd makes them on a host, or `private`, as
            they may be in a container, where it leaves them as they are.
        lower: The tree that its root is a throw-away copy of; this host's own without it.
        changes: What another machine has saved of its files: this one has them from the beginning.
    """
    group = f"imdst-{secrets.token_hex(4)}"
    output = work.parent / f"{group}.out"
    namespaces = ("--pid", "--mount", "--uts", "--ipc", "--net", "--fork", "--kill-child")
    with output.open("wb") as sink:
        outer = subprocess.Popen(
            [
                *(*ends_with_us(), "/usr/bin/unshare", *namespaces, "/bin/sh", "-c", _SET_UP, "sh"),
                *(str(work), sys.base_prefix, str(REPOSITORY), propagation, group, str(lower)),
                "" if changes is None else str(changes),
            ],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    machine: Machine | None = None
    try:
        init = _wait_for_init(outer, output)
        machine = Machine(init)
        until(
            lambda: _settled(machine, outer, output),
            within_s=BOOT_DEADLINE_S,
            what="systemd's boot",
        )
        yield machine
    finally:
        if machine is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(machine.init, signal.SIGKILL)
        outer.kill()
        outer.wait()
        _remove_group(work, group)
        output.unlink()


def _wait_for_init(outer: subprocess.Popen[bytes], output: Path) -> int:
    found: list[int] = []

    def executed() -> bool:
        assert outer.poll() is None, f"no machine: {output.read_text(errors='replace')}"
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        found[:] = [
            int(pid) for pid in children if Path(f"/proc/{pid}/exe").readlink() == Path(_INIT)
        ]
        return bool(found)

    until(executed, within_s=BOOT_DEADLINE_S, what="systemd's start")
    return found[0]


def _settled(machine: Machine, outer: subprocess.Popen[bytes], output: Path) -> bool:
    assert outer.poll() is None, f"the machine ended: {output.read_text(errors='replace')}"
    status, words = machine.attempt("systemctl", "is-active", "imdst.target")
    return status == 0 and words.strip() == "active"


def _remove_group(work: Path, group: str) -> None:
    """Remove the machine's control groups; the kernel lets go of the last process a moment after its end."""
    script = """
set -eu
mkdir -p "$1/groups"
mount -t cgroup2 none "$1/groups"
[ ! -d "$1/groups/$2" ] || find "$1/groups/$2" -depth -type d -exec rmdir {} +
"""
    command = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", script, "sh", str(work), group]

    def removed() -> bool:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    until(removed, within_s=10, what=f"the end of control group {group}")
    (work / "groups").rmdir()
