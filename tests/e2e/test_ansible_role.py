"""The Ansible role, by its page: on a blank Debian 13 with a bridge, and a namespace for a guest."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.demonstration import REPOSITORY
from support.document_blocks import Block, blocks_of, missing_lines
from support.lab import run
from support.packages import build_packages
from support.systemd_machine import Machine, systemd_machine
from support.vm.newcomer import blank_tree

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

_PAGE: Final = REPOSITORY / "docs/how-to/ansible.md"
_HOME: Final = "/srv/control"
_PLAY_S: Final = 200
_INVENTORY: Final = """\
[kvm]
kvm1 ansible_connection=local ansible_become=false ansible_python_interpreter=/usr/bin/python3
"""
_MAKE_S: Final = 300
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
def programs() -> Path:
    """Ansible's, as `requirements/ansible.txt` pins them."""
    shell = f". {REPOSITORY}/script/lib.sh; pinned_venv ansible"
    return Path(run("bash", "-c", shell, "script/test", timeout_s=_MAKE_S).strip()) / "bin"


@pytest.fixture(scope="module")
def control(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A blank host with what Ansible needs there, which is also where Ansible runs, in the page's directory."""
    deb = build_packages().deb
    work = tmp_path_factory.mktemp("host")
    with systemd_machine(work, lower=blank_tree()) as machine:
        machine.run("sh", "-c", _HOST)
        machine.run("mkdir", "-p", _HOME)
        machine.run("install", "-m", "644", str(deb), f"{_HOME}/")
        machine.run("ln", "-s", str(REPOSITORY), f"{_HOME}/imdsproxy")
        machine.write(f"{_HOME}/hosts", _INVENTORY)
        (playbook,) = re.findall(
            r"^```yaml\n(.*?)^```", _PAGE.read_text(), re.DOTALL | re.MULTILINE
        )
        machine.write(f"{_HOME}/site.yml", playbook)
        machine.write(
            "/usr/local/bin/ansible-playbook", f'#!/bin/sh\nexec {programs}/ansible-playbook "$@"\n'
        )
        machine.run("chmod", "755", "/usr/local/bin/ansible-playbook")
        yield machine


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


def _refuses_a_wrong_setting(machine: Machine, converge: Block) -> None:
    wrong = Block(0, converge.script + """ --extra-vars '{"imdsproxy_settings": {"polcy": {}}}'""")
    status, output = _follow(machine, wrong)
    assert status == 2
    assert "there is no such setting" in output
    assert _ask(machine).strip().endswith("401")


def test_the_role_is_as_ansible_lint_wants_it_in_production(programs: Path) -> None:
    done = subprocess.run(
        (str(programs / "ansible-lint"),),
        cwd=REPOSITORY / "packaging/ansible",
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
