"""A host whose settings give no identity tokens."""

from pathlib import Path
from typing import Final

import pytest

from support.world import World

pytestmark = pytest.mark.root

_LIBRARY: Final = "/cryptography/"
"""Part of the path of the library by which tokens are signed."""


def test_a_daemon_without_identity_has_no_process_library_or_rule_for_it(world: World) -> None:
    daemon = world.daemon
    processes = daemon.processes()
    assert world.pids().controller in processes
    assert not [one for one in processes.values() if "issuer" in one or "signer" in one]
    for pid in processes:
        assert _LIBRARY not in Path(f"/proc/{pid}/maps").read_text(), processes[pid]
    assert not [one for one in ("identity.pid", "signer.pid") if (daemon.runtime / one).exists()]
    config = (daemon.runtime / "haproxy.cfg").read_text()
    assert "backend documents" in config
    assert not [one for one in ("identity", "oauth2", "issuer") if one in config]
