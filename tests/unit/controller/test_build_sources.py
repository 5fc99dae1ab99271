import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from imdsproxy.config.schema import Settings
from imdsproxy.controller import build
from imdsproxy.controller.sources import Sources, build_sources
from imdsproxy.haproxy.layout import Layout
from imdsproxy.host.clock import Clock
from imdsproxy.host.state import NamespaceRef
from imdsproxy.reconcile.progress import Progress
from imdsproxy.sources.neutron.source import NeutronSource


async def _begin() -> None:
    return


async def _drop_others(_: Collection[NamespaceRef]) -> None:
    return


def _build(settings: Settings) -> Sources:
    return build_sources(settings, Clock(), _begin, Progress(), _drop_others, ovn=None)


def test_neutron_is_the_one_that_is_asked_for_addresses(tmp_path: Path) -> None:
    neutron = {"enabled": True, "endpoint": "http://127.0.0.1:9696"}
    nova = {"endpoints": [{"url": "http://127.0.0.1:8775"}], "secret_file": "/secret"}
    values: dict[str, Any] = {
        "paths": {"state_dir": tmp_path},
        "sources": {"sqlite": {"enabled": False}, "neutron": neutron},
        "nova": {"endpoint_sets": {"default": nova}},
    }
    settings = Settings.model_validate(values)
    sources = _build(settings)
    assert sources.all == (sources.look_up,)
    assert isinstance(sources.look_up, NeutronSource)
    assert sources.writable is None
    assert _build(Settings()).look_up is None


def test_a_document_server_finds_modules_where_its_controller_does() -> None:
    """Else a controller that runs from a work tree starts the document server of the installed package."""
    environment = {"PYTHONPATH": "/srv/src", "IMDSPROXY_LOG__LEVEL": "debug", "HOME": "/root"}
    settings = Settings()
    companion = build.build_companion(settings, Layout.of(settings), None, environment)
    expected = {"PYTHONPATH": "/srv/src", "IMDSPROXY_LOG__LEVEL": "debug"}
    assert companion.environment == {**expected, "PATH": os.defpath, "LANG": "C.UTF-8"}
