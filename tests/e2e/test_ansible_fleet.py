"""The Ansible roles of a fleet, by their page: two machines with hubs, of which one is a host too, and a genuine etcd.

Ansible runs beside them. What it takes for ssh enters a machine's namespaces.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from support.ansible import playbook_of, programs
from support.certificates import make_authority
from support.demonstration import REPOSITORY
from support.document_blocks import Block, blocks_of, missing_lines
from support.lab import ip, run
from support.packaged_daemon import machine_with_dependencies
from support.packages import build_packages
from support.patience import patience
from support.systemd_machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(1200)]

_PAGE: Final = REPOSITORY / "docs/how-to/ansible-fleet.md"
_PLAY_S: Final = 200
_NAMES: Final = (
    "192.0.2.1 hub1.example.net etcd1.example.net\n192.0.2.2 hub2.example.net kvm1.example.net\n"
)
_FIRST, _SECOND = "hub1.example.net", "hub2.example.net"
_HOST: Final = "kvm1.example.net"
_URL: Final = "https://hub1.example.net:8469"


@dataclass(slots=True)
class Site:
    """Where Ansible runs, and the machines."""

    directory: Path
    first: Machine
    second: Machine

    def play(self, script: str) -> tuple[int, str]:
        """Run a block of the page: its status, and what it printed."""
        environment = {
            **os.environ,
            "PATH": f"{programs()}:{os.environ['PATH']}",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",
            # With all that modules are given and answer, but for secrets.
            "ANSIBLE_VERBOSITY": "3",
            "ANSIBLE_LOCAL_TEMP": str(self.directory / "tmp"),
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],  # noqa: S607 - the page is for it
            cwd=self.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_PLAY_S * patience(),
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    packages = build_packages()
    works = [tmp_path_factory.mktemp(f"hub{number}") for number in (1, 2)]
    with (
        machine_with_dependencies(works[0], packages) as first,
        machine_with_dependencies(works[1], packages) as second,
    ):
        made = Site(directory, first, second)
        _connect(first, second)
        _start_etcd(made)
        run("install", "-m", "644", str(packages.deb), f"{directory}/")
        (directory / "imdsproxy").symlink_to(REPOSITORY)
        (directory / "fleet.yml").write_text(playbook_of(_PAGE))
        _write_inventory(made)
        yield made


def _connect(first: Machine, second: Machine) -> None:
    ip(
        "link",
        "add",
        "lan",
        "netns",
        str(first.init),
        "type",
        "veth",
        "peer",
        "name",
        "lan",
        "netns",
        str(second.init),
    )
    for number, machine in ((1, first), (2, second)):
        machine.run("ip", "link", "set", "lan", "up")
        machine.run("ip", "address", "add", f"192.0.2.{number}/24", "dev", "lan")
        machine.run("sh", "-c", "cat >>/etc/hosts", text=_NAMES)


def _start_etcd(site: Site) -> None:
    authority = make_authority(site.directory, "etcd-ca")
    authority.issue("member", names=["DNS:etcd1.example.net"], subject="/")
    authority.issue("etcd-client", names=["DNS:etcd-client.example.net"], subject="/")
    for name in ("etcd-ca.crt", "member.crt", "member.key"):
        site.first.write(f"/etc/etcd/{name}", (site.directory / name).read_text())
    flags = {
        "data-dir": "/var/lib/etcd-here",
        "listen-client-urls": "https://0.0.0.0:2379",
        "advertise-client-urls": "https://etcd1.example.net:2379",
        "listen-client-http-urls": "https://0.0.0.0:2378",
        "trusted-ca-file": "/etc/etcd/etcd-ca.crt",
        "cert-file": "/etc/etcd/member.crt",
        "key-file": "/etc/etcd/member.key",
        "client-cert-auth": "true",
    }
    words = (f"--{name}={value}" for name, value in flags.items())
    site.first.run("systemd-run", "--collect", "--unit=etcd-here", "etcd", *words)


def _write_inventory(site: Site) -> None:
    lines = []
    for group, members in (("hubs", (_FIRST, _SECOND)), ("kvm", (_HOST,))):
        lines.append(f"[{group}]")
        for name in members:
            machine = site.first if name == _FIRST else site.second
            enter = site.directory / f"enter-{name}"
            # The last word is the command; Ansible gives the options of ssh before.
            words = " ".join(machine.arguments("env", "HOME=/root", "sh", "-c"))
            enter.write_text(f'#!/bin/sh\nfor last; do :; done\nexec {words} "$last"\n')
            enter.chmod(0o755)
            lines.append(
                f"{name} ansible_become=false ansible_python_interpreter=/usr/bin/python3 "
                f"ansible_ssh_executable={enter} ansible_ssh_transfer_method=piped"
            )
    (site.directory / "hosts").write_text("\n".join(lines) + "\n")


def test_the_roles_make_a_fleet_as_their_page_says_and_refuse_what_is_wrong(site: Site) -> None:
    copy, converge, again, check, rejoin = blocks_of(_PAGE, _PAGE.read_text().partition("\n")[0])
    printed = [_follows(site, block) for block in (copy, converge, again)]
    assert _hosts(site) == {"kvm1": "enrolled"}
    status, output = site.play(f"{check.script} --limit {_HOST}")
    assert status == 0, output
    assert "changed=0" in output

    for secret in ("ca.key", "envelope.key"):
        text = site.first.run("cat", f"/etc/imdsproxy/fleet/{secret}")
        assert site.second.run("cat", f"/etc/imdsproxy/fleet/{secret}") == text
        longest = max(text.split(), key=len)
        assert not [one for one in printed if longest in one]
    assert site.first.attempt("sh", "-c", "ls -d /root/imdsproxy-*")[0] != 0

    wrong = """ --limit hub1.example.net --extra-vars '{"imdsproxy_hub_settings": {"lisen": []}}'"""
    status, output = site.play(converge.script + wrong)
    assert status == 2
    assert "there is no such setting" in output

    site.first.run("imdsproxy", "--fleet", _URL, "fleet", "revoke", "kvm1")
    status, output = site.play(f"{converge.script} --limit {_HOST}")
    assert status == 2
    assert "the fleet has revoked kvm1" in " ".join(output.split())
    status, output = site.play(f"{rejoin.script}")
    assert status == 0, output
    assert _hosts(site) == {"kvm1": "enrolled"}


def _hosts(site: Site) -> Mapping[str, str]:
    """The state of each host that is connected to a hub."""
    found = json.loads(site.first.run("imdsproxy", "--fleet", _URL, "--json", "fleet", "hosts"))
    return {one["host"]: one["state"] for one in found if one["hub"]}


def _follows(site: Site, block: Block) -> str:
    status, output = site.play(block.script)
    assert status == 0, output
    assert missing_lines(block, output) == [], output
    return output
