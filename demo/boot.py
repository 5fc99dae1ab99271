"""A guest's boot: cloud-init's four stages in its namespaces and a throw-away root.

cloud-init itself, its endpoints and its HTTP client are as packaged. A drop-in says which one
data source to use (what a cloud's image says) and names the modules to run, because the others
would want disks, users and a package manager.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from demo.processes import CommandError, inside, run
from demo.reading import Dialect
from demo.roster import PROOF, Guest

__all__ = ["Boot", "boot", "judge_boot", "render_drop_in"]

_SCRIPT: Final = Path(__file__).parent / "guest-boot.sh"
_TIMEOUT_S: Final = 60.0
_SOURCES: Final = {
    Dialect.EC2: "Ec2",
    Dialect.OPENSTACK: "OpenStack",
    Dialect.NOCLOUD: "NoCloud",
}
_ACCOUNTS: Final = """\
root:x:0:0:root:/root:/bin/sh
systemd-network:x:998:998::/:/usr/sbin/nologin
nobody:x:65534:65534::/:/usr/sbin/nologin
"""
_GROUPS: Final = """\
root:x:0:
systemd-network:x:998:
nogroup:x:65534:
"""


@dataclass(frozen=True, slots=True)
class Boot:
    """What a boot by one data source left in the guest's root.

    Attributes:
        failure: Why the stages did not end well, or empty.
        user_data_sha256: Of the user-data as cloud-init stored it, or `None`.
        written: What the user-data wrote, or `None`.
        network: The network configuration that cloud-init rendered, all of its files.
    """

    seconds: float
    failure: str
    datasource: str = ""
    instance_id: str = ""
    hostname: str = ""
    user_data_sha256: str | None = None
    written: str | None = None
    authorized_keys: str = ""
    network: str = ""


def render_drop_in(dialect: Dialect) -> str:
    """The file for `/etc/cloud/cloud.cfg.d` (JSON is YAML too)."""
    return json.dumps(
        {
            "datasource_list": [_SOURCES[dialect]],
            "datasource": {
                "Ec2": {"strict_id": False},
                "NoCloud": {"seedfrom": "http://169.254.169.254/nocloud/"},
            },
            "system_info": {"network": {"renderers": ["networkd"]}},
            "users": [],
            "disable_root": False,
            "ssh_genkeytypes": [],
            "cloud_init_modules": ["write_files", "set_hostname", "ssh"],
            "cloud_config_modules": [],
            "cloud_final_modules": ["scripts_user", "final_message"],
        },
        indent=1,
    )


def boot(guest: Guest, dialect: Dialect, *, unpacked: Path, directory: Path) -> Boot:
    """Boots the guest once; its root stays below `directory` to be looked at.

    Files below `layer/usr` in it lie over the machine's.
    """
    root = directory / f"{guest.name}.{dialect}"
    shutil.rmtree(root, ignore_errors=True)
    _lay(root, dialect, unpacked)
    argv = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL"]
    layer = directory / "layer" / "usr"
    layer.mkdir(parents=True, exist_ok=True)
    argv += ["sh", str(_SCRIPT), str(root), str(layer), str(unpacked)]
    begin = time.monotonic()
    try:
        output = run(inside(guest.netns, argv), timeout_s=_TIMEOUT_S, must_succeed=False)
    except CommandError:
        return Boot(time.monotonic() - begin, f"no end after {_TIMEOUT_S:g} s")
    seconds = time.monotonic() - begin
    (root / "console").write_text(f"{output.out.decode(errors='replace')}\n{output.err}\n")
    failure = "" if output.status == 0 else f"cloud-init ended with {output.status}"
    return _inspect(root, seconds, failure)


def _lay(root: Path, dialect: Dialect, unpacked: Path) -> None:
    etc = root / "etc"
    shutil.copytree(unpacked / "etc" / "cloud", etc / "cloud", symlinks=True)
    (etc / "cloud" / "cloud.cfg.d" / "99-demo.cfg").write_text(render_drop_in(dialect))
    (etc / "passwd").write_text(_ACCOUNTS)
    (etc / "group").write_text(_GROUPS)
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    (etc / "hosts").write_text("127.0.0.1 localhost\n")
    (etc / "os-release").symlink_to("../usr/lib/os-release")
    certificates = Path("ssl/certs/ca-certificates.crt")
    (etc / certificates).parent.mkdir(parents=True)
    shutil.copyfile(Path("/etc") / certificates, etc / certificates)
    shutil.copyfile("/etc/ld.so.cache", etc / "ld.so.cache")


def _inspect(root: Path, seconds: float, failure: str) -> Boot:
    cloud = root / "var" / "lib" / "cloud"
    instance_id = _text(cloud / "data" / "instance-id").strip()
    stored = cloud / "instances" / instance_id / "user-data.txt"
    written = root / PROOF.lstrip("/")
    result: dict[str, dict[str, object]] = json.loads(_text(root / "proof" / "result.json") or "{}")
    told = result.get("v1", {})
    if not failure and told.get("errors"):
        failure = f"cloud-init reports {told['errors']}"
    return Boot(
        seconds=seconds,
        failure=failure,
        datasource=str(told.get("datasource", "")),
        instance_id=instance_id,
        hostname=_text(root / "proof" / "hostname").strip(),
        user_data_sha256=(
            hashlib.sha256(stored.read_bytes()).hexdigest() if stored.is_file() else None
        ),
        written=written.read_text() if written.is_file() else None,
        authorized_keys=_text(root / "root" / ".ssh" / "authorized_keys"),
        network="".join(map(_text, sorted((root / "etc/systemd/network").glob("*.network")))),
    )


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def judge_boot(guest: Guest, dialect: Dialect, boot: Boot) -> list[str]:
    """Everything about the boot that is not as it must be."""
    if boot.failure:
        return [boot.failure]
    return list(_boot_faults(guest, dialect, boot))


def _boot_faults(guest: Guest, dialect: Dialect, boot: Boot) -> Iterator[str]:
    own_id = guest.instance_id if dialect is Dialect.EC2 else guest.uuid
    if not boot.datasource.startswith(f"DataSource{_SOURCES[dialect]}"):
        yield f"cloud-init took {boot.datasource or 'no data source'}"
    if boot.instance_id != own_id:
        yield f"cloud-init's instance id is {boot.instance_id}"
    if boot.hostname != guest.hostname.partition(".")[0]:
        yield f"cloud-init set the hostname {boot.hostname}"
    if boot.user_data_sha256 != guest.user_data_sha256:
        yield "cloud-init stored other user-data"
    if boot.written != guest.written:
        yield f"the user-data wrote {boot.written!r}"
    for key in guest.ssh_keys:
        if key not in boot.authorized_keys:
            yield "cloud-init did not authorize the SSH key"
    if guest.mac not in boot.network.lower():
        yield "cloud-init configured another network device"
