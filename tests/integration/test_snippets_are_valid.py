"""What `imdsproxy snippet` prints for libvirt, against libvirt's own schemas."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from imdsproxy.core.model import Dialect, InterfaceListener, NamespaceListener
from imdsproxy.core.snippets import Snippet, Target
from imdsproxy.core.snippets.targets import render_snippet, render_text
from support.debian_files import unpacked
from support.snippet_guests import guest, network, nic
from support.snippet_text import qemu_arguments

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


def _pieces(snippet: Snippet) -> dict[str, str]:
    tree = ET.fromstring(f"<all>{render_text(snippet)}</all>")  # noqa: S314 - our own
    pieces: dict[str, str] = {}
    for child in tree:
        name = child.tag.rpartition("}")[2]
        pieces[name] = pieces.get(name, "") + ET.tostring(child, encoding="unicode")
    return pieces


def _validate(text: str, schema: str, directory: Path) -> str:
    document = directory / f"{schema}.xml"
    document.write_text(text)
    rng = unpacked("libvirt-common") / "usr/share/libvirt/schemas" / f"{schema}.rng"
    ran = subprocess.run(
        ["/usr/bin/xmllint", "--noout", "--relaxng", rng, document],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return "" if ran.returncode == 0 else ran.stderr


@pytest.mark.parametrize(
    ("dialect", "listener"),
    list(
        itertools.product(
            Dialect, (None, InterfaceListener("virbr0"), NamespaceListener("qdhcp-1"))
        )
    ),
    ids=str,
)
def test_libvirt_would_take_the_domain_and_the_network(
    dialect: Dialect, listener: InterfaceListener | NamespaceListener | None, tmp_path: Path
) -> None:
    card = nic(network(listener))
    pieces = _pieces(render_snippet(guest(card, nic(mac=None)), Target.LIBVIRT, dialect))
    domain = _DOMAIN.format(
        outside=pieces["sysinfo"] + pieces["uuid"],
        smbios=pieces["smbios"],
        devices=pieces["interface"],
    )

    assert _validate(domain, "domain", tmp_path) == ""


def test_the_schema_would_say_no_to_anything_else(tmp_path: Path) -> None:
    pieces = _pieces(render_snippet(guest(), Target.LIBVIRT, Dialect.OPENSTACK))
    misplaced = _DOMAIN.format(outside=pieces["smbios"], smbios="", devices="")

    assert "fails to validate" in _validate(misplaced, "domain", tmp_path)


def test_libvirt_would_take_the_route_into_its_network(tmp_path: Path) -> None:
    isolated = guest(nic(network(gateway=None)))
    pieces = _pieces(render_snippet(isolated, Target.LIBVIRT, Dialect.OPENSTACK))

    assert _validate(_NETWORK.format(options=pieces["options"]), "network", tmp_path) == ""


@pytest.mark.parametrize("target", [one for one in Target if one is not Target.LIBVIRT])
@pytest.mark.parametrize("dialect", list(Dialect))
def test_qemu_starts_with_the_smbios_that_is_printed(target: Target, dialect: Dialect) -> None:
    arguments = iter(qemu_arguments(render_snippet(guest(), target, dialect)))
    smbios = [word for one in arguments if one == "-smbios" for word in (one, next(arguments))]
    machine = ["-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S"]

    ran = subprocess.run(
        ["/usr/bin/qemu-system-x86_64", *machine, "-monitor", "stdio", *smbios],
        input="quit\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert len(smbios) == 4
    assert (ran.returncode, ran.stderr) == (0, "")
