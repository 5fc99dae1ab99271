"""The steps of docs/how-to/behind-neutrons-proxies.md on a host with systemd: over and back, command for command.

The agent is a stand-in that treats its socket as Neutron's does: it removes what is at the path, and listens there. The
genuine one is in tests/e2e/test_openstack_document.py.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.agent_socket import SQUATTER
from support.demonstration import REPOSITORY
from support.document_blocks import Block, blocks_of
from support.lab import until
from support.systemd_daemon import CONTROLLER, UNITS, installed
from support.systemd_machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.slow]

_PAGE: Final = REPOSITORY / "docs/how-to/behind-neutrons-proxies.md"
_AGENT: Final = "neutron-metadata-agent"
_OVN_AGENT: Final = "neutron-ovn-metadata-agent"
_SOCKET: Final = "/var/lib/neutron/metadata_proxy"
_NETWORK: Final = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
_SECRET: Final = "a-secret-of-thirty-two-characters"
_WITHIN_S: Final = 10.0

_ACCOUNT: Final = "u neutron - - /var/lib/neutron\n"
_SERVICE: Final = f"""
[Service]
User=neutron
ExecStart={sys.executable} /opt/neutron/%N {_SOCKET}
[Install]
WantedBy=multi-user.target
"""
_OTHERS: Final = f"""
import json
from support.recorder import Recorder, reply
PORT = {{"id": "5f4b1c7e-52a0-4f0b-8d0e-6a3b0f7e9d21", "network_id": "{_NETWORK}", "mac_address": "fa:16:3e:00:00:05",
        "fixed_ips": [{{"ip_address": "10.0.0.5", "subnet_id": "s"}}], "device_owner": "compute:nova",
        "device_id": "0d1c2b3a-0000-4000-8000-000000000001", "project_id": "c0ffee"}}
VERSIONS = {{"versions": [{{"id": "v2.0", "status": "CURRENT",
            "links": [{{"rel": "self", "href": "http://127.0.0.1:9696/v2.0/"}}]}}]}}
def say(what):
    return reply(json.dumps(what).encode(), headers=["Content-Type: application/json"])
def neutron(asked):
    mine = any(one in asked.target.decode() for one in ("10.0.0.5", PORT["id"]))
    return say({{"ports": [PORT] if mine else []}} if b"/ports" in asked.target else VERSIONS)
def nova(asked):
    return say({{"uuid": asked.values("x-instance-id")[0].decode()}})
Recorder(port=8775, default=nova, secret={_SECRET!r}).listen()
Recorder(port=9696, default=neutron).listen()
"""
_FILES: Final = {
    "/etc/neutron/neutron.conf": "[DEFAULT]\nstate_path = /var/lib/neutron\n",
    "/etc/neutron/metadata_agent.ini": (
        f"[DEFAULT]\nnova_metadata_host = 127.0.0.1\nmetadata_proxy_shared_secret = {_SECRET}\n"
    ),
    "/etc/neutron/neutron_ovn_metadata_agent.ini": (
        f"[DEFAULT]\nmetadata_proxy_shared_secret = {_SECRET}\n"
        "[ovn]\novn_sb_connection = tcp:192.0.2.1:6642\n"
    ),
    "/etc/openstack/clouds.yaml": (
        "clouds:\n  imdsproxy:\n    auth_type: none\n"
        "    network_endpoint_override: http://127.0.0.1:9696\n"
    ),
    f"/opt/neutron/{_AGENT}": SQUATTER,
    f"/opt/neutron/{_OVN_AGENT}": SQUATTER,
    "/opt/neutron/others": _OTHERS,
    f"/etc/systemd/system/{_AGENT}.service": _SERVICE,
    f"/etc/systemd/system/{_OVN_AGENT}.service": _SERVICE,
}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A host of OpenStack's, whose agent runs; imdsproxy is installed and was never started."""
    with installed(tmp_path) as daemon:
        machine = daemon.machine
        machine.run("systemd-sysusers", "-", text=_ACCOUNT)
        machine.run("install", "-d", "-o", "neutron", "-g", "neutron", "/var/lib/neutron")
        for path, text in _FILES.items():
            machine.write(path, text)
        machine.run("chmod", "600", "/etc/openstack/clouds.yaml")
        path = f"--setenv=PYTHONPATH={REPOSITORY}/tests"
        machine.run("systemd-run", path, sys.executable, "/opt/neutron/others")
        ask = ("curl", "--silent", "http://127.0.0.1:9696")
        until(lambda: machine.attempt(*ask)[0] == 0, within_s=_WITHIN_S, what="Neutron")
        machine.run("systemctl", "enable", "--now", _AGENT)
        until(lambda: _says(machine) == "foreign", within_s=_WITHIN_S, what="the agent")
        yield machine


def _says(machine: Machine) -> str:
    """What a guest's proxy is told, which runs as the agents do."""
    _, said = machine.attempt(
        *("setpriv", "--reuid=neutron", "--regid=neutron", "--clear-groups"),
        *("curl", "--silent", "--http1.1", "--unix-socket", _SOCKET, "--max-time", "20"),
        *("--header", f"X-Neutron-Network-ID: {_NETWORK}", "--header", "X-Forwarded-For: 10.0.0.5"),
        "http://metadata/openstack/latest/meta_data.json",
    )
    return said


def _ours(machine: Machine) -> bool:
    return "0d1c2b3a-0000-4000-8000-000000000001" in _says(machine)


