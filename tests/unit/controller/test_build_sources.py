from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imdsproxy.config.schema import Settings
from imdsproxy.controller import build
from imdsproxy.host.clock import SystemClock
from imdsproxy.sources.libvirt import LibvirtPace, LibvirtSource
from imdsproxy.sources.libvirt_client import SystemLibvirt
from imdsproxy.sources.libvirt_known import Selection
from imdsproxy.sources.neutron import NeutronSource


def _settings(tmp_path: Path, **neutron: object) -> Settings:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    nova = {"endpoints": [{"url": "http://127.0.0.1:8775"}], "secret_file": secret}
    settings: dict[str, Any] = {
        "paths": {"state_dir": tmp_path},
        "sources": {"sqlite": {"enabled": False}, "neutron": {"enabled": True, **neutron}},
        "nova": {"endpoint_sets": {"default": nova}},
    }
    return Settings.model_validate(settings)


async def _begin() -> None:
    return


def test_neutron_is_the_one_that_is_asked_for_addresses(tmp_path: Path) -> None:
    settings = _settings(tmp_path, endpoint="http://127.0.0.1:9696")
    sources = build.build_sources(settings, SystemClock(), begin=_begin)
    assert sources.all == (sources.look_up,)
    assert isinstance(sources.look_up, NeutronSource)
    assert sources.writable is None


def test_without_neutron_nobody_is_asked() -> None:
    assert build.build_sources(Settings(), SystemClock(), begin=_begin).look_up is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"endpoint": "http://127.0.0.1:9696"}, ("endpoint", "http://127.0.0.1:9696", 7.0)),
        ({"cloud": "lab"}, ("cloud", "lab", Path("/etc/openstack/clouds.yaml"), 7.0)),
        (
            {"cloud": "lab", "clouds_file": Path("/a/clouds.yaml")},
            ("cloud", "lab", Path("/a/clouds.yaml"), 7.0),
        ),
    ],
)
async def test_neutron_is_where_the_settings_say(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, object],
    expected: tuple[object, ...],
) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        build, "connect_endpoint", lambda *where: asked.append(("endpoint", *where))
    )
    monkeypatch.setattr(build, "connect_cloud", lambda *where: asked.append(("cloud", *where)))
    settings = _settings(tmp_path, timeout_s=7.0, **fields)
    source = build.build_sources(settings, SystemClock(), begin=_begin).look_up
    assert source is not None
    client = source._connect()
    try:
        client._connect()  # type: ignore[attr-defined]  # what its first query does
    finally:
        await client.close()
    assert asked == [expected]


def test_how_neutron_is_asked_is_as_the_settings_say(tmp_path: Path) -> None:
    said = {
        "max_queries": 3,
        "negative_ttl_s": 1.5,
        "refresh_s": 20.0,
        "lifetime_s": 600.0,
        "list_every_s": 30.0,
        "list_host": "here",
        "page_size": 50,
    }
    settings = _settings(tmp_path, endpoint="http://127.0.0.1:9696", **said)
    source = build.build_sources(settings, SystemClock(), begin=_begin).look_up
    assert source is not None
    assert {name: getattr(source._pace, name) for name in said} == said


def test_libvirt_is_asked_as_the_settings_say() -> None:
    said = {
        "enabled": True,
        "uri": "test:///default",
        "networks": ["default"],
        "domains": "marked",
        "reread_s": 5.0,
    }
    settings = Settings.model_validate({"sources": {"libvirt": said}})
    _store, source = build.build_sources(settings, SystemClock(), begin=_begin).all
    assert isinstance(source, LibvirtSource)
    assert isinstance(source._client, SystemLibvirt)
    assert source._client._uri == "test:///default"
    assert source._selection == Selection(networks=frozenset({"default"}), marked_only=True)
    assert source._pace == LibvirtPace(reread_s=5.0)
