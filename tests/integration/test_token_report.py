"""`imdsproxy token report` and its metrics beside a daemon whose guests read with and without tokens."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest

from support.guest import Connection, Guest, Lost, inside
from support.lab import until
from support.world import World, open_world

pytestmark = pytest.mark.root

_USER_DATA: Final = "/latest/user-data"
_HARMLESS: Final = re.compile(r"[\w./+:;#()-]*", re.ASCII)


_LISTEN: Final = ("127.0.0.1", 9465)
_SETTINGS: Final[dict[str, Any]] = {
    "resolver": {"hold_s": 1.0},
    "tokens": {"count_reads": "all"},
    "metrics": {"listen": f"{_LISTEN[0]}:{_LISTEN[1]}", "haproxy_listen": None},
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(_SETTINGS) as found:
        yield found


def _say(world: World, policy: Mapping[str, Any], count_reads: str = "all") -> None:
    settings = {**_SETTINGS, "tokens": {"count_reads": count_reads}, "policy": policy}
    world.daemon.reconfigure(settings)


def _report(world: World) -> dict[str, Any]:
    told = world.daemon.command("token", "report", "--json")
    assert told.status == 0, told
    found: dict[str, Any] = json.loads(told.out)
    return found


def _guest(world: World, network: str) -> dict[str, Any]:
    """What is told of the guest there; zeros where nothing is."""
    found = [one for one in _report(world)["guests"] if one["network"] == network]
    assert len(found) <= 1
    return found[0] if found else {"reads": 0, "refused": 0, "readers": []}


def _counts(world: World, network: str) -> tuple[int, int]:
    one = _guest(world, network)
    return one["reads"], one["refused"]


def _metric(world: World, name: str, network: str) -> int:
    sock = inside(world.lab.host, lambda: socket.socket(socket.AF_INET))
    sock.settimeout(5)
    sock.connect(_LISTEN)
    with Connection(sock) as connection:
        lines = connection.request("/metrics").text.splitlines()
    wanted = f'imdsproxy_{name}_total{{network="{network}"}} '
    found = [line for line in lines if line.startswith(wanted)]
    return int(float(found[0].rpartition(" ")[2])) if found else 0


def _token(guest: Guest) -> str:
    lines = ("X-aws-ec2-metadata-token-ttl-seconds: 60",)
    return guest.ask("/latest/api/token", method="PUT", headers=lines).text


def test_who_reads_without_a_token_is_named_with_path_and_client(world: World) -> None:
    guest = world.red
    before = _counts(world, "red")
    token = (f"X-aws-ec2-metadata-token: {_token(guest)}",)
    assert guest.ask(_USER_DATA, headers=token).status == 200
    assert guest.ask("/openstack/latest/user_data").status == 200
    assert guest.ask("/nocloud/user-data").status == 200
    guest.ask("/latest/api/token")
    assert _counts(world, "red") == before, "with a token, of other trees, of the token's own route"
    path = "/latest/meta-data/placement/availability-zone"
    guest.ask(path, headers=("User-Agent: Boto3/1.34 md/Botocore",))
    found = _guest(world, "red")
    assert (found["instance"], found["reads"], found["refused"]) == (
        "red-5",
        before[0] + 1,
        before[1],
    )
    reader = found["readers"][0]
    assert (reader["path"], reader["client"]) == (
        "latest/meta-data/placement",
        "Boto3/1.34_md/Botocore",
    )
    shown = world.daemon.command("token", "report").out
    assert re.search(
        r"^red +red-5 .* /latest/meta-data/placement +Boto3/1\.34_md/Botocore$", shown, re.MULTILINE
    )


def test_every_read_is_counted_where_all_are_on_a_kept_connection_too(world: World) -> None:
    before = _counts(world, "grey")
    with world.guests["grey"].connect() as kept:
        for _ in range(30):
            assert kept.request(_USER_DATA).status == 200
    assert _counts(world, "grey") == (before[0] + 30, before[1])


@pytest.mark.parametrize("policy", [{}, {"host": {"refuse_forwarded": True}}])
def test_a_sample_tells_about_how_many_read(world: World, policy: Mapping[str, Any]) -> None:
    _say(world, policy, "sampled")
    before = _guest(world, "grey")["reads"]
    with world.guests["grey"].connect() as kept:
        for _ in range(2_000):
            assert kept.request(_USER_DATA).status == 200
    # Of 2,000 reads 100 are counted, give or take 10: this is six times that.
    read = _guest(world, "grey")["reads"] - before
    assert read % 20 == 0
    assert 800 <= read <= 3_200
    assert _report(world)["one_in"] == 20
    shown = world.daemon.command("token", "report").out
    assert re.search(r"^grey +grey-5 +~\d+ ", shown, re.MULTILINE)
    assert "one read in 20 is counted" in shown
    _say(world, {})


def test_only_what_is_refused_is_counted_where_settings_say_so(world: World) -> None:
    _say(world, {"networks": {"blue": {"tokens": "required"}}}, "off")
    before, red = _counts(world, "blue"), _counts(world, "red")
    for _ in range(3):
        assert world.guests["blue"].ask(_USER_DATA).status == 401
        assert world.red.ask(_USER_DATA).status == 200
    assert _counts(world, "blue") == (before[0], before[1] + 3)
    assert _counts(world, "red") == red
    assert "only refused reads are counted" in world.daemon.command("token", "report").out
    _say(world, {})


def test_what_is_refused_where_a_token_is_required_is_counted_each_time(world: World) -> None:
    guest = world.guests["blue"]
    before = _counts(world, "blue")
    _say(world, {"host": {"tokens": "required"}})
    with guest.connect() as connection:
        for _ in range(3):
            assert connection.request(_USER_DATA).status == 401
    assert _counts(world, "blue") == (before[0], before[1] + 3)
    found = _report(world)["open_trees"]
    assert {"network": "blue", "instance": "blue-5", "tree": "/openstack"} in found
    shown = world.daemon.command("token", "report").out
    assert "warning: /nocloud gives instance blue-5 in blue the user-data" in shown
    _say(world, {})
    assert _report(world)["open_trees"] == []


def test_an_operators_look_is_no_read_of_the_guest(world: World) -> None:
    before = _counts(world, "green")
    told = world.daemon.command("get", "--network", "green", "--from", "10.0.0.5", _USER_DATA)
    assert told.status == 0, told
    assert _counts(world, "green") == before
    world.guests["green"].ask(_USER_DATA)
    assert _counts(world, "green") == (before[0] + 1, before[1])


def test_sums_grow_over_reloads_and_a_worker_that_drains_is_asked_too(world: World) -> None:
    guest = world.guests["grey"]

    def read() -> int:
        return _metric(world, "metadata_no_token", "grey")

    before = read()
    with guest.connect() as kept:
        kept.request(_USER_DATA)
        guest.ask(_USER_DATA)
        world.reload()
        guest.ask(_USER_DATA)
        assert _counts(world, "grey")[0] >= before + 3
        assert read() == before + 3
    world.reload()
    _report(world)
    assert read() == before + 3
    assert _metric(world, "metadata_no_token_rejected", "grey") == _counts(world, "grey")[1]


@pytest.mark.parametrize(
    "client",
    [
        b"\"quoted\" 'and' `not`",
        b"back\\slash|pipe|pipe key=x use=1 exp=1 gpc0=99999",
        b"\x1b[31mred\x1b]0;title\x07\x9b2J\xff\xfe",
        b"[bold]markup[/bold] {}%[src] $HOME <b>",
        b"tab\there",
        "snow☃man".encode(),
        b"A" * 10_000,
    ],
)
def test_a_client_of_a_hostile_name_is_cut_and_harmless_wherever_it_is_shown(
    world: World, client: bytes
) -> None:
    head = (
        b'GET /latest/%%0a%%1b[31m/"x|y HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: %s\r\n\r\n'
    )
    before = _counts(world, "red")
    world.red.raw(head % client)
    found = _guest(world, "red")
    assert found["reads"] == before[0] + 1, "it was not counted"
    for reader in found["readers"]:
        assert len(reader["path"]) <= 48
        assert len(reader["client"]) <= 64
        assert _HARMLESS.fullmatch(reader["path"])
        assert _HARMLESS.fullmatch(reader["client"])
    assert found["readers"][0]["path"].startswith("latest/_0a_1b_31m/")
    shown = world.daemon.command("token", "report").out
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


@pytest.mark.parametrize("client", [b"A" * 200_000, b"line\r\n break", b"line\nX-Injected: yes"])
def test_a_client_that_is_no_header_harms_nobody(world: World, client: bytes) -> None:
    head = b"GET /latest/ HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: %s\r\n\r\n"
    with contextlib.suppress(Lost, OSError):  # cut off while it still sends
        world.red.raw(head % client)
    until(lambda: world.red.ask(_USER_DATA).status == 200, what="service")
    assert all(_HARMLESS.fullmatch(one["client"]) for one in _guest(world, "red")["readers"])


def test_one_guest_with_ever_new_names_does_not_drive_out_the_others(world: World) -> None:
    world.guests["green"].ask(_USER_DATA, headers=("User-Agent: lonely",))
    for number in range(200):
        world.guests["blue"].ask("/latest/", headers=(f"User-Agent: flood-{number}",))
    assert len(_guest(world, "blue")["readers"]) <= 70
    assert "lonely" in {one["client"] for one in _guest(world, "green")["readers"]}
