"""Figures, alerts and dashboard of a fleet: a real Prometheus scrapes real hubs over a real etcd, and a host."""

import contextlib
import json
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import (
    Claim,
    HostId,
    HostState,
    StoredHost,
    Suspicion,
    host_key,
    render_host,
    render_suspicion,
)
from imdsproxy.fleet.members import Role, spell_serial
from imdsproxy.host.certificates import make_key, render_certificate, render_key
from imdsproxy.hub.hosts.sealed import PLACE
from imdsproxy.hub.pki import authority
from imdsproxy.model.entities import InstanceId
from imdsproxy.sources.fleet.client import HostFiles
from support.daemon import instance
from support.dashboards import layout_faults, without_data
from support.demonstration import REPOSITORY
from support.fleet_world import METRICS_PORT, FleetHost, FleetWorld, fleet_world
from support.identity.fleet import Signers
from support.lab import until
from support.prometheus import RULES, Prometheus, alerts, open_prometheus

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

_BOARD: Final = REPOSITORY / "packaging/grafana/imdsproxy-fleet.json"
_METRICS: Final = "10.250.0.31:9465"
_QUOTA: Final = 2**20
_WITHIN_S: Final = 40.0
"""A hub asks members and other hubs every ten seconds, and waits five for each."""

_NEEDS_TIME: Final = {"FleetStale", "FleetExpired"}
"""What takes minutes; `test_alert_rules.py` has it."""


@dataclass(slots=True)
class Monitored:
    """A fleet of two hubs and a host, and what watches it."""

    world: FleetWorld
    host: FleetHost
    signers: Signers
    prometheus: Prometheus


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    metrics = {"listen": _METRICS, "haproxy_listen": None}
    identity = {"enabled": True, "user": "daemon"}
    signers = Signers(tmp_path_factory.mktemp("issuer"))
    flags = (f"--quota-backend-bytes={_QUOTA}",)
    with fleet_world(
        etcd_flags=flags, beside_hub=signers, metrics=metrics, identity=identity
    ) as world:
        host = world.add_host("a", start=False)
        _join(world, host)
        world.store_network("blue")
        # The host requests tokens of its hub.
        world.write({f"{layout.POLICIES}host/a": b'{"audiences":["vault"]}'})
        world.place(instance("web", "blue"), "a")
        targets = [f"{one.address}:{METRICS_PORT}" for one in world.hubs]
        jobs = {"imdsproxy-hub": targets, "imdsproxy": [_METRICS]}
        with open_prometheus(world.etcd.lab.host, world.directory, jobs) as prometheus:
            yield Monitored(world, host, signers, prometheus)


def _short_lived(world: FleetWorld, role: Role, name: str) -> tuple[bytes, str]:
    """Key and certificate that end in six days, and its serial number."""
    key, own, now = make_key(), world.files.load_authority(), datetime.now(UTC)
    life = authority._Life(now, timedelta(days=6))
    subject = authority._subject(role, name)
    signed = own._sign(key.public_key(), subject, authority._BOTH, life)
    return render_key(key) + render_certificate(signed), spell_serial(signed.serial_number)


def _join(world: FleetWorld, host: FleetHost) -> None:
    """Start the host with the files that `fleet join` makes."""
    files = HostFiles.of(host.daemon.state / "fleet")
    files.certificate.parent.mkdir(parents=True)
    pem, serial = _short_lived(world, Role.HOST, "a")
    files.certificate.write_bytes(pem)
    files.certificate.chmod(0o600)
    files.authority.write_bytes(world.files.ca_certificate.read_bytes())
    files.hubs.write_text("\n".join(world.urls))
    stored = StoredHost(HostState.ENROLLED, (serial,))
    world.write({host_key(host.name): render_host(stored)})
    # A minute would pass until it left the other one, which is to stand still.
    followed = {"enabled": True, "hubs": world.urls[:1], "retry_s": 0.5}
    sources = {"fleet": followed, "sqlite": {"enabled": False}}
    host.daemon.configure({"sources": sources, **world.host_settings})
    host.daemon.start()


def test_a_fleets_dashboard_has_data_and_each_fault_of_the_fleet_fires_its_alerts(
    fleet: Monitored,
) -> None:
    board = json.loads(_BOARD.read_text())
    assert layout_faults(board) == []
    assert without_data(board, fleet.prometheus, within_s=_WITHIN_S) == set()
    fired: set[str] = set()
    began = time.monotonic()

    def wait_for(*names: str) -> None:
        wanted = {f"Imdsproxy{name}" for name in names}

        def left() -> set[str]:
            return wanted - fleet.prometheus.fired(time.monotonic() - began)

        with contextlib.suppress(AssertionError):
            until(lambda: not left(), within_s=_WITHIN_S, pause_s=0.3)
        assert left() == set()
        fired.update(wanted)

    world, (first, second) = fleet.world, fleet.world.hubs
    wait_for("HostCertificateEnds")
    fleet.signers.kill(second.name)
    wait_for("HubCannotSign")
    fleet.signers.kill(first.name)
    wait_for("FleetCannotSign")
    for hub in world.hubs:
        fleet.signers.start(hub)
    before = _replace_certificates(world)
    world.write({host_key(HostId("b")): render_host(StoredHost(HostState.ENROLLED, ("1",)))})
    world.store_network("away")
    world.place(instance("lost", "away"), "a")
    world.write({f"{layout.NETWORKS}bad": b"[", PLACE: codec.encode({"sealed": "x"})})
    suspicion = Suspicion("instance/web is missing", {}, {HostId("a"): Claim(0)})
    world.write({layout.SUSPECT: render_suspicion(suspicion)})
    world.etcd.kill(world.etcd.members[2])
    assert second.process is not None
    second.process.send_signal(signal.SIGSTOP)
    wait_for(
        *("FleetAuthorityEnds", "HubCertificateEnds", "OperatorCertificateEnds"),
        *("FleetHostsAbsent", "FleetHostsBehind", "FleetFailing", "FleetValuesRefused"),
        *("FleetTokenKeysUnreadable", "FleetRestoreSuspected", "EtcdMemberDown"),
        *("HubDown", "HubsApart", "HubAbsent"),
    )
    second.end(signal.SIGKILL)
    web = layout.instance_key(InstanceId("web"))
    world.etcd.ctl("del", web)
    wait_for("FleetWritesStopped")
    # The next hub has never seen the instance that its host has.
    first.end()
    for path, pem in before.items():
        path.write_bytes(pem)
    first.start()
    wait_for("FleetHeld", "FleetNotReached")
    _fill(world)
    wait_for("EtcdNearlyFull", "EtcdProblem")
    world.etcd.kill(*world.etcd.members[:2])
    wait_for("HubNotFollowing", "NoHub")
    all_of_fleet = {one.name for one in alerts(RULES / "imdsproxy-fleet.rules.yml")}
    assert fired == all_of_fleet - {f"Imdsproxy{name}" for name in _NEEDS_TIME}


def _replace_certificates(world: FleetWorld) -> Mapping[Path, bytes]:
    """Have those of the first hub's directory end soon, while HAProxy goes on with what it has read.

    Returns:
        Those of before.
    """
    files = world.files
    before = {path: path.read_bytes() for path in (files.ca_certificate, files.hub, files.operator)}
    pem, _ = _short_lived(world, Role.HUB, "hub1")
    for path in before:
        path.write_bytes(pem)
    return before


def _fill(world: FleetWorld) -> None:
    """Write until etcd takes no more."""
    with contextlib.suppress(Exception):
        for number in range(20):
            world.write({f"{layout.BLOBS}{number}": bytes(100_000)})
