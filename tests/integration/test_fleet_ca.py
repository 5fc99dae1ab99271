"""A fleet's CA is replaced as docs/explanation/fleet.md says, with hubs and a host that run and a guest that reads."""

import shutil
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from imdsproxy.sources.fleet.client import HostFiles
from support.cli import run_main
from support.fleet_operator import Operator
from support.fleet_world import FleetWorld, fleet_world
from support.guest import Guest, Load, Reply
from support.lab import until

pytestmark = pytest.mark.root


@pytest.fixture
def world() -> Iterator[FleetWorld]:
    with fleet_world() as made:
        yield made


def _is_web(guest: Guest, reply: Reply) -> str | None:
    return None if reply.text == "web" else f"{guest.name}: {reply.status} {reply.text}"


def test_a_ca_is_replaced_in_three_steps_while_a_guest_reads(
    world: FleetWorld, tmp_path: Path
) -> None:
    operator = Operator.new(world, "anna")
    host = world.add_host("a", start=False)
    guest = host.lab.guest("blue")
    host.daemon.configure({"sources": {"fleet": {"enabled": True, "retry_s": 0.5}}})
    invitation = operator.invite("a")
    with world.etcd.entered():
        joins = ("--config", str(host.daemon.config), "fleet", "join")
        assert run_main(*joins, stdin=invitation).status == 0
    host.daemon.start()
    operator.do("network", "add", "blue", "--bridge", "blue")
    words = ("--network", "blue", "--mac", guest.mac, "--address", guest.addresses[0])
    operator.do("instance", "add", "web", *words, "--host", "a")
    files = HostFiles.of(host.daemon.state / "fleet")
    before = tmp_path / "before.pem"
    before.write_bytes(files.certificate.read_bytes())
    with Load([guest], "/latest/meta-data/hostname", _is_web) as load:
        load.wait_answers(20)
        for step in ("begin", "switch", "finish"):
            where = ("--directory", str(world.files.directory))
            done = run_main("fleet", "rotate-ca", step, *where, "--json")
            assert done.status == 0, done
            for path in map(Path, done.json["files"]):
                shutil.copy(path, world.directory / "hub2.fleet")
            if step == "begin":
                with operator.certificate.open("ab") as pem:
                    pem.write(world.files.ca_certificate.read_bytes())
            elif step == "switch":
                operator.certificate.unlink()
                world.operator("anna")
            for hub in world.hubs:
                hub.end()
                hub.start()
            until(lambda: _renewing(operator) == ["a"], within_s=20, what="a host to wait for")
            # It looks for CAs as it starts.
            host.daemon.kill_controller()
            host.daemon.start()
            until(lambda: _renewing(operator) == [], within_s=20, what="its certificate")
            operator.do("instance", "set", "web", "--tag", f"step={step}")
            load.wait_answers(20)
    assert load.report.lost == []
    assert _is_taken(world, files)
    assert not _is_taken(world, replace(files, certificate=before, key=before))
    host.daemon.stop()


def _renewing(operator: Operator) -> list[str]:
    return list(operator.ask("GET", "/fleet/status")["renewing"])


def _is_taken(world: FleetWorld, files: HostFiles) -> bool:
    """Whether each hub talks to a host with this certificate."""
    return all(_answers(world, url, files) for url in world.urls)


def _answers(world: FleetWorld, url: str, files: HostFiles) -> bool:
    place = urlsplit(url)
    assert place.hostname is not None
    assert place.port is not None
    with world.etcd.entered():
        sock = socket.create_connection((place.hostname, place.port), timeout=10)
    with sock, files.context().wrap_socket(sock, server_hostname=place.hostname) as stream:
        try:
            stream.sendall(b"GET /fleet/blob/" + b"0f" * 32 + b" HTTP/1.1\r\nHost: hub\r\n\r\n")
            return bool(stream.recv(64))
        except ssl.SSLError:
            return False
