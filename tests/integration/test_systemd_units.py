"""The three units under a real systemd: what starts what, what survives what, and what is right only there."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import pytest

from support.guest import Guest, Load, Lost
from support.lab import until
from support.patience import patience
from support.systemd_daemon import (
    CONTROLLER,
    DOCUMENTS,
    HAPROXY,
    HUB,
    UNITS,
    USER_DATA,
    UnitDaemon,
    installed,
    journal_of_failures,
    named,
    own_user_data,
    serves,
    wait_served,
)
from support.systemd_machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.slow]

_ERRORS: Final = ("--priority=err", "--output=cat")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UnitDaemon]:
    """One machine for the module; use `daemon`, which restores it after each test."""
    with installed(tmp_path_factory.mktemp("shared")) as daemon:
        daemon.plug_in()
        daemon.raise_limits()
        daemon.start()
        daemon.machine.forget_journal()
        yield daemon


@pytest.fixture
def daemon(shared: UnitDaemon, request: pytest.FixtureRequest) -> Iterator[UnitDaemon]:
    """Started, every guest served."""
    before = request.session.testsfailed
    yield shared
    if request.session.testsfailed > before:
        print(shared.machine.journal())  # noqa: T201 - pytest shows it of a test that failed
    with journal_of_failures(shared):
        shared.restore()
        wait_served(*shared.guests)


def wait_other(daemon: UnitDaemon, unit: str, before: int) -> None:
    """Until a unit has another main process."""
    until(
        lambda: daemon.machine.main_pid(unit) not in (0, before),
        within_s=30,
        what=f"another process of {unit}",
    )


@pytest.mark.always
def test_starting_the_controller_brings_up_all_three_units(daemon: UnitDaemon) -> None:
    assert daemon.active() == dict.fromkeys(UNITS, "active")
    assert all(serves(guest) for guest in daemon.guests)
    controller, haproxy, documents = daemon.pids()
    status = daemon.status()
    assert status["controller"] == controller
    assert status["haproxy"]["master"] == haproxy
    assert status["documents"]["pids"][0] == documents
    assert [daemon.machine.unit(unit, "NRestarts") for unit in UNITS] == ["0", "0", "0"]
    assert daemon.machine.run("systemctl", "--failed", "--quiet") == ""
    # Enough for a namespace and a listener of thousands of networks (test_cold_start_of_many.py).
    assert int(daemon.machine.unit(HAPROXY, "LimitNOFILE")) >= 500_000


@pytest.mark.alone
def test_what_is_killed_comes_back_by_itself_while_the_controller_is_stopped(
    daemon: UnitDaemon,
) -> None:
    guest = daemon.guests[0]
    daemon.machine.run("systemctl", "stop", CONTROLLER)
    _, haproxy, documents = daemon.pids()

    began = time.monotonic()
    daemon.machine.run("kill", "-KILL", str(haproxy))
    until(
        lambda: serves(guest) and daemon.machine.main_pid(HAPROXY) != haproxy,
        within_s=5,
        what="an answer",
    )
    assert time.monotonic() - began < 1.0 * patience()

    daemon.machine.run("systemctl", "kill", "--signal=KILL", DOCUMENTS)
    wait_other(daemon, DOCUMENTS, documents)
    daemon.wait_active(DOCUMENTS)
    # Never read before, so not from HAProxy's cache.
    until(lambda: guest.ask("/nocloud/meta-data").status == 200, within_s=10, what="a document")

    daemon.machine.run("systemctl", "start", CONTROLLER)
    assert daemon.status()["haproxy"]["master"] == daemon.machine.main_pid(HAPROXY)
    assert all(serves(one) for one in daemon.guests)


def test_a_reload_takes_settings_over_and_fails_where_they_are_broken(daemon: UnitDaemon) -> None:
    daemon.configure("haproxy: {maxconn_per_network: 77}\n")
    daemon.machine.run("systemctl", "reload", CONTROLLER)
    before = daemon.pids(), daemon.machine.run("cat", "/run/imdsproxy/haproxy.cfg")
    assert "maxconn 77" in before[1]
    daemon.configure("haproxy: {maxcon: 77}\n")

    status, _ = daemon.machine.attempt("systemctl", "reload", CONTROLLER)

    assert status != 0
    assert "haproxy.maxcon" in daemon.machine.journal(CONTROLLER)
    assert daemon.active() == dict.fromkeys(UNITS, "active")
    assert (daemon.pids(), daemon.machine.run("cat", "/run/imdsproxy/haproxy.cfg")) == before


def test_settings_that_are_wrong_at_the_start_leave_a_failed_unit_and_no_loop(
    daemon: UnitDaemon,
) -> None:
    daemon.machine.run("systemctl", "stop", CONTROLLER)
    daemon.configure("haproxy: {maxcon: 77}\n")

    status, _ = daemon.machine.attempt("systemctl", "start", CONTROLLER)

    assert status != 0
    assert daemon.active()[CONTROLLER] == "failed"
    assert daemon.machine.unit(CONTROLLER, "ExecMainStatus") == "78"
    errors = daemon.machine.journal(CONTROLLER, options=_ERRORS)
    assert "\nimdsproxy: " in f"\n{errors}"
    assert "haproxy.maxcon" in errors
    assert all(serves(guest) for guest in daemon.guests)


def test_stop_ends_the_controller_or_all_three_units_for_good_and_a_start_serves_from_the_store(
    daemon: UnitDaemon,
) -> None:
    before = daemon.pids()
    daemon.command("stop")
    until(lambda: daemon.active()[CONTROLLER] == "inactive", within_s=10, what="its end")
    assert daemon.active() == {CONTROLLER: "inactive", HAPROXY: "active", DOCUMENTS: "active"}
    assert daemon.pids() == (0, *before[1:])
    assert all(serves(guest) for guest in daemon.guests)
    daemon.command("stop", "--data-plane")
    until(
        lambda: set(daemon.active().values()) == {"inactive"},
        within_s=20,
        what=f"the end of all units; {daemon.active()}",
    )
    assert daemon.pids() == (0, 0, 0)
    assert not any(guest.reaches() for guest in daemon.guests)
    left = daemon.machine.run("ps", "-eo", "args").splitlines()
    assert [line for line in left if "haproxy" in line or "imdsproxy" in line] == []
    assert daemon.machine.run("ls", "/run/imdsproxy/netns") == ""
    # What a reboot leaves of /run.
    daemon.machine.run("rm", "-r", "/run/imdsproxy")
    daemon.machine.run("systemctl", "start", CONTROLLER)
    assert daemon.active() == dict.fromkeys(UNITS, "active")
    wait_served(*daemon.guests)


def test_a_hung_controller_is_started_again_and_no_request_lost(daemon: UnitDaemon) -> None:
    daemon.set_service("WatchdogSec=4")
    daemon.machine.run("systemctl", "restart", CONTROLLER)
    controller, haproxy, documents = daemon.pids()

    with Load(daemon.guests, USER_DATA, own_user_data, connections=2) as answers:
        answers.wait_answers(20)
        daemon.machine.run("kill", "-STOP", str(controller))
        wait_other(daemon, CONTROLLER, controller)
        daemon.wait_active()
        answers.wait_answers(20)

    assert answers.report.lost == []
    assert daemon.pids()[1:] == (haproxy, documents)
    assert "Fatal Python error: Aborted" in daemon.machine.journal()


def test_documents_come_again_where_all_processes_of_their_server_hang(daemon: UnitDaemon) -> None:
    def fresh(guest: Guest) -> bool:
        with contextlib.suppress(Lost):
            reply = guest.ask("/openstack/latest/meta_data.json", timeout_s=1)
            return named(guest, reply) is None
        return False

    parent, *workers = daemon.status()["documents"]["pids"]
    daemon.machine.run("kill", "-STOP", *map(str, (parent, *workers)))
    wait_other(daemon, DOCUMENTS, parent)
    until(lambda: all(map(fresh, daemon.guests)), within_s=10, what="documents")
    until(lambda: daemon.active() == dict.fromkeys(UNITS, "active"), within_s=10, what="all units")


def test_a_unit_whose_runtime_directory_was_emptied_serves_again(daemon: UnitDaemon) -> None:
    _, haproxy, documents = daemon.pids()

    daemon.machine.run("systemctl", "kill", "--signal=KILL", CONTROLLER)
    daemon.machine.run("sh", "-c", "rm -rf /run/imdsproxy/*")

    until(
        lambda: not {0, haproxy, documents} & set(daemon.pids()), within_s=20, what="new processes"
    )
    wait_served(*daemon.guests)
    until(lambda: daemon.active() == dict.fromkeys(UNITS, "active"), within_s=20, what="all units")


def test_a_namespace_of_ours_is_seen_by_haproxy_and_really_freed(daemon: UnitDaemon) -> None:
    guest = daemon.plug_in_behind_a_bridge("green", "fa:16:3e:00:00:03")
    before = namespaces(daemon)

    daemon.put({"green": {"bridge": "br-green"}}, [guest])
    wait_served(guest)
    assert namespaces(daemon) - before

    daemon.command("instance", "remove", "green")
    daemon.command("network", "remove", "green")
    until(lambda: namespaces(daemon) <= before, within_s=5, what="the end of the namespace")


def namespaces(daemon: UnitDaemon) -> set[str]:
    """The network namespaces that exist, seen from inside: each gives its own number to its neighbours."""
    listed = daemon.machine.run("lsns", "--type=net", "--noheadings", "--output=NS", "--persistent")
    held = daemon.machine.run("lsns", "--type=net", "--noheadings", "--output=NS")
    return {*listed.split(), *held.split()}


def test_a_namespace_made_later_is_served_and_freed_when_it_goes(daemon: UnitDaemon) -> None:
    status, said = daemon.machine.attempt(
        "imdsproxy", "network", "add", "late", "--namespace", "net-late"
    )
    assert (status, "there is no network namespace net-late" in said) == (75, True)
    guest = daemon.plug_in_one("late", "fa:16:3e:00:00:04")
    daemon.put({}, [guest])
    wait_served(guest)

    daemon.machine.run("ip", "netns", "delete", "net-late")

    # The guest's cable ends in that namespace and goes with it, once nobody holds it any more.
    until(
        lambda: "eth0" not in daemon.machine.run("ip", "-n", guest.namespace, "-o", "link"),
        within_s=5,
        what="the end of the namespace",
    )
    assert all(serves(other) for other in daemon.guests)


@pytest.mark.parametrize("propagation", ["shared", "private"])
def test_the_first_namespace_of_a_host_is_served_though_haproxy_runs_already(
    tmp_path: Path, propagation: Literal["shared", "private"]
) -> None:
    with installed(tmp_path, propagation) as daemon:
        daemon.machine.run("systemctl", "start", CONTROLLER)
        haproxy = daemon.machine.main_pid(HAPROXY)
        assert daemon.machine.run("ls", "/run/netns") == ""

        daemon.plug_in()
        daemon.start()

        wait_served(*daemon.guests)
        assert daemon.machine.main_pid(HAPROXY) == haproxy


def test_nobody_who_answers_guests_has_privileges(daemon: UnitDaemon) -> None:
    worker = daemon.status()["haproxy"]["worker"]
    answering = [worker, *daemon.status()["documents"]["pids"][1:]]
    haproxy = daemon.machine.run("id", "--user", "haproxy")

    for pid in answering:
        status = dict(
            line.split(":", 1)
            for line in daemon.machine.run("cat", f"/proc/{pid}/status").splitlines()
        )
        assert status["Uid"].split() == [haproxy] * 4
        assert int(status["CapEff"], 16) == 0
        assert status["NoNewPrivs"].strip() == "1"
    assert daemon.machine.run("readlink", f"/proc/{worker}/root") == "/run/imdsproxy/jail"


def test_the_group_may_use_the_admin_socket_and_others_may_not(daemon: UnitDaemon) -> None:
    socket = ("--unix-socket", "/run/imdsproxy/admin.sock", "http://imdsproxy/v1/status")
    ask = ("curl", "--silent", "--fail", *socket)
    nobody = ("setpriv", "--reuid=65534", "--clear-groups")
    inside, _ = daemon.machine.attempt(*nobody, "--regid=imdsproxy", *ask)
    outside, _ = daemon.machine.attempt(*nobody, "--regid=65534", *ask)
    assert (inside == 0, outside == 0) == (True, False)


def test_what_keeps_haproxy_from_starting_is_told_in_its_own_words(daemon: UnitDaemon) -> None:
    daemon.machine.run("systemctl", "stop", *UNITS)
    # HAProxy makes its socket beside this and cannot move it into place.
    daemon.machine.run("rm", "-f", "/run/imdsproxy/probe.sock")
    daemon.machine.run("mkdir", "/run/imdsproxy/probe.sock")

    status, _ = daemon.machine.attempt("systemctl", "start", CONTROLLER)

    assert status != 0
    told = daemon.machine.journal(CONTROLLER)
    assert "HAProxy did not start" in told
    assert "/run/imdsproxy/probe.sock" in told

    daemon.machine.run("rmdir", "/run/imdsproxy/probe.sock")
    until(lambda: daemon.active() == dict.fromkeys(UNITS, "active"), within_s=20, what="all units")
    wait_served(*daemon.guests)


def test_systemd_finds_nothing_wrong_with_the_units(daemon: UnitDaemon) -> None:
    status, words = daemon.machine.attempt("systemd-analyze", "verify", *UNITS)
    assert (status, [line for line in words.splitlines() if "imdsproxy" in line]) == (0, [])


@pytest.mark.parametrize("end", ["kill --signal=KILL", "restart"])
def test_the_end_of_the_controllers_whole_control_group_loses_no_request_and_no_audit_line(
    daemon: UnitDaemon, end: str
) -> None:
    log = f"/var/log/imdsproxy/{end.split(maxsplit=1)[0]}.log"
    daemon.configure(json.dumps({"audit": {"mode": "all", "destination": log}}))
    daemon.machine.run("systemctl", "restart", CONTROLLER)
    before = daemon.pids()
    with Load(daemon.guests, USER_DATA, own_user_data, connections=2) as running:
        running.wait_answers(300)
        daemon.machine.run("systemctl", *end.split(), CONTROLLER)
        running.wait_answers(300)
        wait_other(daemon, CONTROLLER, before[0])
        daemon.wait_active()
        running.wait_answers(300)
    assert not running.report.lost
    assert daemon.pids()[1:] == before[1:]
    assert daemon.status()["readiness"]["ready"] is True
    asked = running.report.answered

    def numbers() -> list[int]:
        text = (daemon.machine.root / log.lstrip("/")).read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        return [line["number"] for line in lines if line.get("path") == USER_DATA]

    until(lambda: len(set(numbers())) >= asked, within_s=20, what=f"{asked} lines")
    assert len(set(numbers())) == asked
    if end == "restart":
        # A controller that is killed between writing and taking out leaves both to the next.
        assert len(numbers()) == asked


def _check_accounts_of_hub(machine: Machine) -> None:
    """The hub and its HAProxy have accounts of their own and no rights; only the hub's reads the fleet's keys."""
    group = f"/sys/fs/cgroup{machine.run('systemctl', 'show', '--property=ControlGroup', '--value', HUB).strip()}"
    script = f"""
        for pid in $(cat {group}/cgroup.procs); do
            echo "$(cat /proc/$pid/comm) $(stat --format=%U /proc/$pid) $(sed -n 's/^CapEff:.//p' /proc/$pid/status)"
        done
    """
    rights = "0" * 16
    found = {tuple(line.split()) for line in machine.run("sh", "-c", script).splitlines()}
    assert {(one[1], one[2]) for one in found if one[0] == "haproxy"} == {
        ("imdsproxy-front", rights)
    }
    main = machine.main_pid(HUB)
    status = machine.run("cat", f"/proc/{main}/status")
    uid = machine.run("id", "--user", "imdsproxy-hub").strip()
    assert re.search(rf"^Uid:\s{uid}\s{uid}\s{uid}\s{uid}$", status, re.MULTILINE), status
    assert all(f"Cap{kind}:\t{rights}" in status for kind in ("Prm", "Eff", "Amb")), status
    for account, expected in (("imdsproxy-hub", 0), ("imdsproxy-front", 1), ("haproxy", 1)):
        for key in ("ca.key", "envelope.key", "hub.pem"):
            read = ("setpriv", f"--reuid={account}", f"--regid={account}", "--clear-groups", "cat")
            assert (machine.attempt(*read, f"/etc/imdsproxy/fleet/{key}")[0] != 0) == bool(expected)
    listed = machine.run("ls", "/run/imdsproxy-hub/front")
    assert listed.split() == ["ca.crt", "haproxy.cfg", "hub.pem"]


def test_a_hub_runs_as_its_unit_and_comes_back_with_its_haproxy(daemon: UnitDaemon) -> None:
    machine, url = daemon.machine, "https://127.0.0.1:8469"
    daemon.configure("hub: {listen: ['127.0.0.1:8469']}\n")
    words = ("--collect", "--unit=etcd-here", "etcd", "--data-dir=/var/lib/etcd-here")
    machine.run("systemd-run", *words)
    try:
        machine.run("imdsproxy", "fleet", "init", "--name", "hub1", "--address", "127.0.0.1")
        machine.run("systemctl", "start", HUB)
        assert "hub1" in machine.run("imdsproxy", "--fleet", url, "fleet", "status")
        _check_accounts_of_hub(machine)
        # What root changes in the fleet's directory the hub can read, and it renews its certificate there.
        for step in ("begin", "switch"):
            machine.run("imdsproxy", "fleet", "rotate-ca", step)
        machine.run("imdsproxy", "fleet", "envelope-key")
        certificate = machine.root / "etc/imdsproxy/fleet/hub.pem"
        of_old_ca = certificate.read_bytes()
        machine.run("systemctl", "restart", HUB)
        until(lambda: certificate.read_bytes() != of_old_ca, what="a certificate of the new CA")
        assert "hub1" in machine.run("imdsproxy", "--fleet", url, "fleet", "status")
        before = machine.main_pid(HUB)
        # With its HAProxy it ends, and says why; systemd starts both again.
        machine.run(
            "pkill",
            "--signal",
            "KILL",
            "--full",
            "haproxy -db -f /run/imdsproxy-hub/front/haproxy.cfg",
        )
        wait_other(daemon, HUB, before)
        daemon.wait_active(HUB)
        assert "hub1" in machine.run("imdsproxy", "--fleet", url, "fleet", "status")
        assert "HAProxy in front of the hub has ended" in machine.journal(HUB)
    finally:
        machine.run("systemctl", "stop", HUB, "etcd-here")
        machine.run("rm", "--recursive", "/etc/imdsproxy/fleet", "/var/lib/etcd-here")


def test_the_controller_does_not_start_on_a_hub_that_is_no_host(daemon: UnitDaemon) -> None:
    machine, membership = daemon.machine, "/var/lib/imdsproxy/fleet/host.pem"
    machine.write("/etc/imdsproxy/fleet/hub.pem", "")
    try:
        # As an upgrade does.
        machine.run("systemctl", "restart", CONTROLLER)
        assert machine.unit(CONTROLLER, "ActiveState") == "inactive"
        machine.write(membership, "")
        machine.run("systemctl", "restart", CONTROLLER)
        assert machine.unit(CONTROLLER, "ActiveState") == "active"
    finally:
        machine.run("rm", "--force", "--recursive", "/etc/imdsproxy/fleet", membership)
