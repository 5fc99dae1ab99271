from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.core.haproxy.config import render_config
from imdsproxy.core.haproxy.maps import render_map
from imdsproxy.core.haproxy.model import Bind, DataplaneSpec, Limits
from imdsproxy.core.model import METADATA_IPV4, NetworkId
from imdsproxy.dataplane.launch import SpawnLauncher
from imdsproxy.dataplane.layout import Layout
from imdsproxy.dataplane.master import MasterClient
from imdsproxy.host.namespaces import DEFAULT_DIRECTORY, NamespaceDirectory, NamespaceThread
from imdsproxy.host.netlink import add_address, set_link
from imdsproxy.host.nlmessages import NetlinkSocket

pytestmark = pytest.mark.root

_COUNT = 300
_NAMES = [f"imdst-cold-{number}" for number in range(_COUNT)]


def _furnish() -> None:
    with NetlinkSocket() as channel:
        set_link(channel, 1, up=True)
        add_address(channel, 1, METADATA_IPV4, 32, protocol=0)


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    directory = NamespaceDirectory(DEFAULT_DIRECTORY)
    thread = NamespaceThread(directory)
    try:
        for name in _NAMES:
            thread.create_now(name)
            thread.enter(name, lambda _: _furnish())
        yield _NAMES
    finally:
        for name in _NAMES:
            directory.delete(name)
        thread.close()


async def test_haproxy_starts_cold_with_more_namespaces_than_a_waiting_master_has_room_for(
    namespaces: list[str], tmp_path: Path
) -> None:
    layout = Layout(runtime=tmp_path, state=tmp_path, chroot=False)
    binds = tuple(Bind(NetworkId(name), METADATA_IPV4, 80, None, name) for name in namespaces)
    spec = DataplaneSpec(binds, layout.haproxy_paths(), Limits(maxconn=2000))
    layout.config.write_text(render_config(spec))
    layout.base_map.write_text(render_map({}, "1"))
    layout.overlay_map.write_text(render_map({}, "1"))
    layout.token_keys_map.touch()
    layout.path_rules_map.touch()
    layout.short_map.touch()
    layout.unavailable.write_bytes(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
    layout.jail.mkdir()
    master = MasterClient(layout.master_socket)
    launcher = SpawnLauncher("/usr/sbin/haproxy", layout, master)
    try:
        processes = await launcher.start()
        assert processes.worker is not None
        # A master that has no room ends after its worker was forked.
        assert (await master.send_reload()).success
        assert (await master.read_processes()).master == processes.master
    finally:
        await launcher.stop()
