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
from support.openstack.front import FrontKind, FrontRefused
from support.openstack.install import REPOSITORY
from support.openstack.lab import OpenStack
from support.openstack.neutron_rest import ask
from support.openstack.servers import NotUp, Server
from support.openstack.table import BLUE, INSTANCES, LOOKUP_NAMES, PORTS, RED, Instance

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
def test_nova_has_the_user_data_byte_for_byte(openstack: OpenStack, one: Instance) -> None:
    answer = openstack.ask_nova(one, path="/latest/user-data")

    if one.user_data is None:
        assert answer.status == 404
    else:
        assert (answer.status, answer.body) == (200, one.user_data)


@by_name
def test_nova_has_keys_metadata_and_addresses(openstack: OpenStack, one: Instance) -> None:
    said = json.loads(openstack.ask_nova(one, path="/openstack/latest/meta_data.json").body)
    first = openstack.ask_nova(one, path="/latest/meta-data/local-ipv4")

    assert list(said.get("public_keys", {})) == ([f"key-{one.name}"] if one.keyed else [])
    assert said.get("meta", {}) == one.metadata
    assert bool(said["devices"]) is one.tagged
    assert first.body.decode() in [port.plan.addresses[0] for port in openstack.ports_of(one)]


def test_nova_knows_the_floating_address(openstack: OpenStack) -> None:
    answer = openstack.ask_nova(INSTANCES[0], path="/latest/meta-data/public-ipv4")

    assert answer.body.decode() == openstack.seed.floating_address


def test_nova_refuses_a_wrong_secret(openstack: OpenStack) -> None:
    answer = openstack.ask_nova(INSTANCES[0], secret="another")

    assert (answer.status, b"Invalid proxy request signature" in answer.body) == (403, True)


def test_nova_does_not_know_an_instance_in_another_project(openstack: OpenStack) -> None:
    assert openstack.ask_nova(INSTANCES[0], RED).status == 404


def test_two_novas_want_different_secrets_and_the_second_ends(openstack: OpenStack) -> None:
    with openstack.another_nova(secret="another") as other:
        new = openstack.ask_nova(INSTANCES[0], secret="another", url=other.url)
        old = openstack.ask_nova(INSTANCES[0], url=other.url)
    with pytest.raises(ConnectionRefusedError):
        ask(other.url, "GET", "/")

    assert (new.status, old.status, other.server.running) == (200, 403, False)


def test_neutron_lists_the_ports_of_the_table(openstack: OpenStack) -> None:
    listed = {one["id"]: one for one in openstack.rest.list("port")}

    assert len(openstack.seed.ports) == len(PORTS)
    for port in openstack.seed.ports:
        one = listed[port.id]
        addresses = tuple(fixed["ip_address"] for fixed in one["fixed_ips"])
        assert set(addresses) == set(port.plan.addresses)
        assert (one["device_id"], one["project_id"]) == (port.device_id, port.plan.project_id)
        assert one["mac_address"] == port.plan.mac


def test_neutron_lists_the_ports_of_a_host_in_pages(openstack: OpenStack) -> None:
    # Every port of the table that has a device is bound to the one host.
    bound = {port.id for port in openstack.seed.ports if port.device_id}
    path: str | None = "/ports?binding:host_id=lab&limit=4&sort_key=id&sort_dir=asc"
    pages = []
    while path is not None:
        page = openstack.rest.send("GET", path)
        pages.append([one["id"] for one in page["ports"]])
        following = [one for one in page.get("ports_links", ()) if one["rel"] == "next"]
        path = following[0]["href"].partition("/v2.0")[2] if following else None

    assert {ident for page in pages for ident in page} == bound
    assert [len(page) for page in pages[:2]] == [4, 4]


def test_a_port_is_made_moved_and_taken_away(openstack: OpenStack) -> None:
    uuid = INSTANCES[0].uuid
    made = openstack.create_port("net-green", "10.0.0.90", device_id=uuid, project_id=BLUE)
    moved = openstack.update_port(made["id"], fixed_ips=[{"ip_address": "10.0.0.91"}])

    assert [one["ip_address"] for one in moved["fixed_ips"]] == ["10.0.0.91"]
    assert moved["binding:vif_type"] == "ovs"
    found = openstack.rest.list("port", network_id=made["network_id"], device_id=uuid)
    assert [one["id"] for one in found] == [made["id"]]
    openstack.delete_port(made["id"])
    assert openstack.rest.list("port", id=made["id"]) == ()


def test_what_a_test_has_made_and_ended_is_mended(openstack: OpenStack) -> None:
    made = openstack.create_port("net-green", device_id="x", project_id=BLUE)
    gone = openstack.create_port("net-green", device_id="y", project_id=BLUE)
    openstack.rest.delete("port", gone["id"])
    openstack.nova.server.kill()
    openstack.neutron.pause()
    openstack.heal()

    assert openstack.rest.list("port", id=made["id"]) == ()
    assert openstack.ask_nova(INSTANCES[0]).status == 200