def _run(machine: Machine, blocks: list[Block]) -> str:
    """Do what the document says, each block as a newcomer copies it."""
    return "".join(machine.run("bash", "-euo", "pipefail", "-c", one.script) for one in blocks)


def _blocks(heading: str) -> list[Block]:
    found = blocks_of(_PAGE, heading)
    assert found, heading
    return found


def _ready(machine: Machine) -> bool:
    return machine.attempt("imdsproxy", "status", "--check")[0] == 0


def test_a_host_moves_over_and_back_by_the_documents_commands(machine: Machine) -> None:
    taken = _run(machine, _blocks("### 2. Take over the agent's settings"))
    assert "written: /etc/imdsproxy/nova.secret" in taken
    assert _SECRET not in taken
    _run(machine, _blocks("### 3. Say where Neutron is"))
    checked = _run(machine, _blocks("### 4. Check"))
    assert f"{_AGENT} (pid" in checked
    assert "wrong" not in checked

    status, *asked = _blocks("### 5. Start")
    started = _run(machine, [status])
    assert "not ready" in started
    assert "0d1c2b3a-0000-4000-8000-000000000001" in _run(machine, asked)
    assert _says(machine) == "foreign"

    _run(machine, _blocks("### 6. Let go of the agent"))
    until(lambda: _ours(machine), within_s=_WITHIN_S, what="imdsproxy's answer")
    until(lambda: _ready(machine), within_s=_WITHIN_S, what="being ready")
    seen = _run(machine, _blocks("### 7. See that it works"))
    assert "imdsproxy_unix_listener_serving 1.0" in seen
    assert "verdict" in seen
    assert machine.run("stat", "--format=%U %a", _SOCKET) == "neutron 644"

    back, stay = _blocks("## Going back")
    _run(machine, [back])
    until(lambda: _says(machine) == "foreign", within_s=_WITHIN_S, what="the agent's answer")
    until(lambda: not _ready(machine), within_s=_WITHIN_S, what="its being told")
    # Nothing of ours fights for it.
    machine.run("systemctl", "restart", CONTROLLER)
    machine.run("systemctl", "restart", "imdsproxy-haproxy.service")
    assert _says(machine) == "foreign"

    _run(machine, [stay])
    assert _says(machine) == "foreign"
    assert machine.run("systemctl", "is-enabled", _AGENT) == "enabled"
    until(
        lambda: {machine.unit(unit, "ActiveState") for unit in UNITS} == {"inactive"},
        within_s=_WITHIN_S,
        what="the end of our units",
    )


def test_with_ovn_a_host_moves_over_and_back_while_its_agent_runs_on(machine: Machine) -> None:
    machine.run("systemctl", "disable", "--now", _AGENT)
    machine.run("systemctl", "enable", "--now", _OVN_AGENT)
    until(lambda: _says(machine) == "foreign", within_s=_WITHIN_S, what="the agent")
    settings, look, take, back = _blocks("## Where OVN's agent stays")
    assert "unix_listener.take_over: true" in _run(machine, [settings])
    _run(machine, _blocks("### 3. Say where Neutron is"))
    checked = _run(machine, _blocks("### 4. Check"))
    assert f"{_OVN_AGENT} (pid" in checked
    assert "takes the path over" in checked
    assert "wrong" not in checked

    _run(machine, [look])
    _run(machine, _blocks("### 5. Start"))
    assert _says(machine) == "foreign"
    agent = machine.main_pid(_OVN_AGENT)
    _run(machine, [take])
    until(lambda: _ours(machine), within_s=_WITHIN_S, what="imdsproxy's answer")
    until(lambda: _ready(machine), within_s=_WITHIN_S, what="being ready")
    assert machine.main_pid(_OVN_AGENT) == agent
    assert f"(pid {agent})" in machine.run("imdsproxy", "status")
    assert machine.run("stat", "--format=%U %a", _SOCKET) == "neutron 644"
    assert "imdsproxy's HAProxy listens at" in _run(machine, _blocks("### 4. Check"))

    machine.run("systemctl", "restart", _OVN_AGENT)
    until(lambda: _ours(machine), within_s=_WITHIN_S, what="imdsproxy's answer")
    # Whoever starts HAProxy: with or without a controller, whatever the agent did meanwhile.
    machine.run("systemctl", "restart", CONTROLLER)
    assert _ours(machine)
    machine.run("systemctl", "stop", CONTROLLER)
    machine.run("systemctl", "restart", _OVN_AGENT)
    until(lambda: _says(machine) == "foreign", within_s=_WITHIN_S, what="the agent's answer")
    machine.run("systemctl", "restart", "imdsproxy-haproxy.service")
    until(lambda: _ours(machine), within_s=_WITHIN_S, what="imdsproxy's answer")
    machine.run("systemctl", "restart", _OVN_AGENT)
    until(lambda: _says(machine) == "foreign", within_s=_WITHIN_S, what="the agent's answer")
    machine.run("systemctl", "start", CONTROLLER)
    until(lambda: _ours(machine), within_s=_WITHIN_S, what="imdsproxy's answer")

    _run(machine, [back])
    until(lambda: _says(machine) == "foreign", within_s=_WITHIN_S, what="the agent's answer")
    until(lambda: not _ready(machine), within_s=_WITHIN_S, what="its being told")
    machine.run("systemctl", "restart", CONTROLLER)
    assert _says(machine) == "foreign"
    machine.run("systemctl", "disable", CONTROLLER)
    machine.run("imdsproxy", "stop", "--data-plane")
    assert _says(machine) == "foreign"
