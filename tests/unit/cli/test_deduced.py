"""What `add` takes when flags leave it out, and what it takes over from libvirt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.cli.main import main
from imdsproxy.core.model import (
    Instance,
    InstanceId,
    Network,
    NetworkId,
)
from imdsproxy.errors import SourceUnavailable
from imdsproxy.sources.libvirt.records import NetworkXml
from imdsproxy.sources.libvirt.xml import METADATA_URI
from support.admin_server import AdminServer, admin_server
from support.libvirt_backing import domain_xml, uuid_of
from support.record_builders import port

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGnJ root@host"
MAC = "52:54:00:12:34:56"
NETWORK = (
    "<network><name>default</name><uuid>u</uuid><bridge name='virbr0'/>"
    "<ip address='192.168.122.1' prefix='24'>"
    f"<dhcp><host mac='{MAC}' ip='192.168.122.5'/></dhcp></ip></network>"
)
ELEMENT = (
    f"<i:instance xmlns:i='{METADATA_URI}'><i:hostname>www</i:hostname>"
    "<i:user-data>#!/bin/sh</i:user-data></i:instance>"
)


class Cli:
    def __init__(self, server: AdminServer, capture: pytest.CaptureFixture[str]) -> None:
        self.server = server
        self._capture = capture

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit status, and what was said."""
        status = main(["--socket", str(self.server.socket), *arguments])
        captured = self._capture.readouterr()
        return status, captured.out + captured.err

    def instance(self, name: str) -> Instance:
        return self.server.instances[InstanceId(name)]

    def network(self, name: str) -> Network:
        return self.server.networks[NetworkId(name)]


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    with admin_server(tmp_path) as server:
        yield Cli(server, capsys)


# Networks


@pytest.mark.parametrize(
    ("flag", "name"), [("--bridge", "br0"), ("--interface", "eth1"), ("--namespace", "net-a")]
)
def test_a_network_without_an_id_is_named_by_what_it_is_reached_through(
    cli: Cli, flag: str, name: str
) -> None:
    assert cli("network", "add", flag, name) == (0, f"done: network {name} added\n")
    assert cli.network(name).id == name


# Instances


def test_the_only_network_is_the_one_that_is_meant(cli: Cli) -> None:
    cli("network", "add", "--bridge", "br0")
    assert cli("instance", "add", "web-1", "--mac", MAC) == (0, "done: instance web-1 added\n")
    instance = cli.instance("web-1")
    assert (instance.name, instance.hostname) == ("web-1", "web-1")
    assert instance.ports == (port("br0", mac=MAC),)


def test_without_a_network_it_is_said_how_one_is_added(cli: Cli) -> None:
    status, said = cli("instance", "add", "web-1", "--mac", MAC)
    assert status == 64
    assert "there is no network yet" in said
    assert "imdsproxy network add --bridge" in said


def test_with_several_networks_it_is_said_which_there_are(cli: Cli) -> None:
    cli("network", "add", "--bridge", "br0")
    cli("network", "add", "--bridge", "br1")
    status, said = cli("instance", "add", "web-1", "--address", "10.0.0.5")
    assert status == 64
    assert "there are 2" in said
    assert "br0, br1" in said


def test_set_takes_no_network_for_granted(cli: Cli) -> None:
    cli("network", "add", "--bridge", "br0")
    cli("instance", "add", "web-1")
    status, said = cli("instance", "set", "web-1", "--mac", MAC)
    assert status == 64
    assert "need a --network" in said


def test_an_instance_with_a_name_only_gets_an_id_that_is_made_of_it(cli: Cli) -> None:
    assert cli("instance", "add", "--name", "Web server (1)")[0] == 0
    instance = cli.instance("Web-server-1")
    assert (instance.name, instance.hostname) == ("Web server (1)", "Web-server-1")
    status, said = cli("instance", "add", "--name", "…")
    assert status == 64
    assert "id is missing" in said


def test_a_private_key_is_not_shown_to_guests(cli: Cli, tmp_path: Path) -> None:
    private = tmp_path / "id_ed25519"
    private.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END …")
    status, said = cli("instance", "add", "web-1", "--ssh-key", str(private))
    assert status == 64
    assert "is a private key" in said
    assert f"{private}.pub" in said
    assert not cli.server.instances


# From libvirt


