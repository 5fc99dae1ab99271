from __future__ import annotations

from pathlib import Path

from imdsproxy.core.haproxy.config import render_config
from imdsproxy.core.haproxy.model import Bind, DataplaneSpec, Limits
from imdsproxy.core.model import METADATA_IPV4, NetworkId
from imdsproxy.dataplane.launch import SpawnLauncher
from imdsproxy.dataplane.layout import Layout
from imdsproxy.dataplane.master import MasterClient


def _launcher(directory: Path) -> SpawnLauncher:
    layout = Layout(runtime=directory, state=directory)
    return SpawnLauncher("/usr/sbin/haproxy", layout, MasterClient(layout.master_socket))


def test_the_master_is_told_the_connections_of_its_configuration(tmp_path: Path) -> None:
    launcher = _launcher(tmp_path)
    spec = DataplaneSpec(
        binds=(Bind(NetworkId("n"), METADATA_IPV4, 80),),
        paths=launcher.layout.haproxy_paths(),
        limits=Limits(maxconn=7890, maxconn_per_network=50),
    )
    launcher.layout.config.write_text(render_config(spec))
    arguments = launcher.arguments()
    assert arguments[arguments.index("-n") + 1] == "7890"


def test_without_a_configuration_the_master_has_room_for_thousands_of_namespaces(
    tmp_path: Path,
) -> None:
    arguments = _launcher(tmp_path).arguments()
    assert int(arguments[arguments.index("-n") + 1]) >= 4096
