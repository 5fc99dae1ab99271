"""What operators ask of a daemon and do to it: probes, passwords, warnings, readiness, and `imdsproxy watch`."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.documents.compiled import compiled_path
from imdsproxy.model.wire import PROBE_INSTANCE, PROBE_PATH
from support.audit_log import AuditLog, order_audit
from support.daemon import Daemon, instance
from support.guest import Load
from support.health import METRICS, ask_operator
from support.lab import Lab, until
from support.world import World, own

pytestmark = pytest.mark.root


def test_a_probe_shows_what_our_documents_and_rules_answer(world: World) -> None:
    asked = ("explain", "red-5", "--probe")
    assert "GET /latest/meta-data/: 200 OK" in world.daemon.command(*asked).out
    nothing = world.daemon.command(*asked, "--path", "/latest/meta-data/nothing")
    assert (nothing.status, "nothing: 404 Not Found" in nothing.out) == (1, True)
    world.daemon.command("instance", "set", "red-5", "--no-ec2", "--no-openstack")
    assert "GET /nocloud/meta-data: 200 OK" in world.daemon.command(*asked).out
    world.daemon.command("instance", "set", "red-5", "--ec2", "--openstack", "--tokens", "required")
    refused = world.daemon.command(*asked)
    assert (refused.status, "401 Unauthorized" in refused.out) == (1, True)
    world.daemon.command("instance", "set", "red-5", "--clear", "policy")


def test_a_posted_password_is_shown_and_cleared(world: World) -> None:
    daemon, guest, password = world.daemon, world.red, "/openstack/latest/password"
    for clear in (
        ("instance", "password", "red-5", "--clear"),
        ("instance", "set", "red-5", "--clear", "password"),
    ):
        assert guest.ask(password, method="POST", body=b"c2VjcmV0").status == 200
        assert daemon.command("instance", "password", "red-5").out == "c2VjcmV0"
        assert daemon.command(*clear).status == 0
        assert guest.ask(password).body == b""


def test_a_link_in_the_place_of_a_password_is_not_followed(world: World, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    link = world.daemon.state / "passwords" / "red-5"
    link.symlink_to(secret)
    try:
        shown = world.daemon.command("instance", "password", "red-5")
    finally:
        link.unlink()
    assert (shown.status, shown.out) == (71, "")


_KEY: Final = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJyr4lmyTyrn4wLF+VDqFVHTUVXYqAVFbCDyXCLLqLF5"
_ODD: Final = {
    "ssh_keys": [{"name": "my key", "key": _KEY}],
    "tags": {"with blank": "b", "größe": "c", "plain": "d"},
}


def test_a_write_and_status_say_which_names_guests_do_not_see(world: World) -> None:
    socket = ("--socket", str(world.daemon.runtime / "admin.sock"))
    record = json.dumps({"instances": [instance("red-5", "red", fields=_ODD)]})
    done = world.daemon.command("instance", "set", "--file", "-", *socket, stdin=record)
    assert done.status == 0, done.err
    shown = world.daemon.command("status", *socket).out
    for text in (done.out, shown):
        words = " ".join(text.split())
        assert 'red-5.ssh_keys["my key"]: guests see this key as "my-key"' in words
        assert 'red-5.tags["with blank"]: EC2' in words
        assert 'red-5.tags["größe"]: EC2' in words
        assert "plain" not in words
    assert world.red.ask("/latest/meta-data/public-keys").text == "0=my-key"

    (logged,) = [one for one in world.daemon.log_entries() if "my key" in str(one.get("warnings"))]
    assert (logged["level"], logged["instance"]) == ("warning", "red-5")

    world.daemon.put([], [instance("red-5", "red")])
    assert world.daemon.status()["warnings"] == []


# Readiness asks for a document as a guest does: through HAProxy and the document server, off the disk


_NOTICED_WITHIN_S: Final = 8.0


@pytest.fixture
def closed() -> Iterator[tuple[Lab, Daemon, Path]]:
    """A daemon that is not started yet, its state below a directory that only root can enter."""
    settings: Mapping[str, Mapping[str, object]] = {
        "metrics": METRICS,
        "paths": {"state_dir": "{directory}/closed/state"},
    }
    with closing(Lab()) as lab, closing(Daemon(lab, settings)) as daemon:
        directory = daemon.directory / "closed"
        directory.mkdir(mode=0o700)
        yield lab, daemon, directory


def test_a_state_directory_that_the_document_server_cannot_enter_is_not_ready_and_says_so(
    closed: tuple[Lab, Daemon, Path],
) -> None:
    lab, daemon, directory = closed
    checked = daemon.command("check")
    assert checked.status == 71
    assert f"cannot enter {directory}" in " ".join(checked.out.split())
    network = lab.namespace_network("red")
    guest = lab.guest("red", 5)
    daemon.start(ready=False)
    answer = daemon.put([network], [instance("red-5", "red")])
    assert any(f"cannot enter {directory}" in one for one in answer["pending"])
    assert guest.ask("/latest/user-data").status == 503
    ready = ask_operator(lab, "/readyz")
    assert ready.status == 503
    assert any(f"cannot enter {directory}" in one for one in json.loads(ready.text)["reasons"])
    shown = daemon.command("status", "--check")
    assert shown.status == 1
    assert str(directory) in "".join(shown.out.split())
    explained = daemon.explain("red", "10.0.0.5")
    assert explained["answer"] == 503
    assert any(f"cannot enter {directory}" in one for one in explained["why"])
    directory.chmod(0o711)
    daemon.wait_ready(within_s=_NOTICED_WITHIN_S)
    assert own(guest, guest.ask("/latest/user-data")) is None
    assert daemon.explain("red", "10.0.0.5")["answer"] == 200
    assert "cannot enter" not in daemon.command("check").out


@pytest.mark.slow
def test_records_that_cannot_be_read_any_more_are_noticed_and_read_again_when_they_can(
    world: World,
) -> None:
    records = world.daemon.state / "documents"
    mode = stat.S_IMODE(records.stat().st_mode)
    with Load([world.red], "/latest/user-data", own) as cached:
        cached.wait_answers(20)
        records.chmod(0o700)
        os.chown(records, 0, 0)
        until(
            lambda: not world.daemon.status()["readiness"]["ready"],
            within_s=_NOTICED_WITHIN_S,
            what="not being ready",
        )
        assert f"cannot enter {records}" in world.daemon.command("status").out.replace("\n", " ")
        cached.wait_answers(20)
    world.daemon.kill_controller()
    world.daemon.start()
    world.all_right()
    assert stat.S_IMODE(records.stat().st_mode) == mode


def test_the_probes_record_is_no_guests_and_no_instance(world: World) -> None:
    probe = world.daemon.state / "documents" / compiled_path(PROBE_INSTANCE)
    assert probe.exists()
    sockets = world.daemon.runtime / "probe.sock"
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o600
    own_id = world.daemon.admin.get("/v1/instances/red-5")
    assert world.red.ask(PROBE_PATH).text == own_id["ec2_id"]
    listed = world.daemon.command("instance", "list", "--json").out
    assert PROBE_INSTANCE not in listed
    refused = world.daemon.command("instance", "add", PROBE_INSTANCE, "--name", "probe")
    assert refused.status == 64
    world.daemon.kill_controller()
    world.daemon.start()
    assert probe.exists()


# `imdsproxy watch` beside a daemon whose guests ask


@dataclass(frozen=True, slots=True)
class Watcher:
    """A genuine `imdsproxy watch --json`, and what it has printed."""

    process: subprocess.Popen[bytes]
    printed: Path

    def saw(self, **wanted: object) -> bool:
        """Whether a request was shown that has these."""
        lines = map(json.loads, self.printed.read_text().splitlines())
        return any(wanted.items() <= one.items() for one in lines)


@contextmanager
def watching(world: World, *flags: str) -> Iterator[Watcher]:
    """From when it is known to see what guests ask."""
    printed = world.daemon.directory / "watched"
    words = ("--config", str(world.daemon.config), "watch", "--json", *flags)
    with printed.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "imdsproxy", *words], stdout=sink, env={"PATH": os.defpath}
        )
    watcher = Watcher(process, printed)
    try:
        until(world.is_watched, what="HAProxy tells of requests")
        probe = "/latest/meta-data/instance-id"
        until(lambda: world.red.ask(probe).status and watcher.saw(), what="a request is shown")
        yield watcher
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)


def test_a_network_is_watched_over_a_reload_and_beside_the_audit_log(world: World) -> None:
    stranger = world.lab.guest("red", 66)
    with watching(world, "--network", "red") as watcher:
        assert stranger.ask("/latest/meta-data/").status == 404
        unknown = {"address": stranger.addresses[0], "instance": None, "status": 404}
        until(lambda: watcher.saw(**unknown, answered_by="resolver"))
        log = AuditLog(world.daemon)
        order_audit(world, "all")
        before, path = (f"/latest/meta-data/{one}-the-reload" for one in ("before", "after"))
        world.red.ask(before)
        world.reload()
        assert own(world.guests["green"], world.guests["green"].ask("/latest/user-data")) is None
        world.red.ask(path)
        until(lambda: watcher.saw(path=path, network="red", instance="red-5"))
        assert watcher.saw(path=before)
        assert not watcher.saw(network="green")
        log.wait(path=path, network="red", instance="red-5")


@pytest.mark.slow
def test_haproxy_tells_no_more_when_the_watcher_was_killed(world: World) -> None:
    with watching(world) as watcher:
        watcher.process.kill()
        until(lambda: not world.is_watched(), within_s=20, what="HAProxy has stopped telling")
    world.all_right()
