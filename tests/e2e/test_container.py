"""The container image: from its archive to its end on a host whose Podman runs it, by the page that says how."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import pytest

from support.container import CAPABILITIES, RECIPE, build_image, podman_machine
from support.document_blocks import find_fault, script_of
from support.guest import IPV6, Guest
from support.how_to import HOME, PAGES, page_blocks
from support.lab import until
from support.ovn_machine import AGENTS_FILES, DEVICE, NAMESPACE, start_ovn
from support.packages import build_packages
from support.patience import patience
from support.systemd_daemon import UnitDaemon, serves, wait_served
from support.systemd_machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

_PAGE: Final = "container.md"
_HOSTNAME: Final = "/latest/meta-data/hostname"
_TOKEN: Final = "X-aws-ec2-metadata-token"
_UNIT: Final = "imdsproxy.service"
_SETTINGS: Final = "/etc/imdsproxy"
_DROP_INS: Final = "/etc/containers/systemd/imdsproxy.container.d"
_ACCOUNT: Final = "51690"
_ADMIN_GROUP: Final = "51691"
_GAP_S: Final = 10.0


@dataclass(slots=True)
class Operator:
    """Who has Podman, the archive and the unit, and follows the page."""

    machine: Machine
    archive: str

    def follow(self, heading: str) -> None:
        """Do what the page says below a heading."""
        blocks = [one for one in page_blocks(_PAGE, heading) if "apt-get" not in one.script]
        self.machine.write("/srv/page", script_of(blocks))
        command = f"cd {HOME} && exec timeout 200 bash -euo pipefail /srv/page"
        status, output = self.machine.attempt("sh", "-c", command, within_s=210)
        assert find_fault(blocks, status, output) == ""

    def granted(self) -> set[str]:
        """The capabilities that the container's processes can have."""
        words = self.machine.run("podman", "inspect", "--format={{.BoundingCaps}}", "imdsproxy")
        return set(words.strip("[]").split())

    def processes(self) -> list[dict[str, str]]:
        """The status of each process of the container (proc_pid_status(5))."""
        script = """for pid in $(podman top imdsproxy hpid | tail -n +2); do
            cat "/proc/$pid/status"; echo @@
        done"""
        parts = self.machine.run("sh", "-eu", "-c", script).split("@@")[:-1]
        return [
            dict(line.partition(":\t")[::2] for line in part.strip().splitlines()) for part in parts
        ]


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    image = build_image(build_packages())
    with podman_machine(tmp_path_factory.mktemp("machine")) as machine:
        files = (
            str(image),
            *(str(RECIPE / name) for name in ("imdsproxy.container", "openstack.conf")),
        )
        machine.run("install", "-D", "-m", "644", "-t", HOME, *files)
        yield Operator(machine, f"{HOME}/{image.name}")