def test_a_killed_nova_refuses_connections_and_comes_back_at_its_port(openstack: OpenStack) -> None:
    url = openstack.nova_url
    openstack.nova.server.kill()
    with pytest.raises(ConnectionRefusedError):
        ask(url, "GET", "/")
    openstack.nova.server.start()

    assert (openstack.ask_nova(INSTANCES[0]).status, openstack.nova_url) == (200, url)


def test_a_paused_nova_takes_connections_and_does_not_answer(openstack: OpenStack) -> None:
    openstack.nova.server.pause()
    with pytest.raises(TimeoutError):
        ask(openstack.nova_url, "GET", "/", timeout_s=0.5)
    openstack.nova.server.resume()

    assert openstack.ask_nova(INSTANCES[0]).status == 200


def test_a_restarted_neutron_has_the_same_ports(openstack: OpenStack) -> None:
    before = {one["id"] for one in openstack.rest.list("port")}
    pid = openstack.neutron.pid
    openstack.neutron.restart()

    assert {one["id"] for one in openstack.rest.list("port")} == before
    assert openstack.neutron.pid != pid


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


@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        (
            "network",
            ["del-header X-Neutron-Router-ID", "set-header X-Neutron-Network-ID {ident}"],
        ),
        (
            "router",
            ["del-header X-Neutron-Network-ID", "set-header X-Neutron-Router-ID {ident}"],
        ),
        ("ovn", ["add-header X-OVN-Network-ID {ident}"]),
    ],
)
def test_neutrons_code_writes_a_front_that_haproxy_takes(
    openstack: OpenStack, kind: FrontKind, rules: list[str], tmp_path: Path
) -> None:
    ids = openstack.seed.routers if kind == "router" else openstack.seed.networks
    ident = ids["r-blue" if kind == "router" else "net-blue"]
    text = openstack.front.config(
        kind, ident, socket=tmp_path / "metadata_proxy", bind_address="127.0.0.1", port=9697
    )
    file = tmp_path / "front.conf"
    file.write_text(text)
    done = subprocess.run(
        ["/usr/bin/env", "haproxy", "-c", "-f", str(file)],
        capture_output=True,
        check=False,
        timeout=20,
    )

    lines = [line.strip() for line in text.splitlines()]
    assert [line for line in lines if line.startswith("http-request")] == [
        f"http-request {rule.format(ident=ident)}" for rule in rules
    ]
    assert "bind 127.0.0.1:9697" in lines
    assert done.returncode == 0, done.stderr.decode()


def test_what_neutron_refuses_to_write_is_told(openstack: OpenStack, tmp_path: Path) -> None:
    with pytest.raises(FrontRefused, match="nobody-at-all"):
        openstack.front.config("network", "x", socket=tmp_path / "socket", user="nobody-at-all")

    limited = {"rate_limit_enabled": True}
    text = openstack.front.config("ovn", "x", socket=tmp_path / "s", rate_limits=limited)
    assert "http-request deny deny_status 429" in text
    assert "429" not in openstack.front.config("ovn", "x", socket=tmp_path / "s")


def test_a_nova_may_keep_its_connections(openstack: OpenStack) -> None:
    with openstack.another_nova(keep_alive=True) as other:
        connection = http.client.HTTPConnection(other.url.removeprefix("http://"), timeout=10)
        connection.connect()
        used = connection.sock
        for _ in range(3):
            connection.request("GET", "/")
            answer = connection.getresponse()
            assert (answer.status, answer.read()[:4]) == (200, b"1.0\n")
            assert connection.sock is used
        connection.close()


def test_a_password_can_be_posted_again_once_it_is_forgotten(openstack: OpenStack) -> None:
    one, path = INSTANCES[3], "/openstack/latest/password"
    with openstack.another_nova(cache_s=0) as other:
        first = openstack.ask_nova(one, path=path, method="POST", body=b"sealed", url=other.url)
        second = openstack.ask_nova(one, path=path, method="POST", body=b"again", url=other.url)
        kept = openstack.ask_nova(one, path=path, url=other.url)
        openstack.forget_password(one)
        gone = openstack.ask_nova(one, path=path, url=other.url)

    assert (first.status, second.status, kept.body, gone.body) == (200, 409, b"sealed", b"")


def test_a_server_outlives_the_thread_that_started_it(openstack: OpenStack) -> None:
    thread = threading.Thread(target=openstack.nova.server.restart)
    thread.start()
    thread.join()

    assert openstack.ask_nova(INSTANCES[0]).status == 200
    assert openstack.nova.server.running


def test_the_lab_can_be_used_by_openstacksdk(openstack: OpenStack) -> None:
    assert openstack.neutron_url in openstack.clouds_yaml.read_text()
    versions = json.loads(ask(openstack.neutron_url, "GET", "/").body)

    assert [one["id"] for one in versions["versions"]] == ["v2.0"]


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
