"""Which processes are taken for an agent of Neutron's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.errors import ConfigUnreadable, FileUntrusted, RequestRefused
from imdsproxy.host.process import read_arguments
from imdsproxy.tools.takeover.agents import edit_file, find_agents, read_file
from imdsproxy.tools.takeover.genuine import (
    Candidate,
    container_in,
    explain_doubt,
    is_container_of,
    is_unit_of,
    read_group,
    unit_in,
)
from imdsproxy.tools.takeover.seen import Reach
from support.lab import until

_ID: Final = "0123456789abcdef" * 4
_NOBODY: Final = 65534


@pytest.mark.parametrize(
    ("cgroup", "unit", "container"),
    [
        ("0::/system.slice/neutron-l3-agent.service\n", "neutron-l3-agent.service", ("", "")),
        # OpenStack-Ansible has a slice of its own.
        ("0::/neutron.slice/neutron-l3-agent.service", "neutron-l3-agent.service", ("", "")),
        (f"0::/system.slice/docker-{_ID}.scope", "", ("docker", _ID)),
        (f"0::/docker/{_ID}", "", ("docker", _ID)),
        (f"0::/machine.slice/libpod-{_ID}.scope/container", "", ("libpod", _ID)),
        (
            f"0::/system.slice/edpm_x.service/libpod-payload-{_ID}",
            "edpm_x.service",
            ("", ""),
        ),
        # What a user's own manager names, a container's, or a session.
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/neutron-l3-agent.service",
            "user@1000.service",
            ("", ""),
        ),
        (
            f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{_ID}.scope",
            "user@1000.service",
            ("", ""),
        ),
        ("0::/machine.slice/machine-a.scope/system.slice/neutron-l3-agent.service", "", ("", "")),
        ("0::/lxc.payload.a/system.slice/neutron-l3-agent.service", "", ("", "")),
        ("0::/", "", ("", "")),
        ("", "", ("", "")),
    ],
)
def test_a_process_belongs_to_what_the_systems_manager_or_an_engine_has_made(
    cgroup: str, unit: str, container: tuple[str, str]
) -> None:
    group = read_group(cgroup, "0::/init.scope\n")
    assert (unit_in(group), container_in(group)) == (unit, container)


@pytest.mark.parametrize(
    ("manager", "unit"),
    [
        ("1:name=systemd:/init.scope\n0::/\n", "old.service"),
        ("1:name=systemd:/\n0::/init.scope\n", "new.service"),
    ],
)
def test_the_hierarchy_that_counts_is_the_one_of_the_systems_manager(
    manager: str, unit: str
) -> None:
    text = "2:cpu:/cpu.service\n1:name=systemd:/system.slice/old.service\n0::/a.slice/new.service\n"
    assert unit_in(read_group(text, manager)) == unit


def test_the_groups_of_a_system_within_another_ones_group_begin_where_its_manager_is() -> None:
    manager = "0::/lxc/node/init.scope\n"
    own = read_group("0::/lxc/node/system.slice/neutron-l3-agent.service\n", manager)
    assert unit_in(own) == "neutron-l3-agent.service"
    others = read_group("0::/lxc/other/system.slice/neutron-l3-agent.service\n", manager)
    assert unit_in(others) == ""


@pytest.mark.parametrize(
    "unit",
    [
        "neutron-l3-agent.service",
        "openstack-neutron-l3-agent.service",
        "kolla-neutron_l3_agent-container.service",
        "container-neutron_l3_agent.service",
        "tripleo_neutron_l3_agent.service",
        "devstack@q-l3.service",
        "devstack@neutron-l3-agent.service",
        "snap.openstack-hypervisor.neutron-l3-agent.service",
    ],
)
def test_units_of_each_deployment_are_known(unit: str) -> None:
    assert is_unit_of("neutron-l3-agent", unit)
    assert not is_unit_of("neutron-dhcp-agent", unit)


def test_a_unit_or_container_of_another_program_is_none_of_the_agents() -> None:
    ovn = "neutron-ovn-metadata-agent"
    assert is_unit_of(ovn, "edpm_ovn_metadata_agent.service")
    assert is_container_of(ovn, "/neutron_ovn_metadata_agent")
    assert is_container_of(ovn, "ovn_metadata_agent")
    for unit in ("isc-dhcp-server.service", "dhcp.service.d", "neutron-dhcp-agent-x.service", ""):
        assert not is_unit_of("neutron-dhcp-agent", unit)
    assert not is_container_of(ovn, "neutron_ovn_metadata_agent_haproxy_ovnmeta-a")
    assert not is_container_of(ovn, "")


_GENUINE: Final = Candidate(
    pid=7,
    program="neutron-l3-agent",
    users=frozenset({115}),
    own_users=False,
    group="neutron-l3-agent.service",
    container="",
    accounts=frozenset({0, 115}),
)


@pytest.mark.parametrize(
    ("candidate", "doubt"),
    [
        (_GENUINE, ""),
        (replace(_GENUINE, users=frozenset({0})), ""),
        (replace(_GENUINE, group=f"docker-{_ID}.scope", container="/neutron_l3_agent"), ""),
        (replace(_GENUINE, users=frozenset({1000})), "runs as user 1000"),
        # A program with the setuid bit has its caller's real user.
        (replace(_GENUINE, users=frozenset({0, 1000})), "runs as user 1000"),
        (replace(_GENUINE, group="session-3.scope"), "belongs to session-3.scope"),
        (replace(_GENUINE, group=f"docker-{_ID}.scope", container="/evil"), "belongs to /evil"),
        (replace(_GENUINE, group=""), "belongs to no control group"),
        (replace(_GENUINE, own_users=True), "its own user namespace"),
    ],
)
def test_an_agent_is_root_or_neutron_in_a_unit_or_container_of_the_agents(
    candidate: Candidate, doubt: str
) -> None:
    assert doubt in explain_doubt(candidate, named=False)
    assert bool(doubt) == bool(explain_doubt(candidate, named=False))


def test_an_operator_may_name_the_process_but_not_whose_it_is() -> None:
    named = replace(_GENUINE, group="session-3.scope")
    assert not explain_doubt(named, named=True)
    assert explain_doubt(replace(named, users=frozenset({_NOBODY})), named=True)
    assert explain_doubt(replace(named, own_users=True), named=True)


@contextmanager
def _running(user: int, *options: str) -> Iterator[int]:
    """A genuine process with the command line of an L3 agent."""
    words = ["neutron-l3-agent", "-c", "import time; time.sleep(600)", *options]
    executable = os.path.realpath(sys.executable)
    process = subprocess.Popen(words, executable=executable, user=user, group=user)
    try:
        until(lambda: read_arguments(process.pid)[:1] == ("neutron-l3-agent",))
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.root
def test_another_users_process_with_an_agents_command_line_is_no_agent(tmp_path: Path) -> None:
    evil = tmp_path / "evil.conf"
    evil.write_text("[DEFAULT]\nnova_metadata_host = 192.0.2.66\n")
    with _running(_NOBODY, "--config-file", str(evil)) as pid:
        agents, suspects = find_agents(["neutron-l3-agent"])
        assert pid not in [agent.pid for agent in agents]
        assert pid in [suspect.pid for suspect in suspects]
        agents, suspects = find_agents(["neutron-l3-agent"], pid)
        assert agents == ()
        (suspect,) = suspects
        assert f"runs as user {_NOBODY}" in suspect.reason


@pytest.mark.root
def test_an_agent_that_the_operator_names_has_files_that_nobody_else_can_change(
    tmp_path: Path,
) -> None:
    directory, settings = tmp_path / "conf.d", tmp_path / "l3_agent.ini"
    directory.mkdir()
    for file in (settings, directory / "a.conf", directory / "a.txt"):
        file.write_text("[DEFAULT]\n")
    settings.chmod(0o640)
    options = ("--config-file", str(settings), f"--config-dir={directory}")
    with _running(0, *options) as pid:
        agents, _ = find_agents(["neutron-l3-agent"], pid)
        (agent,) = agents
        assert (agent.account, agent.reach) == ("root", Reach())
        assert agent.files == (str(settings), str(directory / "a.conf"))
        edit_file(str(settings), agent.reach, lambda text: text + "a = b\n")
        assert read_file(str(settings), agent.reach) == b"[DEFAULT]\na = b\n"
        assert settings.stat().st_mode & 0o777 == 0o640
        os.chown(settings, _NOBODY, 0)
        with pytest.raises(FileUntrusted):
            read_file(str(settings), agent.reach)
        with pytest.raises(FileUntrusted):
            edit_file(str(settings), agent.reach, str.upper)
        with pytest.raises(RequestRefused, match=f"process {os.getpid()} is not neutron-l3-agent"):
            find_agents(["neutron-l3-agent"], os.getpid())


@pytest.mark.root
def test_a_relative_path_on_a_command_line_is_refused() -> None:
    with ExitStack() as stack:
        pid = stack.enter_context(_running(0, "--config-file", "evil.conf"))
        with pytest.raises(ConfigUnreadable, match="is relative to its working directory"):
            find_agents(["neutron-l3-agent"], pid)
