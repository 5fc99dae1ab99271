"""Faults of the issuer's own address and certificate cost no guest anything, and end without a restart."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from support.certificates import make_authority
from support.identity.requests import identity_settings, wait_token
from support.identity.signing import Issuer
from support.lab import until, within
from support.recorder import Recorder
from support.world import World, open_world

pytestmark = pytest.mark.root

_POLICY: Final = {"host": {"audiences": ["vault"]}}


@dataclass(frozen=True, slots=True)
class _Site:
    world: World
    issuer: Issuer
    certificate: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Site]:
    section, issuer = identity_settings(tmp_path_factory.mktemp("issuer"))
    with open_world({"identity": section, "policy": _POLICY}) as world:
        yield _Site(world, issuer, Path(section["certificate"]))


@pytest.fixture(scope="module")
def shared_world(site: _Site) -> World:
    return site.world


def _listen(world: World, address: str | None) -> None:
    identity = {**world.settings["identity"], "listen": address}
    world.daemon.reconfigure({**world.settings, "identity": identity})


def _problems(world: World) -> dict[str, Any]:
    return {one["field"]: one for one in world.daemon.status()["problems"]}


def _reads_keys(site: _Site, authority: Path) -> bool:
    curl = ("curl", "-sf", "--max-time", "2", "--cacert", str(authority), site.issuer.jwks_url)
    return (
        subprocess.run(
            (*within(site.world.lab.host), *curl), capture_output=True, check=False
        ).returncode
        == 0
    )


def test_an_issuer_s_port_that_is_taken_costs_no_guest_anything_and_is_served_once_free(
    world: World, site: _Site
) -> None:
    wait_token(world.red)
    _listen(world, None)
    until(lambda: not _reads_keys(site, site.issuer.ca_file), what="the port's release")
    with Recorder(namespace=world.lab.host, port=8443):
        _listen(world, "127.0.0.1:8443")
        until(lambda: "identity.listen" in _problems(world), what="the problem")
        problem = _problems(world)["identity.listen"]
        assert "127.0.0.1 port 8443: Address already in use" in problem["reason"]
        world.all_right()
        wait_token(world.red)
    until(lambda: _reads_keys(site, site.issuer.ca_file), what="the issuer's keys")
    until(lambda: "identity.listen" not in _problems(world), what="the end of the problem")


def test_a_renewed_certificate_is_served_without_a_request_of_anybody(
    world: World, site: _Site, tmp_path: Path
) -> None:
    until(lambda: _reads_keys(site, site.issuer.ca_file), what="the issuer's keys")
    before, other = site.certificate.read_bytes(), make_authority(tmp_path, "other-ca")
    renewed = other.issue("issuer", names=["IP:127.0.0.1"]).bundle.read_bytes()
    try:
        site.certificate.write_bytes(renewed)
        until(lambda: _reads_keys(site, other.ca_file), within_s=20, what="the new certificate")
        # A renewal that fails leaves half a file.
        site.certificate.write_bytes(renewed[:300])
        until(lambda: "identity.certificate" in _problems(world), within_s=20, what="the problem")
        world.all_right()
    finally:
        site.certificate.write_bytes(before)
    until(lambda: _reads_keys(site, site.issuer.ca_file), within_s=20, what="the old certificate")
    assert "identity.certificate" not in _problems(world)