def test_from_the_archive_to_a_served_guest_an_upgrade_and_an_end_as_the_page_says(
    operator: Operator,
) -> None:
    machine, daemon = operator.machine, UnitDaemon(operator.machine)
    blue = daemon.plug_in_one("blue", "fa:16:3e:00:00:01")

    operator.follow("## Run it")
    green = daemon.plug_in_behind_a_bridge("green", "fa:16:3e:00:00:03")
    daemon.put({"green": {"bridge": "br-green"}}, [green])
    wait_served(green)
    assert blue.ask(_HOSTNAME, to=IPV6).text == "web-1"
    assert daemon.status()["not_served"] == []
    token = _token(blue)

    operator.follow("## Watch it")
    assert '"a worker answers"' in machine.journal("imdsproxy"), "the document server's log"
    assert operator.granted() == CAPABILITIES
    workers = [one for one in operator.processes() if one["Uid"].split()[0] == _ACCOUNT]
    assert len(workers) == 3
    assert {int(one["CapEff"], 16) for one in workers} == {0}

    accounts = machine.run("podman", "exec", "imdsproxy", "getent", "passwd", "haproxy")
    groups = machine.run("podman", "exec", "imdsproxy", "getent", "group", "imdsproxy")
    assert accounts.split(":")[2:4] == [_ACCOUNT, _ACCOUNT]
    assert groups.split(":")[2] == _ADMIN_GROUP
    machine.run("test", "-e", f"/run/systemd/generator/multi-user.target.wants/{_UNIT}")

    before = machine.main_pid(_UNIT)
    machine.run("podman", "kill", "imdsproxy")
    until(lambda: machine.main_pid(_UNIT) not in (0, before), within_s=30, what="the next one")
    daemon.wait_active(_UNIT, within_s=60)
    wait_served(green)
    assert daemon.status()["not_served"] == []

    with ThreadPoolExecutor(1) as pool:
        upgrade = pool.submit(operator.follow, "## Upgrade")
        until(lambda: not serves(green), within_s=60, what="the first container's end")
        gap_s = until(lambda: serves(green), within_s=60, what="the second container's service")
        upgrade.result()
    print(f"guests had no answer for {gap_s:.1f} s")  # noqa: T201 - shown with -s
    assert gap_s < _GAP_S * patience()
    assert blue.ask(_HOSTNAME, headers=(f"{_TOKEN}: {token}",)).text == "web-1"

    operator.follow("## Stop it")
    assert machine.unit(_UNIT, "Result") == "success"
    assert machine.unit(_UNIT, "ExecMainStatus") == "0"
    assert not [name for name in machine.run("ip", "netns", "list").split() if "imds" in name]
    assert "imds" not in machine.run("nft", "list", "tables")
    assert "haproxy" not in machine.run("ps", "-eo", "args")

    machine.write("/etc/imdsproxy/imdsproxy.yaml", "nonsense: 1\n")
    assert machine.attempt("systemctl", "start", _UNIT)[0] != 0
    assert machine.unit(_UNIT, "ActiveState") == "failed"
    assert machine.unit(_UNIT, "NRestarts") == "0"
    assert "nonsense" in machine.journal(_UNIT)


def test_on_a_node_with_ovn_it_makes_each_networks_namespace_which_the_host_sees(
    operator: Operator,
) -> None:
    machine = operator.machine
    ovn = start_ovn(machine)
    for name, text in AGENTS_FILES.items():
        machine.write(f"/etc/kolla/neutron-ovn-metadata-agent/{name}", text)
    # What another test has left: a node of OpenStack makes no documents of its own.
    machine.run("rm", "-rf", f"{_SETTINGS}/imdsproxy.yaml", "/var/lib/imdsproxy")
    try:
        operator.follow("## On a node of OpenStack")
        ovn.wait_served()
        assert ovn.namespaces() == [NAMESPACE]
        assert machine.run("ovs-vsctl", "port-to-br", DEVICE) == "br-int"
        assert operator.granted() == CAPABILITIES
    finally:
        machine.attempt("systemctl", "stop", _UNIT)
        machine.run("rm", "-rf", f"{_SETTINGS}/conf.d", f"{_SETTINGS}/nova.secret", _DROP_INS)
        machine.attempt("ip", "netns", "delete", NAMESPACE)


def test_a_container_without_a_controller_that_answers_is_not_healthy(operator: Operator) -> None:
    image = "localhost/imdsproxy:latest"
    operator.machine.run("podman", "load", "--quiet", "--input", operator.archive)
    operator.machine.run(
        *("podman", "run", "--detach", "--rm", "--name=idle", "--network=host"),
        *("--entrypoint=sleep", image, "infinity"),
    )
    try:
        status, output = operator.machine.attempt("podman", "healthcheck", "run", "idle")
        assert status == 1, output
    finally:
        operator.machine.run("podman", "rm", "--force", "--time=0", "idle")


def test_the_page_says_what_each_capability_of_the_unit_is_for() -> None:
    page = (PAGES / _PAGE).read_text().partition("## What it may do")[2]
    assert set(re.findall(r"`(CAP_\w+)`", page)) == CAPABILITIES


def _token(guest: Guest) -> str:
    return guest.ask(
        "/latest/api/token", method="PUT", headers=(f"{_TOKEN}-ttl-seconds: 600",)
    ).text
