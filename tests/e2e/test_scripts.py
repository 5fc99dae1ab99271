"""The scripts say in one line what is missing, and do nothing more."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from support.demonstration import REPOSITORY
from support.patience import patience

NEED_ROOT = ("demo", "test", "bench", "vm-image", "test-images", "container", "try-package")


def run(argv: list[str], **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=60 * patience(),
        check=False,
        env={**os.environ, **environment},
        cwd=REPOSITORY,
    )
    return done.returncode, done.stdout + done.stderr


def library(call: str, *arguments: str) -> tuple[int, str]:
    return run(["bash", "-c", f'. script/lib.sh; {call} "$@"', "script/x", *arguments])


@pytest.mark.root
@pytest.mark.parametrize("name", NEED_ROOT)
def test_without_root_a_script_says_so_in_one_line(name: str) -> None:
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    status, output = run([*other, "bash", f"script/{name}"])

    assert status == 1
    assert output == f"script/{name} needs root: run it with sudo\n"


@pytest.mark.root
@pytest.mark.parametrize(
    "name", [*NEED_ROOT, "setup", "check", "openstack-lab", "package", "release"]
)
def test_on_an_unknown_system_a_script_says_so_in_one_line(name: str, tmp_path: Path) -> None:
    release = tmp_path / "os-release"
    release.write_text('ID=fedora\nPRETTY_NAME="Fedora Linux 41"\n')
    inner = f'mount --bind {release} /etc/os-release && exec bash "$0"'
    status, output = run(["unshare", "--mount", "sh", "-c", inner, f"script/{name}"])

    assert status == 1
    assert output == (
        f"script/{name} needs Debian 13 or a relative with apt-get: this is Fedora Linux 41\n"
    )


@pytest.mark.root
@pytest.mark.parametrize("name", ["demo", "setup"])
def test_an_old_haproxy_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    old = tmp_path / "haproxy"
    old.write_text("#!/bin/sh\necho 'HAProxy version 2.8.16-0 2024/12/31 - https://haproxy.org/'\n")
    old.chmod(0o755)
    status, output = run([f"script/{name}"], PATH=f"{tmp_path}:{os.environ['PATH']}")

    assert status == 1
    assert output == (
        f"script/{name} needs HAProxy 3.0 or later (Debian 13 has it): found 2.8.16-0\n"
    )


def test_only_haproxy_3_and_later_is_enough() -> None:
    versions = (
        "3.0.11-1+deb13u5",
        "3.2-dev4",
        "1:10.1",
        "2.9.99",
        "2.6.12-1+deb12u1",
        "",
        "(none)",
    )
    enough = [one for one in versions if library("haproxy_at_least_3", one)[0] == 0]
    assert enough == ["3.0.11-1+deb13u5", "3.2-dev4", "1:10.1"]


def test_a_virtual_environment_of_another_work_tree_is_not_taken_for_the_own_one(
    tmp_path: Path,
) -> None:
    own = REPOSITORY / ".venv"
    (tmp_path / "copied").mkdir()
    shutil.copy(own / "pyvenv.cfg", tmp_path / "copied")
    (tmp_path / "linked").symlink_to(own)
    places = (own, *(tmp_path / name for name in ("copied", "linked", "none")))
    assert [one for one in places if library(f"venv={one}; own_venv")[0] == 0] == [own]


@pytest.mark.root
@pytest.mark.parametrize("policy", [None, "#!/bin/sh\n# the host's own\n"])
def test_a_package_is_installed_without_its_service(tmp_path: Path, policy: str | None) -> None:
    """With apt-get replaced by one that reports which policy it would find, over /usr/sbin as it is."""
    upper, work, seen = (tmp_path / name for name in ("upper", "work", "seen"))
    own, apt = upper / "policy-rc.d", tmp_path / "bin/apt-get"
    for directory in (upper, work, apt.parent):
        directory.mkdir()
    apt.write_text(
        '#!/bin/sh\ncase "$*" in *install*) /usr/sbin/policy-rc.d haproxy start; echo $? >"$SEEN";'
        " esac\n"
    )
    apt.chmod(0o755)
    if policy is not None:
        own.write_text(policy)
    mount = f"mount -t overlay -o lowerdir=/usr/sbin,upperdir={upper},workdir={work} none /usr/sbin"
    script = f". script/lib.sh; cache={tmp_path}; setup_log={tmp_path}/log; apt_install nothing"
    status, output = run(
        ["unshare", "--mount", "sh", "-c", f'{mount} && exec bash -c "$0" script/x', script],
        PATH=f"{apt.parent}:{os.environ['PATH']}",
        SEEN=str(seen),
    )

    assert status == 0, output
    assert seen.read_text().strip() == "101"
    assert (own.read_text() if own.is_file() else None) == policy


@pytest.mark.root
def test_a_second_set_up_is_quick_and_two_at_once_do_not_collide() -> None:
    assert run(["script/setup"])[0] == 0

    begin = time.monotonic()
    both = [
        subprocess.Popen(
            [str(REPOSITORY / "script" / "setup")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert [process.wait(60) for process in both] == [0, 0]
    assert time.monotonic() - begin < 10 * patience()
