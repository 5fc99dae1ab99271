"""After ds-identify, cloud-init's data sources look at the SMBIOS once more: with the snippet they believe it."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Final

import pytest

from demo.cloudinit import download
from imdsproxy.core.model import Dialect
from imdsproxy.core.snippets import Target
from imdsproxy.core.snippets.targets import render_snippet
from support.demonstration import REPOSITORY
from support.ds_identify import Machine, write_dmi
from support.snippet_guests import UUID, guest
from support.snippet_text import machine_of

_SCRIPT: Final = """
import json, logging, sys
from cloudinit import dmi
from cloudinit.sources import DataSourceEc2, DataSourceNoCloud, DataSourceOpenStack
dmi.DMI_SYS_PATH = sys.argv[1]
dmi.is_container = lambda: False

def detects(kind):
    source = kind.__new__(kind)
    source.sys_cfg = {"datasource_list": ["OpenStack", "NoCloud", "Ec2", "None"]}
    return source.ds_detect()

seed = {}
DataSourceNoCloud.load_cmdline_data(seed, dmi.read_dmi_data("system-serial-number") or "")
print(json.dumps({
    "openstack": detects(DataSourceOpenStack.DataSourceOpenStack),
    "nocloud": detects(DataSourceNoCloud.DataSourceNoCloudNet),
    "ec2": DataSourceEc2.identify_platform(),
    "seed": seed,
    "uuid": dmi.read_dmi_data("system-uuid"),
}))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cloud-init and what it imports, as packaged."""
    root = tmp_path_factory.mktemp("cloud-init")
    for deb in download(REPOSITORY / ".cache", say=print).glob("*.deb"):
        subprocess.run(["/usr/bin/dpkg-deb", "--extract", deb, root], check=True)
    return root / "usr/lib/python3/dist-packages"


def _believed(machine: Machine, libraries: Path, directory: Path) -> dict[str, object]:
    write_dmi(machine, directory / "dmi")
    ran = subprocess.run(
        ["/usr/bin/python3", "-c", _SCRIPT, directory / "dmi"],
        env={"PYTHONPATH": str(libraries), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told: dict[str, object] = json.loads(ran.stdout)
    return told


@pytest.mark.parametrize(("target", "dialect"), list(itertools.product(Target, Dialect)), ids=str)
def test_the_data_source_believes_the_snippet(
    target: Target, dialect: Dialect, libraries: Path, tmp_path: Path
) -> None:
    machine = machine_of(render_snippet(guest(), target, dialect))

    told = _believed(machine, libraries, tmp_path)

    assert told["openstack"] is (dialect is Dialect.OPENSTACK)
    assert told["nocloud"] is (dialect is Dialect.NOCLOUD)
    # Not "aws": that one insists on session tokens.
    assert told["ec2"] == ("e24cloud" if dialect is Dialect.EC2 else "unknown")
    if dialect is Dialect.NOCLOUD:
        assert told["seed"] == {
            "seedfrom": "http://169.254.169.254/nocloud/",
            "dsmode": "net",
        }
    if target is not Target.INCUS:
        assert told["uuid"] == UUID


def test_without_it_none_does(libraries: Path, tmp_path: Path) -> None:
    told = _believed(Machine(), libraries, tmp_path)

    assert (told["openstack"], told["nocloud"], told["ec2"]) == (False, False, "unknown")
