"""The Debian package: what is in it, and its life in a machine, from its installation to its purge."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.tools.takeover.seen import STAND_IN, render_stand_in
from support.demonstration import REPOSITORY
from support.guest import Load
from support.lab import run, until
from support.packaged_daemon import PackagedDaemon, machine_with_dependencies
from support.packages import RECOMMENDED, Packages, build_packages
from support.prometheus import alerts
from support.systemd_daemon import (
    CONTROLLER,
    DOCUMENTS,
    HAPROXY,
    UNITS,
    USER_DATA,
    named,
    own_user_data,
    wait_served,
)
from support.systemd_machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

_META_DATA: Final = "/openstack/latest/meta_data.json"
_NEXT: Final = "99.0"
_STATE: Final = "/var/lib/imdsproxy"
_SETTINGS: Final = "/etc/imdsproxy"
_UNIT: Final = "/usr/lib/systemd/system/imdsproxy-haproxy.service"
# /var/tmp: a demonstration may run beside this.
_NOT_ITS: Final = (
    *("/proc", "/sys", "/tmp", "/var/tmp", "/var/log", "/var/cache/apt"),  # noqa: S108 - of the machine
    str(REPOSITORY),
)
_SUITE: Final = (
    *("api", "config", "console", "documents"),
    *("cli/test_commands.py", "cli/test_guests.py", "cli/test_records.py"),
    "cli/test_program.py::test_help_and_a_daemon_before_it_serves_load_no_more_than_they_need",
    *("sources/test_neutron_rest.py", "sources/test_record_files.py"),
    "sources/test_sources_file.py",
)
"""The unit tests of what stands on other people's libraries."""

_DEBIAN_CHANGELOG: Final = """imdsproxy (0.1.0) trixie; urgency=medium

  * Of the tests.

 -- imdsproxy maintainers <maintainers@imdsproxy.invalid>  Thu, 01 Jan 2026 00:00:00 +0000
"""
_RUN_SUITE: Final = """
import os, sys
# Behind Debian's own: of the virtual environment only what Debian's packages do not have, as pytest.
sys.path.append(sys.argv[1])
import pytest
os.chdir(sys.argv[2])
plugins = ("pytest_asyncio.plugin", "pytest_timeout", "_hypothesis_pytestplugin", "no:cacheprovider")
options = [word for plugin in plugins for word in ("-p", plugin)]
sys.exit(pytest.main(["-q", "--no-header", "--tb=short", *options, *sys.argv[3:]]))
"""


@pytest.fixture(scope="module")
def packages() -> Packages:
    return build_packages()


@pytest.fixture(scope="module")
def following() -> Packages:
    """The version after it."""
    return build_packages(_NEXT)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, packages: Packages) -> Iterator[Machine]:
    """A machine with what the package depends on; who installs the package takes it away again."""
    work = tmp_path_factory.mktemp("machine")
    with machine_with_dependencies(work, packages) as machine:
        yield machine


@pytest.fixture
def fresh(prepared: Machine) -> Iterator[PackagedDaemon]:
    """A machine without imdsproxy."""
    daemon = PackagedDaemon(prepared)
    try:
        yield daemon
    except BaseException:
        print(prepared.journal())  # noqa: T201 - pytest shows it of a test that failed
        raise
    finally:
        daemon.remove_settings_of_load()
        prepared.run("dpkg", "--purge", "imdsproxy")
        prepared.run("sh", "-c", "ip -all netns delete")


@pytest.fixture
def daemon(fresh: PackagedDaemon, packages: Packages) -> PackagedDaemon:
    """It is installed, and every guest is served."""
    fresh.plug_in()
    fresh.replace(packages)
    fresh.raise_limits()
    fresh.start()
    wait_served(*fresh.guests)
    return fresh


def processes(machine: Machine) -> list[str]:
    """The command lines of all that could be ours."""
    return [
        line
        for line in machine.run("ps", "-eo", "args").splitlines()
        if "haproxy" in line or "imdsproxy" in line
    ]


@pytest.mark.always
def test_installed_it_runs_where_no_guest_can_reach_it_beside_an_haproxy_of_others(
    fresh: PackagedDaemon, packages: Packages
) -> None:
    others = "haproxy.service"
    fresh.machine.write(f"/etc/systemd/system/{others}", "[Service]\nExecStart=sleep infinity\n")
    fresh.machine.run("systemctl", "daemon-reload")
    fresh.machine.run("systemctl", "start", others)
    before = fresh.machine.main_pid(others)
    try:
        fresh.apt_install(packages)

        assert fresh.active() == dict.fromkeys(UNITS, "active")
        assert fresh.machine.run("systemctl", "is-enabled", CONTROLLER) == "enabled"
        assert fresh.status()["readiness"]["ready"] is True
        listening = fresh.machine.run("ss", "-Htuln").splitlines()
        assert {line.split()[4] for line in listening} == {"127.0.0.1:9465", "127.0.0.1:9466"}
        fresh.command("check")
        started = [fresh.machine.run("systemctl", "cat", unit) for unit in (CONTROLLER, DOCUMENTS)]
        assert all("\nExecStart=/usr/bin/imdsproxy " in text for text in started)

        fresh.apt("purge", "imdsproxy")
        assert fresh.machine.main_pid(others) == before != 0
    finally:
        fresh.machine.run("systemctl", "stop", others)
        fresh.machine.run("rm", f"/etc/systemd/system/{others}")