@pytest.fixture
def domains(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What libvirt has, by name."""
    found: dict[str, str] = {}
    monkeypatch.setattr(
        "imdsproxy.cli.from_libvirt.read_domain",
        lambda _uri, name: (found[name], (NetworkXml(NETWORK, active=True),)),
    )
    return found


def test_a_domain_is_taken_over_with_its_uuid_cards_and_metadata(
    cli: Cli, domains: dict[str, str]
) -> None:
    cli("network", "add", "--interface", "virbr0")
    domains["web"] = domain_xml("web", [("network=default", MAC)], ELEMENT)
    assert cli("instance", "add", "--from-libvirt", "web")[0] == 0
    instance = cli.instance(uuid_of("web"))
    assert (instance.name, instance.hostname, instance.user_data) == ("web", "www", b"#!/bin/sh")
    assert instance.ports == (port("virbr0", "192.168.122.5", mac=MAC),)


def test_flags_win_over_the_domain(cli: Cli, domains: dict[str, str], tmp_path: Path) -> None:
    cli("network", "add", "--interface", "virbr0")
    cli("network", "add", "other", "--bridge", "br1")
    domains["web"] = domain_xml("web", [("network=default", MAC)], ELEMENT)
    key = tmp_path / "key.pub"
    key.write_text(KEY)
    added = ("instance", "add", "web-1", "--from-libvirt", "web", "--network", "other")
    assert cli(*added, "--hostname", "mail", "--ssh-key", str(key))[0] == 0
    instance = cli.instance("web-1")
    assert (instance.hostname, instance.user_data) == ("mail", b"#!/bin/sh")
    assert [each.key for each in instance.ssh_keys] == [KEY]
    assert instance.ports == (port("other", "192.168.122.5", mac=MAC),)


def test_a_domain_that_has_changed_is_taken_over_again(cli: Cli, domains: dict[str, str]) -> None:
    cli("network", "add", "--interface", "virbr0")
    domains["web"] = domain_xml("web", [("network=default", MAC)], ELEMENT)
    cli("instance", "add", "--from-libvirt", "web")
    domains["web"] = domains["web"].replace("www", "mail")
    assert cli("instance", "set", "--from-libvirt", "web")[0] == 0
    assert cli.instance(uuid_of("web")).hostname == "mail"


def test_a_network_may_have_libvirts_name_for_it(cli: Cli, domains: dict[str, str]) -> None:
    cli("network", "add", "default", "--namespace", "net-a")
    domains["web"] = domain_xml("web", [("network=default", MAC)])
    assert cli("instance", "add", "web", "--from-libvirt", "web")[0] == 0
    assert cli.instance("web").ports[0].network == "default"


@pytest.mark.parametrize(
    ("interfaces", "element", "arguments", "words"),
    [
        ([("bridge=br7", MAC)], "", [], "imdsproxy network add --bridge br7"),
        ([("network=gone", MAC)], "", [], "no network is reached through gone"),
        ([("user=x", MAC)], "", [], "no network card on a bridge"),
        ([("bridge=virbr0", MAC)] * 2, "", ["--network", "virbr0"], "has 2 network cards"),
        ([("bridge=virbr0", MAC)], "", ["--mac", MAC], "the domain's own MACs"),
        ([("bridge=virbr0", MAC)], ELEMENT.replace("hostname", "nonsense"), [], "unknown element"),
    ],
)
def test_a_domain_that_cannot_be_taken_over_is_told_with_the_reason(
    cli: Cli,
    domains: dict[str, str],
    *,
    interfaces: list[tuple[str, str]],
    element: str,
    arguments: list[str],
    words: str,
) -> None:
    cli("network", "add", "--interface", "virbr0")
    domains["web"] = domain_xml("web", interfaces, element)
    status, said = cli("instance", "add", "--from-libvirt", "web", *arguments)
    assert status == 64
    assert words in said
    assert not cli.server.instances


def test_libvirt_is_asked_where_the_settings_say(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str]] = []

    def read(uri: str, name: str) -> None:
        asked.append((uri, name))
        raise SourceUnavailable("nobody there", hint="start it")

    monkeypatch.setattr("imdsproxy.cli.from_libvirt.read_domain", read)
    settings = tmp_path / "imdsproxy.yaml"
    settings.write_text(json.dumps({"sources": {"libvirt": {"uri": "test:///default"}}}))
    status, said = cli("instance", "add", "--from-libvirt", "web", "--config", str(settings))
    assert (status, asked) == (69, [("test:///default", "web")])
    assert "nobody there" in said
