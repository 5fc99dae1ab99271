"""Whose a listening socket is."""

from __future__ import annotations

from pathlib import Path

import pytest

from imdsproxy.core.hoststate import ListeningSocket
from imdsproxy.core.model import METADATA_IPV4
from imdsproxy.host.sockets import SocketOwners

_CONFIG = Path("/run/imdsproxy/haproxy.cfg")
_SOCKET = ListeningSocket(METADATA_IPV4, 80, None, 55, 0)


@pytest.mark.parametrize(
    ("config", "ours"), [(_CONFIG, True), (Path("/etc/haproxy/haproxy.cfg"), False)]
)
def test_a_haproxy_with_our_configuration_is_ours_before_its_pids_are_known(
    tmp_path: Path, config: Path, *, ours: bool
) -> None:
    process = tmp_path / "4711"
    (process / "fd").mkdir(parents=True)
    (process / "fd/3").symlink_to("socket:[55]")
    (process / "cmdline").write_bytes(b"\0".join((b"haproxy", b"-W", b"-f", bytes(config), b"")))
    (process / "comm").write_text("haproxy\n")
    (process / "stat").write_text("4711 (haproxy) S 1 " + "0 " * 20)

    found = SocketOwners(tmp_path, _CONFIG).resolve([_SOCKET], our_pids=[12])

    assert found[55].ours == ours
    assert [owner.pid for owner in found[55].owners] == [4711]
