"""Guests of a fleet that genuine libvirtds migrate: the hook that is shipped has their instances follow them."""

import asyncio
import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from imdsproxy.fleet.members import LEAVE_PATH, Role
from imdsproxy.sources.fleet.client import HostFiles, HubClient
from support.daemon import instance
from support.fleet_operator import Operator
from support.fleet_world import FleetHost, FleetWorld, fleet_world
from support.guest import Guest, Load, Reply
from support.lab import until, within
from support.libvirt_backing import domain_xml
from support.libvirt_daemon import Libvirtd, open_libvirtd
from support.patience import patience

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(240)]

_HOOK: Final = Path(__file__).parents[2] / "packaging/libvirt/qemu.d-hook"
_PATH: Final = "/latest/meta-data/hostname"
_XML: Final = domain_xml("web", [])

# It runs after the shipped one. QEMU has started on the destination then, and no memory is copied yet.
_HOLD: Final = """#!/bin/sh
[ "$2" = started ] || exit 0
home=$(dirname "$(dirname "$(command -v imdsproxy)")")
until [ -s "$home/go-on" ]; do sleep 0.05; done
exit "$(cat "$home/go-on")"
"""


@dataclass
class _Place:
    """A host of the fleet, its libvirtd, and its end of the guest's network."""

    host: FleetHost
    libvirtd: Libvirtd
    guest: Guest

    def hook(self, *words: str, xml: str = _XML) -> subprocess.CompletedProcess[str]:
        """Run the hook as libvirt does."""
        return subprocess.run(
            (*within(self.host.lab.host), str(_HOOK), *words),
            input=xml,
            capture_output=True,
            text=True,
            env={"PATH": f"{self.libvirtd.home}/bin:/usr/bin:/bin"},
            check=False,
        )

    def hold(self) -> None:
        """Have each start of a guest wait, also of one that migrates here."""
        (self.libvirtd.home / "go-on").unlink()

    def go_on(self, status: int = 0) -> None:
        """Let it go on, or fail."""
        (self.libvirtd.home / "go-on").write_text(f"{status}\n")

    def is_gone(self) -> bool:
        """Whether its end of the network gets nothing of the instance."""
        return self.guest.ask(_PATH).status == 404


@dataclass
class _Migrations:
    world: FleetWorld
    here: _Place
    there: _Place
    operator: Operator
    mover: Path

    def have_mover(self) -> None:
        """Let the second host take over what migrates to it."""
        shutil.copy(self.mover, self.there.host.certificate.with_name("mover.pem"))

    def hosts(self) -> list[str]:
        return list(self.operator.ask("GET", "/v1/instances/web")["hosts"])

    def start_domain(self) -> Any:
        # Paused, so that it takes no processor; it migrates as one that runs.
        flags = importlib.import_module("libvirt").VIR_DOMAIN_START_PAUSED
        return self.here.libvirtd.connection.createXML(_XML, flags)

    def migrate(self, domain: Any) -> Any:
        """Migrate it while it runs, over a socket."""
        library = importlib.import_module("libvirt")
        place = {library.VIR_MIGRATE_PARAM_URI: f"unix://{self.there.libvirtd.home}/migration"}
        return domain.migrate3(self.there.libvirtd.connection, place, library.VIR_MIGRATE_LIVE)

    def wait_arrived(self) -> None:
        """Wait until the guest's process is on the other host too."""
        connection = self.there.libvirtd.connection
        until(connection.listAllDomains, within_s=60, what="a domain that comes")

    def reset(self) -> None:
        for one in (self.here, self.there):
            one.go_on()
            one.libvirtd.clear()
        self.operator.ask("PATCH", "/v1/instances/web", {"hosts": ["a"]})


@pytest.fixture(scope="module")
def _made() -> Iterator[_Migrations]:
    def open_one(host: FleetHost) -> AbstractContextManager[Libvirtd]:
        command = f'exec {sys.executable} -m imdsproxy --config {host.daemon.config} "$@"'
        scripts = {
            "bin/imdsproxy": f"#!/bin/sh\n{command}\n",
            "etc/hooks/qemu.d/imdsproxy": _HOOK.read_text(),
            "etc/hooks/qemu.d/test": _HOLD,
        }
        return open_libvirtd(host.lab.host, scripts)

    with fleet_world(1) as world:
        hosts = [world.add_host(name) for name in ("a", "b")]
        with open_one(hosts[0]) as first, open_one(hosts[1]) as second:
            here, there = (
                _Place(host, libvirtd, host.lab.guest("blue"))
                for host, libvirtd in zip(hosts, (first, second), strict=True)
            )
            operator = Operator.new(world, "olga")
            made = _Migrations(world, here, there, operator, world.operator("mo", Role.MOVER))
            here.go_on()
            there.go_on()
            world.store_network("blue")
            operator.ask("POST", "/v1/instances", {**instance("web", "blue"), "hosts": ["a"]})
            yield made


@pytest.fixture
def migrations(_made: _Migrations) -> Iterator[_Migrations]:
    yield _made
    _made.there.host.certificate.with_name("mover.pem").unlink(missing_ok=True)
    _made.reset()


def _is_web(guest: Guest, reply: Reply) -> str | None:
    found = reply.status, reply.text
    return None if found == (200, "web") else f"{guest.name} got {found}"


