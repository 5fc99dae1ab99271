"""What docs/how-to/libvirt.md has operators write, against a genuine libvirtd."""

import os
import re
import subprocess
from collections.abc import Iterator
from typing import Final

import pytest

from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.model.entities import Instance
from imdsproxy.sources.libvirt.records import LibvirtKnown
from imdsproxy.sources.libvirt.xml import parse_domain
from support.demonstration import REPOSITORY
from support.libvirt_backing import domain_xml, uuid_of
from support.libvirt_daemon import Libvirtd

_PAGE: Final = (REPOSITORY / "docs/how-to/libvirt.md").read_text()
_BLOCKS: Final = re.findall(r"(?:^    .*\n|^\n(?=    ))+", _PAGE, re.MULTILINE)


def block(begins: str) -> str:
    """The one block with a line that begins so, without its indentation."""
    (found,) = (
        each for each in _BLOCKS if re.search(rf"^    {re.escape(begins)}", each, re.MULTILINE)
    )
    return re.sub(r"^    ", "", found, flags=re.MULTILINE).strip("\n") + "\n"


@pytest.fixture
def web(libvirtd: Libvirtd) -> Iterator[Libvirtd]:
    libvirtd.connection.defineXML(domain_xml("web-1", [("bridge=br0", "52:54:00:00:00:05")]))
    yield libvirtd
    libvirtd.clear()


def instance_of(libvirtd: Libvirtd) -> Instance:
    known = LibvirtKnown()
    text = libvirtd.connection.lookupByName("web-1").XMLDesc(0)
    known.update({uuid_of("web-1"): parse_domain(text)}, [])
    assert not known.problems
    (instance,) = known.records.instances.values()
    return instance


def test_the_settings_are_good_ones() -> None:
    assert Settings.model_validate(
        parse_yaml(block("sources:"), "page").value
    ).sources.libvirt.enabled


@pytest.mark.root
def test_the_element_of_the_page_is_understood(web: Libvirtd) -> None:
    text = domain_xml("web-1", [("bridge=br0", "52:54:00:00:00:05")])
    text = text.replace("<metadata></metadata>", block("<metadata>"))
    web.connection.defineXML(text)
    instance = instance_of(web)
    assert instance.hostname == "www.example.org"
    assert [key.name for key in instance.ssh_keys] == ["you@laptop"]
    assert instance.user_data == b"#cloud-config\npackages: [nginx]\n"


@pytest.mark.root
def test_the_command_without_an_editor_does_what_it_says(web: Libvirtd) -> None:
    address = f"qemu+unix:///system?socket={web.home}/socket/libvirt-sock"
    subprocess.run(  # noqa: S602 - the page's own words, which a shell reads
        block("virsh metadata"),
        shell=True,
        check=True,
        env={**os.environ, "LIBVIRT_DEFAULT_URI": address},
        timeout=30,
    )
    instance = instance_of(web)
    assert instance.hostname == "www"
    assert instance.user_data == b"#!/bin/sh\n"
