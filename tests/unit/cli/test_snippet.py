"""`imdsproxy snippet` against the admin API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from imdsproxy.cli import snippet
from imdsproxy.cli.main import main
from support.admin_server import AdminServer, admin_server

MAC = "52:54:00:12:34:56"
SUBNET = "10.0.0.0/24,gateway=10.0.0.1"


@dataclass
class Cli:
    server: AdminServer
    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        status = main(["--socket", str(self.server.socket), *arguments])
        captured = self.capture.readouterr()
        return status, captured.out, captured.err


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    with admin_server(tmp_path) as server:
        cli = Cli(server, capsys)
        cli("network", "add", "lan", "--bridge", "br0", "--subnet", SUBNET)
        added = cli("instance", "add", "web-1", "--network", "lan", "--mac", MAC)
        assert added[0] == 0
        yield cli


def test_a_snippet_is_made_of_the_daemons_record(cli: Cli) -> None:
    status, out, _ = cli("snippet", "web-1", "--for", "qemu")

    assert status == 0
    assert "product=OpenStack Nova" in out
    assert f"mac={MAC}" in out
    assert "no route is needed" in out
    uuid = json.loads(cli("instance", "show", "web-1", "--json")[1])["uuid"]
    assert f"uuid={uuid}" in out


def test_no_route_is_wanted_where_this_host_is_the_gateway(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("network", "add", "nat", "--interface", "virbr0", "--subnet", SUBNET)
    cli("instance", "add", "local", "--network", "nat", "--address", "10.0.0.9")
    assert "dhcp-option" in cli("snippet", "local", "--for", "qemu")[1]

    monkeypatch.setattr(snippet, "_host_has", lambda address: str(address) == "10.0.0.1")

    assert "no route is needed" in cli("snippet", "local", "--for", "qemu")[1]


def test_an_address_is_the_hosts_own_if_it_can_be_bound() -> None:
    assert snippet._host_has(ip_address("127.0.0.1"))
    assert snippet._host_has(ip_address("::1"))
    assert not snippet._host_has(ip_address("192.0.2.1"))


def test_programs_get_the_parts(cli: Cli) -> None:
    shape = json.loads(cli("snippet", "web-1", "--for", "incus", "--json")[1])

    assert (shape["instance"], shape["for"], shape["dialect"]) == ("web-1", "incus", "nocloud")
    kinds = {part["kind"] for part in shape["parts"]}
    assert kinds == {"SMBIOS", "container", "network card", "route", "systemd-imdsd"}


def test_a_dialect_that_the_instance_does_not_have_is_refused(cli: Cli) -> None:
    cli("instance", "set", "web-1", "--no-nocloud")

    status, _, err = cli("snippet", "web-1", "--for", "qemu", "--dialect", "nocloud")
    assert status == 64
    assert "has no nocloud documents (it has: ec2, openstack)" in err
    assert "openstack" in cli("snippet", "web-1", "--for", "incus", "--json")[1]


def test_an_instance_without_documents_is_refused(cli: Cli) -> None:
    cli("instance", "set", "web-1", "--no-nocloud", "--no-ec2", "--no-openstack")

    status, _, err = cli("snippet", "web-1", "--for", "qemu")
    assert (status, "no documents" in err) == (64, True)


def test_novas_instances_have_its_two_dialects(cli: Cli) -> None:
    added = cli(
        "instance",
        "add",
        "n-1",
        "--network",
        "lan",
        "--mac",
        "52:54:00:12:34:57",
        "--upstream",
        "nova",
        "--project",
        "p",
    )
    assert added[0] == 0, added[2]

    assert "OpenStack Nova" in cli("snippet", "n-1", "--for", "qemu")[1]
    assert cli("snippet", "n-1", "--for", "qemu", "--dialect", "nocloud")[0] == 64


def test_an_instance_that_there_is_not_is_not_found(cli: Cli) -> None:
    assert cli("snippet", "nobody", "--for", "qemu")[0] == 66