def test_an_upgrade_under_load_loses_no_request_and_keeps_haproxy(
    daemon: PackagedDaemon, following: Packages
) -> None:
    before = daemon.pids()
    loads = (
        Load(daemon.guests, USER_DATA, own_user_data, connections=2),
        Load(daemon.guests, _META_DATA, named, connections=2),
        Load(daemon.guests, USER_DATA, own_user_data, keep_alive=False),
    )
    with loads[0], loads[1], loads[2]:
        for load in loads:
            load.wait_answers(50)
        said = daemon.apt_install(following)
        for load in loads:
            load.wait_answers(50)

    assert [load.report.lost for load in loads] == [[], [], []]
    assert daemon.status()["version"] == _NEXT
    assert daemon.command("version") == f"imdsproxy {_NEXT}"
    after = daemon.pids()
    assert (after[0] != before[0], after[1:]) == (True, before[1:])
    assert "HAProxy's unit has changed" not in said
    assert "Reloaded imdsproxy-documents.service" in daemon.machine.journal(DOCUMENTS)


def test_an_upgrade_keeps_what_the_operator_set_and_says_when_haproxys_unit_waits_for_a_restart(
    daemon: PackagedDaemon, following: Packages
) -> None:
    own = "# mine\nlog: {level: debug}"
    daemon.machine.write(f"{_SETTINGS}/imdsproxy.yaml", f"{own}\n")
    daemon.machine.run("systemctl", "disable", "--now", CONTROLLER)
    daemon.machine.run("sed", "-i", "s/^OOMScoreAdjust=.*/OOMScoreAdjust=-1/", _UNIT)
    haproxy = daemon.machine.main_pid(HAPROXY)

    said = daemon.replace(following)

    assert daemon.machine.run("cat", f"{_SETTINGS}/imdsproxy.yaml") == own
    assert daemon.active()[CONTROLLER] == "inactive"
    assert daemon.machine.main_pid(HAPROXY) == haproxy
    assert "systemctl restart imdsproxy-haproxy" in said
    daemon.machine.run("systemctl", "restart", HAPROXY)
    wait_served(*daemon.guests)


def test_removed_it_ends_everything_and_keeps_settings_and_state(
    daemon: PackagedDaemon, packages: Packages
) -> None:
    guest = daemon.plug_in_behind_a_bridge("green", "fa:16:3e:00:00:03")
    daemon.put({"green": {"bridge": "br-green"}}, [guest])
    wait_served(guest)

    # As after `takeover dhcp`, with an agent that this command starts.
    taken = {"dhcp": {"start": "touch /run/agent-is-started", "files": [], "owner": [0, 0]}}
    daemon.machine.write(f"{_STATE}/takeover.json", json.dumps(taken, indent=2))
    daemon.machine.write(f"{_SETTINGS}/conf.d/dhcp.yaml", "log: {level: info}\n")

    daemon.apt("remove", "imdsproxy")

    daemon.machine.run("rm", "/run/agent-is-started")
    for gone in (f"{_STATE}/takeover.json", f"{_SETTINGS}/conf.d/dhcp.yaml"):
        assert daemon.machine.attempt("ls", gone)[0] != 0
    assert processes(daemon.machine) == []
    assert set(daemon.active().values()) == {"inactive"}
    assert "imds" not in daemon.machine.run("ip", "netns", "list")
    assert daemon.machine.attempt("ls", "/run/imdsproxy")[0] != 0
    daemon.machine.run("ls", f"{_STATE}/store.sqlite", f"{_SETTINGS}/imdsproxy.yaml")

    daemon.replace(packages)
    wait_served(*daemon.guests, guest)


def _stand_in(machine: Machine) -> tuple[str, str]:
    """The program that `takeover dhcp` leaves, and a configuration that an agent starts it with."""
    path, configuration = "/usr/local/sbin/haproxy", "/run/ns-metadata-proxy/net.conf"
    machine.write(path, render_stand_in("/usr/sbin/haproxy"))
    machine.run("chmod", "755", path)
    machine.write(configuration, "pidfile /run/net.pid\nbind 169.254.169.254:80\n")
    taken = {"dhcp": {"stop": "", "start": "", "files": [], "owner": [0, 0], "stand_in": path}}
    machine.write(f"{_STATE}/takeover.json", json.dumps(taken, indent=2))
    return path, configuration


