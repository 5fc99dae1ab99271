"""`imdsproxy token report` and its metrics beside a daemon; what HAProxy counts is in test_counted_reads.py."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest

from support.guest import Connection, inside
from support.world import World, open_world

pytestmark = pytest.mark.root

_USER_DATA: Final = "/latest/user-data"
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


def _settings(world: World, policy: Mapping[str, Any]) -> None:
    world.daemon.reconfigure({**_SETTINGS, "policy": policy})


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


def test_who_reads_without_a_token_is_named_with_path_and_client(world: World) -> None:
    guest = world.red
    before = _counts(world, "red")
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


def test_what_is_refused_where_a_token_is_required_is_counted_each_time(world: World) -> None:
    guest = world.guests["blue"]
    before = _counts(world, "blue")
    _settings(world, {"host": {"tokens": "required"}})
    with guest.connect() as connection:
        for _ in range(3):
            assert connection.request(_USER_DATA).status == 401
    assert _counts(world, "blue") == (before[0], before[1] + 3)
    found = _report(world)["open_trees"]
    assert {"network": "blue", "instance": "blue-5", "tree": "/openstack"} in found
    shown = world.daemon.command("token", "report").out
    assert "warning: /nocloud gives instance blue-5 in blue the user-data" in shown
    _settings(world, {})
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
