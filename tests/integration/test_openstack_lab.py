"""The lab is what it is taken for: genuine Nova and Neutron, with everybody of the table in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import alive
from support.lab import until
from support.openstack.install import REPOSITORY
from support.openstack.lab import OpenStack
from support.openstack.table import LOOKUP_NAMES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", LOOKUP_NAMES)
def test_neutrons_own_agent_agrees_with_the_table(openstack: OpenStack, name: str) -> None:
    row = openstack.lookup(name)
    answer = openstack.ask_agent("/latest/meta-data/hostname", row.scope_header, row.address)
    if row.instance is None:
        assert answer.status == 404
    else:
        assert (answer.status, answer.body.decode()) == (200, f"{row.instance.name}.novalocal")


def test_servers_end_with_a_run_that_is_killed() -> None:
    text = (
        "import subprocess, time; from support.openstack.servers import ends_with_us\n"
        "server = subprocess.Popen([*ends_with_us(), 'sleep', '60'])\n"
        "print(server.pid, flush=True); time.sleep(60)\n"
    )
    path = {"PYTHONPATH": f"{REPOSITORY}/tests"}
    with subprocess.Popen(
        [sys.executable, "-c", text], env=path, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        # setpriv has "sleep" among its arguments, and is not done while they are its own.
        until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep\0"))
        process.kill()

    until(lambda: not alive(pid), what="the end of the server")
