import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from imdsproxy.errors import HostRefused
from imdsproxy.haproxy.launch import Launcher
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.master import MasterClient
from imdsproxy.haproxy.rules.config import render_config
from imdsproxy.haproxy.rules.model import Bind, DataplaneSpec, Limits
from imdsproxy.host.namespaces import DEFAULT_DIRECTORY, NamespaceDirectory, NamespaceThread
from imdsproxy.host.netlink import add_address, set_link
from imdsproxy.host.nlmessages import NetlinkSocket
from imdsproxy.model.entities import METADATA_IPV4, NetworkId
from imdsproxy.network.endpoints import compute_maxconn
from support.haproxy_alone import paths_below
from support.patience import patience

pytestmark = [pytest.mark.root, pytest.mark.slow]

_COUNT = 300
_LEAST = 2 * (_COUNT // 2 + 16) + 2 * _COUNT + 256
"""Open files for each network's namespace and listening socket, the fewest connections, and HAProxy's own."""
_NAMES = [f"imdst-cold-{number}" for number in range(_COUNT)]


def _furnish() -> None:
    with NetlinkSocket() as channel:
        set_link(channel, 1)
        add_address(channel, 1, METADATA_IPV4, 32, protocol=0)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    directory = NamespaceDirectory(DEFAULT_DIRECTORY)
    thread = NamespaceThread(directory)
    try:
        for name in _NAMES:
            thread.create_now(name)
            with thread.inside(name):
                _furnish()
        yield _NAMES
    finally:
        for name in _NAMES:
            directory.delete(name)
        thread.close()


def _program(directory: Path, limit: int) -> str:
    """HAProxy with a limit on open files; -1 for that of the tests."""
    if limit < 0:
        return "/usr/sbin/haproxy"
    program = directory / "limited"
    program.write_text(f'#!/bin/sh\nulimit -n {limit}\nexec /usr/sbin/haproxy "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("wanted", "limit"),
    [
        pytest.param(2000, -1, id="more-namespaces-than-a-waiting-master-has-room-for"),
        pytest.param(100, -1, id="more-namespaces-than-connections"),
        pytest.param(0, _LEAST, id="no-more-open-files-than-needed"),
    ],
)
async def test_haproxy_starts_cold_and_reloads_with_many_namespaces(
    namespaces: list[str], tmp_path: Path, wanted: int, limit: int
) -> None:
    layout = Layout(tmp_path, tmp_path, documents_workers=1, chroot=False)
    binds = tuple(Bind(NetworkId(name), METADATA_IPV4, 80, None, name) for name in namespaces)
    with pytest.raises(HostRefused, match=f"at least {_LEAST} "):
        compute_maxconn(wanted, binds, _LEAST - 1)
    maxconn = compute_maxconn(wanted, binds, limit)
    spec = DataplaneSpec(binds, paths_below(tmp_path), Limits(maxconn=maxconn))
    layout.config.write_text(render_config(spec))
    master = MasterClient(layout.master_socket)
    launcher = Launcher(_program(tmp_path, limit), None, layout)
    try:
        processes = await launcher.start()
        assert processes.worker is not None
        # A master that has no room ends after its worker was forked.
        assert await master.send_reload() is None
        after = await master.read_processes()
        assert after.master == processes.master
        assert after.worker is not None
        with ExitStack() as stack:
            for _ in range(420):
                guest = stack.enter_context(socket.socket(socket.AF_UNIX))
                guest.connect(str(layout.probe_socket))
            # A worker that has no room for a connection's descriptor ends itself.
            async with asyncio.timeout(10 * patience()):
                while (load := await master.read_load(after.worker)) is None or (
                    load.connections < min(maxconn, 420)
                ):
                    await asyncio.sleep(0.01)
    finally:
        await launcher.stop()
