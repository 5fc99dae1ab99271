"""The lab is what it is taken for: genuine Nova and Neutron, with everybody of the table in them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.daemon import alive
from support.lab import until
from support.openstack.install import REPOSITORY
from support.openstack.lab import OpenStack
from support.openstack.neutron_rest import ask
from support.openstack.servers import NotUp, Server
from support.openstack.table import BLUE, INSTANCES, LOOKUP_NAMES, RED, Instance

pytestmark = pytest.mark.slow

by_name = pytest.mark.parametrize("one", INSTANCES, ids=lambda one: one.name)


@pytest.mark.parametrize("name", LOOKUP_NAMES)
def test_nova_says_of_each_row_what_the_table_says(openstack: OpenStack, name: str) -> None:
    row = openstack.lookup(name)
    if row.nova_status is None:
        assert (row.instance, row.device_id) == (None, "")
        return
    target = "/openstack/latest/meta_data.json"
    answer = openstack.ask_nova(row.device_id, row.project_id, target, address=row.address)

    assert answer.status == row.nova_status
    if row.instance is not None:
        said = json.loads(answer.body)
        wanted = row.instance
        assert (said["uuid"], said["project_id"]) == (wanted.uuid, wanted.project_id)
        assert said["hostname"] == f"{wanted.name}.novalocal"


@by_name
def test_nova_has_what_the_table_says_of_an_instance(openstack: OpenStack, one: Instance) -> None:
    payload = openstack.ask_nova(one, path="/latest/user-data")
    said = json.loads(openstack.ask_nova(one, path="/openstack/latest/meta_data.json").body)
    first = openstack.ask_nova(one, path="/latest/meta-data/local-ipv4")

    assert (payload.body if payload.status == 200 else None) == one.user_data
    assert list(said.get("public_keys", {})) == ([f"key-{one.name}"] if one.keyed else [])
    assert said.get("meta", {}) == one.metadata
    assert bool(said["devices"]) is one.tagged
    assert first.body.decode() in [port.plan.addresses[0] for port in openstack.ports_of(one)]


def test_nova_does_not_know_an_instance_in_another_project(openstack: OpenStack) -> None:
    assert openstack.ask_nova(INSTANCES[0], RED).status == 404


def test_two_novas_want_different_secrets_and_the_second_ends(openstack: OpenStack) -> None:
    with openstack.another_nova(secret="another") as other:
        new = openstack.ask_nova(INSTANCES[0], secret="another", url=other.url)
        old = openstack.ask_nova(INSTANCES[0], url=other.url)
    with pytest.raises(ConnectionRefusedError):
        ask(other.url, "GET", "/")

    assert (new.status, old.status, other.server.running) == (200, 403, False)


def test_what_a_test_has_made_and_ended_is_mended(openstack: OpenStack) -> None:
    made = openstack.create_port("net-green", device_id="x", project_id=BLUE)
    gone = openstack.create_port("net-green", device_id="y", project_id=BLUE)
    openstack.rest.delete("port", gone["id"])
    openstack.nova.server.kill()
    openstack.neutron.pause()
    openstack.heal()

    assert openstack.rest.list("port", id=made["id"]) == ()
    assert openstack.ask_nova(INSTANCES[0]).status == 200


def test_a_neutron_that_starts_shows_everything_from_its_first_answer_on(
    openstack: OpenStack,
) -> None:
    def first_answer(_: int) -> int:
        """How many networks it shows."""
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return len(openstack.rest.list("network"))

    openstack.neutron.stop()
    openstack.neutron.launch()
    with ThreadPoolExecutor(8) as pool:
        shown = list(pool.map(first_answer, range(8)))

    assert shown == [len(openstack.seed.networks)] * 8


@pytest.mark.parametrize("name", LOOKUP_NAMES)
def test_neutrons_own_agent_agrees_with_the_table(openstack: OpenStack, name: str) -> None:
    row = openstack.lookup(name)
    headers = (row.scope_header, ("X-Forwarded-For", row.address))
    path = "/latest/meta-data/hostname"
    answer = openstack.ask_agent(path, headers=headers)

    if row.instance is None:
        assert answer.status == 404
    else:
        assert (answer.status, answer.body.decode()) == (200, f"{row.instance.name}.novalocal")


def test_a_server_outlives_the_thread_that_started_it(openstack: OpenStack) -> None:
    thread = threading.Thread(target=openstack.nova.server.restart)
    thread.start()
    thread.join()

    assert openstack.ask_nova(INSTANCES[0]).status == 200
    assert openstack.nova.server.running


def test_a_server_that_does_not_come_up_is_told_with_its_last_words(tmp_path: Path) -> None:
    server = server_of(["sh", "-c", "echo out of paste; exit 1"], tmp_path)
    with pytest.raises(NotUp, match="out of paste"):
        server.start()


def test_servers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    text = (
        "import sys, time; from pathlib import Path; from support.openstack.servers import *\n"
        "from integration.test_openstack_lab import server_of\n"
        "server = server_of([*ends_with_us(), 'sleep', '60'], Path(sys.argv[1]))\n"
        "server.launch(); print(server.pid, flush=True); time.sleep(60)\n"
    )
    path = {"PYTHONPATH": f"{REPOSITORY}/tests"}
    with subprocess.Popen(
        [sys.executable, "-c", text, str(tmp_path)], env=path, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        # setpriv has "sleep" among its arguments, and is not done while they are its own.
        until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep\0"))
        process.kill()

    until(lambda: not alive(pid), what="the end of the server")


def server_of(argv: list[str], directory: Path) -> Server:
    return Server(
        name="a server",
        argv=argv,
        cwd=directory,
        environment={},
        log=directory / "log",
        is_up=lambda: False,
    )


@pytest.mark.slow
def test_people_bring_a_lab_up_stop_a_server_and_bring_all_down(tmp_path: Path) -> None:
    directory = tmp_path / "up"
    told = lab_command(directory, "up")
    try:
        shape = json.loads(lab_command(directory, "status", "--json"))
        pids = [one["pid"] for one in shape["servers"].values()]
        nova = shape["servers"]["nova"]["at"]
        agent = shape["servers"]["agent"]["at"]
        row = next(one for one in shape["lookups"] if one["instance"] == "red-1")
        scope = ("X-Neutron-Network-ID", row["network_id"])
        asked = ask(
            agent,
            "GET",
            "/latest/meta-data/hostname",
            headers=(scope, ("X-Forwarded-For", row["address"])),
        )
        lab_command(directory, "stop", "nova")
        with pytest.raises(ConnectionRefusedError):
            ask(nova, "GET", "/")
        again = json.loads(lab_command(directory, "status", "--json"))["servers"]["nova"]["pid"]
        lab_command(directory, "start", "nova")
        back = ask(nova, "GET", "/")
        front = lab_command(directory, "front", "router", "r-red", "--port", "9697")
    finally:
        lab_command(directory, "down")

    assert shape["secret"] in told
    assert (asked.body, again, back.status) == (b"red-1.novalocal", None, 200)
    assert f"set-header X-Neutron-Router-ID {shape['routers']['r-red']}" in front
    assert not any(alive(pid) for pid in pids)
    assert not directory.exists()


def lab_command(directory: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "support.openstack", "--directory", str(directory), *words],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}/tests"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
