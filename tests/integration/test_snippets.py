"""What `imdsproxy snippet` prints, looked at by cloud-init, libvirt's schemas and QEMU themselves.

What it prints for dnsmasq is tried in test_packet_paths.py.
"""

import itertools
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import pytest

from demo.cloudinit import download
from imdsproxy.model.entities import Dialect, InterfaceListener, NamespaceListener
from imdsproxy.tools.snippets import HINTS, Target
from support.demonstration import REPOSITORY
from support.ds_identify import Machine, identify, write_dmi
from support.packages import unpacked
from support.snippets import (
    MAC,
    UUID,
    Snippet,
    container_of,
    machine_of,
    network,
    qemu_arguments,
    snippet,
)


def _run(*argv: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, **options)


# What ds-identify finds

_AMAZON: Final = ("ec2e1916-9099-4caf-8d21-012345abcdef", "45e12aec-dcd1-4213-94ed-012345abcdef")
_EVERY: Final = list(itertools.product(Target, Dialect))


def _machines() -> Iterator[tuple[str, Machine, list[str]]]:
    """Machines without a snippet and with one, and what each asks for."""
    yield "none", Machine(), []
    yield "container-none", Machine(virtualization="container:lxc"), []
    for uuid in _AMAZON:
        yield f"none-{uuid}", Machine({"product_uuid": uuid}), ["ec2"]
    for dialect in Dialect:
        kernel = f"root=/dev/vda1 {HINTS[dialect].kernel} quiet"
        yield f"kernel-{dialect}", Machine(kernel=kernel), [dialect]
        yield f"container-{dialect}", container_of(snippet(Target.INCUS, dialect)), [dialect]
    for (target, dialect), uuid in itertools.product(_EVERY, (UUID, *_AMAZON)):
        machine = machine_of(snippet(target, dialect, uuid=uuid))
        yield f"{target}-{dialect}-{uuid}", machine, [dialect]


@pytest.mark.parametrize(
    ("machine", "asked"),
    [pytest.param(machine, asked, id=name) for name, machine, asked in _machines()],
)
def test_a_machine_asks_for_the_dialect_of_its_snippet_and_for_no_other(
    machine: Machine, asked: list[str], tmp_path: Path
) -> None:
    assert [one.lower() for one in identify(machine, tmp_path)] == asked


@pytest.mark.parametrize("dialect", [Dialect.NOCLOUD, Dialect.OPENSTACK])
def test_an_image_that_incus_seeds_takes_nocloud_which_is_the_default_there(
    dialect: Dialect, tmp_path: Path
) -> None:
    machine = replace(machine_of(snippet(Target.INCUS, dialect)), seeded=True)
    assert identify(machine, tmp_path)[0] == "NoCloud"


# Believed: the data sources look at the SMBIOS once more

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


@pytest.mark.parametrize("shown", [None, *_EVERY], ids=str)
def test_only_the_data_source_of_the_snippet_believes_it(
    shown: tuple[Target, Dialect] | None, libraries: Path, tmp_path: Path
) -> None:
    machine = Machine() if shown is None else machine_of(snippet(*shown))
    write_dmi(machine, tmp_path / "dmi")
    environment = {"PYTHONPATH": str(libraries), "PYTHONDONTWRITEBYTECODE": "1"}
    ran = _run("/usr/bin/python3", "-c", _SCRIPT, tmp_path / "dmi", env=environment)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)

    target, dialect = shown or (None, None)
    assert seen["openstack"] is (dialect is Dialect.OPENSTACK)
    assert seen["nocloud"] is (dialect is Dialect.NOCLOUD)
    # Not "aws": that one insists on session tokens.
    assert seen["ec2"] == ("e24cloud" if dialect is Dialect.EC2 else "unknown")
    if dialect is Dialect.NOCLOUD:
        assert seen["seed"] == {"seedfrom": "http://169.254.169.254/nocloud/", "dsmode": "net"}
    if target not in (None, Target.INCUS):
        assert seen["uuid"] == UUID


# Valid

_DOMAIN = """\
<domain type='qemu'>
  <name>web-1</name>
  {outside}
  <memory unit='MiB'>512</memory>
  <os><type arch='x86_64'>hvm</type>{smbios}</os>
  <devices>{devices}</devices>
</domain>
"""
_NETWORK = "<network><name>lan</name><bridge name='br0'/>{options}</network>"


def _pieces(printed: Snippet) -> dict[str, str]:
    tree = ET.fromstring(f"<all>{printed.text}</all>")  # noqa: S314 - our own
    pieces: dict[str, str] = {}
    for child in tree:
        name = child.tag.rpartition("}")[2]
        pieces[name] = pieces.get(name, "") + ET.tostring(child, encoding="unicode")
    return pieces


def _validate(text: str, schema: str, directory: Path) -> str:
    document = directory / f"{schema}.xml"
    document.write_text(text)
    rng = unpacked("libvirt-common") / "usr/share/libvirt/schemas" / f"{schema}.rng"
    ran = _run("/usr/bin/xmllint", "--noout", "--relaxng", rng, document)
    return "" if ran.returncode == 0 else ran.stderr


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize(
    "listener", [None, InterfaceListener("virbr0"), NamespaceListener("qdhcp-1")], ids=str
)
def test_libvirt_would_take_the_domain_and_the_network(
    dialect: Dialect, listener: InterfaceListener | NamespaceListener | None, tmp_path: Path
) -> None:
    pieces = _pieces(snippet(Target.LIBVIRT, dialect, network(listener), macs=[MAC, None]))
    domain = _DOMAIN.format(
        outside=pieces["sysinfo"] + pieces["uuid"],
        smbios=pieces["smbios"],
        devices=pieces["interface"],
    )
    options = _NETWORK.format(options=pieces.get("options", ""))

    assert _validate(domain, "domain", tmp_path) == ""
    assert _validate(options, "network", tmp_path) == ""
    assert ("options" in pieces) is isinstance(listener, InterfaceListener)


def test_the_schema_would_say_no_to_anything_else(tmp_path: Path) -> None:
    pieces = _pieces(snippet(Target.LIBVIRT, Dialect.OPENSTACK))
    misplaced = _DOMAIN.format(outside=pieces["smbios"], smbios="", devices="")

    assert "fails to validate" in _validate(misplaced, "domain", tmp_path)


@pytest.mark.parametrize("target", [one for one in Target if one is not Target.LIBVIRT])
@pytest.mark.parametrize("dialect", list(Dialect))
def test_qemu_starts_with_the_smbios_that_is_printed(target: Target, dialect: Dialect) -> None:
    arguments = iter(qemu_arguments(snippet(target, dialect)))
    smbios = [word for one in arguments if one == "-smbios" for word in (one, next(arguments))]
    machine = ["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S"]

    ran = _run(
        "/usr/bin/qemu-system-x86_64", *machine, "-monitor", "stdio", *smbios, input="quit\n"
    )

    assert len(smbios) == 4
    assert (ran.returncode, ran.stderr) == (0, "")