@pytest.mark.always
def test_both_hosts_serve_while_a_guest_migrates_and_it_stays_where_it_was_when_that_fails(
    migrations: _Migrations,
) -> None:
    here, there = migrations.here, migrations.there
    assert migrations.operator.ask("POST", "/v1/instances/web/move", {"to": "b"})["applied"]
    domain = migrations.start_domain()
    there.hold()
    with ThreadPoolExecutor(1) as pool:
        with Load([here.guest, there.guest], _PATH, _is_web) as load:
            migrated = pool.submit(migrations.migrate, domain)
            migrations.wait_arrived()
            load.wait_answers(40)
        assert load.report.lost == []
        assert migrations.hosts() == ["a", "b"]
        with Load([here.guest], _PATH, _is_web) as load:
            there.go_on(1)
            with pytest.raises(importlib.import_module("libvirt").libvirtError):
                migrated.result(timeout=60 * patience())
            assert migrations.hosts() == ["a"]
            until(there.is_gone, within_s=20, what="its end at the other host")
        assert load.report.lost == []
    assert domain.isActive()


def test_a_host_with_a_movers_certificate_takes_over_what_migrates_to_it_without_a_lost_request(
    migrations: _Migrations,
) -> None:
    here, there = migrations.here, migrations.there
    migrations.have_mover()
    domain = migrations.start_domain()
    there.hold()
    with ThreadPoolExecutor(1) as pool:
        with Load([here.guest], _PATH, _is_web) as before:
            migrated = pool.submit(migrations.migrate, domain)
            migrations.wait_arrived()
            with Load([there.guest], _PATH, _is_web) as both:
                before.wait_answers(20)
                both.wait_answers(20)
        with Load([there.guest], _PATH, _is_web) as after:
            there.go_on()
            assert migrated.result(timeout=60 * patience()).isActive()
            assert migrations.hosts() == ["b"]
            until(here.is_gone, within_s=20, what="its end at the first host")
    assert [one.report.lost for one in (before, both, after)] == [[], [], []]


def test_a_migration_is_refused_while_no_hub_answers_and_a_domain_of_no_instance_passes(
    migrations: _Migrations,
) -> None:
    migrations.have_mover()
    other = _XML.replace("web", "other").replace("7765622e2e2e", "6f746865722e")
    for words in (("migrate", "begin", "-"), ("release", "end", "migrated")):
        passed = migrations.there.hook("other", *words, xml=other)
        assert (passed.returncode, passed.stdout, passed.stderr) == (0, "", "")
    assert migrations.hosts() == ["a"]
    # Its guest went where the fleet does not serve it.
    lost = migrations.here.hook("web", "release", "end", "migrated")
    assert lost.returncode != 0
    assert "instance move web --to HOST --now" in lost.stderr
    assert migrations.hosts() == ["a"]
    domain = migrations.start_domain()
    (hub,) = migrations.world.hubs
    hub.end()
    try:
        began = time.monotonic()
        with pytest.raises(importlib.import_module("libvirt").libvirtError) as refused:
            migrations.migrate(domain)
        assert time.monotonic() - began < 40 * patience()
        assert f"{hub.url} does not answer" in str(refused.value)
        assert domain.isActive()
        late = migrations.here.hook("web", "release", "end", "migrated")
        assert late.returncode != 0
        assert "--finish" in late.stderr
    finally:
        hub.start()


def test_a_host_takes_no_instance_away_from_another_one_and_learns_of_none(
    migrations: _Migrations,
) -> None:
    world, there = migrations.world, migrations.there.host
    files = HostFiles(Path("/none"), there.certificate, there.key, world.files.ca_certificate)
    client = HubClient(files, 10 * patience())

    def leave(name: str, path: str = LEAVE_PATH) -> tuple[int, str]:
        body = json.dumps({"instance": name}).encode()
        with world.etcd.entered():
            status, answer = asyncio.run(client.request("POST", world.urls[0], path, body=body))
        return status, answer.decode().replace(name, "NAME")

    assert leave("web") == leave("none")
    assert leave("web")[0] == 404
    assert leave("web", "/v1/instances/web/move")[0] == 403
    assert migrations.hosts() == ["a"]
    # Placed there too, it can take away itself, and not the other one.
    migrations.operator.ask("POST", "/v1/instances/web/move", {"to": "b"})
    assert leave("web") == (200, '{"left":true}')
    assert migrations.hosts() == ["a"]


def test_the_hook_starts_nothing_for_other_operations_and_says_when_it_took_too_long(
    tmp_path: Path,
) -> None:
    (tmp_path / "timeout").write_text('#!/bin/sh\necho "$@" >>"${0%/*}/ran"; exit 124\n')
    (tmp_path / "timeout").chmod(0o755)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (str(_HOOK), *words), env={"PATH": str(tmp_path)}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    others = (
        ("prepare", "begin", "-"), ("start", "begin", "-"), ("started", "begin", "-"),
        ("stopped", "end", "-"), ("release", "end", "-"), ("release", "end", "shutdown"),
        ("release", "end", "crashed"), ("reconnect", "begin", "-"), ("restore", "begin", "-"),
    )  # fmt: skip
    assert {run("web", *words).returncode for words in others} == {0}
    assert not (tmp_path / "ran").exists()
    late = run("-web", "migrate", "begin", "-")
    assert (late.returncode, "did not answer within 40 s" in late.stderr) == (124, True)
    assert (
        (tmp_path / "ran").read_text().endswith("imdsproxy libvirt-hook -- -web migrate begin -\n")
    )