def test_removal_ends_everything_also_when_settings_are_broken_and_purge_leaves_nothing(
    daemon: PackagedDaemon,
) -> None:
    daemon.machine.write(f"{_SETTINGS}/conf.d/broken.yaml", "nonsense: 1\n")
    daemon.machine.write(f"{_SETTINGS}/records/one.yaml", "instances: []\n")
    daemon.machine.run("systemctl", "stop", CONTROLLER)
    stand_in, configuration = _stand_in(daemon.machine)
    daemon.machine.run(stand_in, "-f", configuration)
    until(lambda: STAND_IN in "".join(processes(daemon.machine)), what="the stand-in")

    said = daemon.machine.run("dpkg", "--remove", "imdsproxy")

    assert "handback dhcp" in said
    assert daemon.machine.attempt("ls", stand_in)[0] != 0
    assert "its units are ended" in said
    until(lambda: processes(daemon.machine) == [], what="the end of the stand-in")

    daemon.apt("purge", "imdsproxy")

    pruned = [word for place in _NOT_ITS for word in ("-path", place, "-prune", "-o")]
    # Not all of `/`: elsewhere this machine may have other checkouts.
    places = ("/etc", "/opt", "/run", "/srv", "/usr", "/var")
    left = daemon.machine.run("find", *places, *pruned, "-name", "*imdsproxy*", "-print")
    assert left == ""
    assert daemon.machine.attempt("dpkg-query", "--show", "imdsproxy")[0] != 0


def test_what_stands_on_libraries_works_on_debians(
    fresh: PackagedDaemon, packages: Packages
) -> None:
    # For the tests that start the program.
    fresh.replace(packages)
    site = Path(pytest.__file__).parents[1]
    suite = [f"tests/unit/{part}" for part in _SUITE]
    environment = (
        "env",
        "IMDST_INSTALLED_PROGRAMS=1",
        "PYTHONDONTWRITEBYTECODE=1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1",
        "HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis",
    )
    python = ("/usr/bin/python3", "-P", "-c", _RUN_SUITE, str(site), str(REPOSITORY))

    run_there = subprocess.run(
        fresh.machine.arguments(*environment, *python, *suite),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert run_there.returncode == 0, run_there.stdout[-6000:] + run_there.stderr[-2000:]
    assert "/usr/lib/python3/dist-packages/typer/" in fresh.machine.run(
        *python[:3], "import typer; print(typer.__file__)"
    )


def test_debians_own_tests_of_the_installed_package_pass(
    fresh: PackagedDaemon, packages: Packages
) -> None:
    source, package = "/tmp/autopkgtest-source", f"/tmp/{packages.deb.name}"  # noqa: S108 - of the machine
    fresh.machine.write(f"{source}/debian/changelog", _DEBIAN_CHANGELOG)
    fresh.machine.run("cp", "-R", f"{REPOSITORY}/packaging/debian", source)
    fresh.machine.run("install", "-m", "644", str(packages.deb), package)
    # There is no way out, where it would look for newer lists.
    sources = "/etc/apt/sources.list.d"
    fresh.machine.run("mv", sources, f"{sources}.away")
    fresh.machine.run("mkdir", sources)

    status, output = fresh.machine.attempt(
        *("autopkgtest", "--ignore-restrictions=isolation-machine", package, f"{source}/"),
        *("--", "null"),
    )
    fresh.machine.run("rm", "-r", sources)
    fresh.machine.run("mv", f"{sources}.away", sources)

    assert status == 0, output
    passed = re.findall(r"^(\S+) +PASS", output, re.MULTILINE)
    tests = sorted((REPOSITORY / "packaging/debian/tests").iterdir())
    assert sorted(set(passed)) == [one.name for one in tests if one.name != "control"], output


def test_the_package_brings_alerts_and_the_pages_that_they_link_to(packages: Packages) -> None:
    found = {
        line.split()[-1] for line in run("dpkg-deb", "--contents", str(packages.deb)).splitlines()
    }
    for name in ("prometheus/imdsproxy.rules.yml", "grafana/imdsproxy.json"):
        assert f"./usr/share/imdsproxy/{name}" in found
    assert {
        f"./{one.runbook.partition('#')[0].removeprefix('file:///')}" for one in alerts()
    } <= found


def test_the_package_brings_libvirts_hook_executable(packages: Packages) -> None:
    (line,) = (
        line
        for line in run("dpkg-deb", "--contents", str(packages.deb)).splitlines()
        if line.endswith("./usr/share/imdsproxy/libvirt/qemu.d-hook")
    )
    assert line.startswith("-rwxr-xr-x root/root")


def test_lintian_finds_nothing(packages: Packages) -> None:
    fail_on = ("--fail-on", "error,warning,pedantic")
    assert run("lintian", "--allow-root", *fail_on, str(packages.deb), timeout_s=100) == ""


def test_the_package_depends_on_every_library_and_recommends_what_only_some_of_it_needs(
    packages: Packages,
) -> None:
    depends, recommends = (
        run("dpkg-deb", "--field", str(packages.deb), name).strip().split(", ")
        for name in ("Depends", "Recommends")
    )
    wanted = ("haproxy (>= 3.0)", "nftables", "python3-typer (>= 0.15)", "python3-yaml (>= 6.0.2)")
    assert set(depends) >= set(wanted)
    assert recommends == sorted(
        [
            "python3-cryptography",
            "python3-jwt",
            "python3-libvirt",
            "python3-openvswitch",
            *RECOMMENDED,
        ]
    )
    assert not [each for each in depends if "openstack" in each]
