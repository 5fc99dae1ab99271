"""The Ansible role, by its pages: on a blank Debian 13 with a bridge, and on a node of OpenStack with a genuine OVN.

The node's agent is a stand-in with its unit, its files and a HAProxy in each network's namespace.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.ansible import playbook_of, programs
from support.demonstration import REPOSITORY
from support.document_blocks import Block, blocks_of, missing_lines
from support.ovn_machine import AGENTS_FILES, NAMESPACE, OvnMachine, start_ovn
from support.packaged_daemon import machine_with_dependencies
from support.packages import build_packages
from support.systemd_machine import Machine, systemd_machine
from support.vm.newcomer import blank_tree

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

_PAGE: Final = REPOSITORY / "docs/how-to/ansible.md"
_NODE_PAGE: Final = REPOSITORY / "docs/how-to/openstack-deployments.md"
_AGENT: Final = "neutron-ovn-metadata-agent"
_HOME: Final = "/srv/control"
_PLAY_S: Final = 200
_INVENTORY: Final = """\
[kvm]
kvm1 ansible_connection=local ansible_become=false ansible_python_interpreter=/usr/bin/python3
"""
_NODES: Final = _INVENTORY.replace("kvm1", "compute1").replace("kvm", "compute")
_SERVICE: Final = f"""
[Service]
ExecStart=/bin/sh /usr/bin/{_AGENT} --config-file /etc/neutron/neutron.conf \\
    --config-file /etc/neutron/neutron_ovn_metadata_agent.ini
[Install]
WantedBy=multi-user.target
"""
_PROGRAM: Final = """
cat >/run/agent.cfg <<END
defaults
    mode http
    timeout client 9s
    timeout connect 9s
    timeout server 9s
listen metadata
    bind 169.254.169.254:80
    http-request return status 200 content-type text/plain string foreign
END
while sleep 0.2; do
    for place in /run/netns/ovnmeta-*; do
        [ -e "$place" ] || continue
        name=${place##*/}
        [ -e "/run/$name.pid" ] && kill -0 "$(cat "/run/$name.pid")" ||
            ip netns exec "$name" haproxy -D -f /run/agent.cfg -p "/run/$name.pid"
    done
done
"""
_HOST: Final = """
set -eu
apt-get --yes --quiet=2 --no-install-recommends install python3 python3-apt curl
ip link add br0 type bridge
ip link set br0 up
ip address add 10.0.0.1/24 dev br0
ip netns add guest
ip link add tap0 up master br0 type veth peer name eth0 address 52:54:00:12:34:56 netns guest
ip -n guest link set eth0 up
ip -n guest address add 10.0.0.11/24 dev eth0
ip -n guest route add default via 10.0.0.1
"""


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A blank host with what Ansible needs there, which is also where Ansible runs, in the page's directory."""
    work = tmp_path_factory.mktemp("host")
    with systemd_machine(work, lower=blank_tree()) as machine:
        machine.run("sh", "-c", _HOST)
        _prepare(machine, _INVENTORY, site=playbook_of(_PAGE))
        yield machine


@pytest.fixture
def node(tmp_path: Path) -> Iterator[OvnMachine]:
    """A node with OVN and its agent, on which Ansible runs too."""
    with machine_with_dependencies(tmp_path, build_packages()) as machine:
        _prepare(machine, _NODES, openstack=playbook_of(_NODE_PAGE))
        machine.run("systemd-sysusers", "-", text="u neutron - - /var/lib/neutron\n")
        machine.run("install", "-d", "-o", "neutron", "-g", "neutron", "/var/lib/neutron")
        for name, text in AGENTS_FILES.items():
            machine.write(f"/etc/neutron/{name}", text)
        machine.write(f"/usr/bin/{_AGENT}", _PROGRAM)
        machine.write(f"/etc/systemd/system/{_AGENT}.service", _SERVICE)
        machine.run("systemctl", "enable", "--now", _AGENT)
        yield start_ovn(machine)


def _prepare(machine: Machine, inventory: str, **playbooks: str) -> None:
    machine.run("mkdir", "-p", _HOME)
    machine.run("install", "-m", "644", str(build_packages().deb), f"{_HOME}/")
    machine.run("ln", "-s", str(REPOSITORY), f"{_HOME}/imdsproxy")
    machine.write(f"{_HOME}/hosts", inventory)
    for name, text in playbooks.items():
        machine.write(f"{_HOME}/{name}.yml", text)
    machine.write(
        "/usr/local/bin/ansible-playbook", f'#!/bin/sh\nexec {programs()}/ansible-playbook "$@"\n'
    )
    machine.run("chmod", "755", "/usr/local/bin/ansible-playbook")


def _follow(machine: Machine, block: Block) -> tuple[int, str]:
    command = f"cd {_HOME} && export ANSIBLE_NOCOLOR=1 ANSIBLE_PIPELINING=1 && {block.script}"
    return machine.attempt("bash", "-euo", "pipefail", "-c", command, within_s=_PLAY_S)


def _ask(machine: Machine) -> str:
    """What a guest gets: the status, and the host name."""
    words = ("curl", "--silent", "--max-time", "8", "--write-out", " %{http_code}")
    url = "http://169.254.169.254/latest/meta-data/hostname"
    return machine.attempt("ip", "netns", "exec", "guest", *words, url)[1]


def test_the_role_installs_changes_and_removes_as_its_page_says(control: Machine) -> None:
    blocks = blocks_of(_PAGE, _PAGE.read_text().partition("\n")[0])
    copy, converge, again, change, remove = blocks
    answers = []
    for block in (copy, converge, again, change, remove):
        status, output = _follow(control, block)
        assert status == 0, output
        assert missing_lines(block, output) == [], output
        answers.append(_ask(control).strip().split("\n")[-1])
        if block is change:
            _refuses_a_wrong_setting(control, converge)
    assert answers[1:4] == ["web-1 200", "web-1 200", "401"]
    assert answers[4] == "000"
    assert control.attempt("test", "-e", "/etc/imdsproxy/records/ansible.yaml")[0] == 0


def test_the_role_takes_the_place_of_ovns_agent_on_a_node_and_gives_it_back_as_the_page_says(
    node: OvnMachine,
) -> None:
    copy, converge, again, back = blocks_of(_NODE_PAGE, "## With Ansible")
    for block in (copy, converge, again):
        _follows(node.machine, block)
    node.wait_served()
    assert node.namespaces() == [NAMESPACE]
    assert node.machine.unit(_AGENT, "ActiveState") == "inactive"
    assert node.machine.attempt("systemctl", "is-enabled", _AGENT)[1].strip() == "disabled"

    _follows(node.machine, back)
    assert node.machine.unit(_AGENT, "ActiveState") == "active"
    assert not node.is_served()


def _follows(machine: Machine, block: Block) -> None:
    status, output = _follow(machine, block)
    assert status == 0, output
    assert missing_lines(block, output) == [], output


def _refuses_a_wrong_setting(machine: Machine, converge: Block) -> None:
    wrong = Block(0, converge.script + """ --extra-vars '{"imdsproxy_settings": {"polcy": {}}}'""")
    status, output = _follow(machine, wrong)
    assert status == 2
    assert "there is no such setting" in output
    assert _ask(machine).strip().endswith("401")


def test_the_roles_are_as_ansible_lint_wants_them_in_production() -> None:
    done = subprocess.run(
        (str(programs() / "ansible-lint"),),
        cwd=REPOSITORY / "packaging/ansible",
        env={**os.environ, "PATH": f"{programs()}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
