"""What went wrong with Neutron's proxies, and is tested nowhere else: what a guest finds beside its documents."""

import pwd
import re
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from typing import Final

import pytest

from support.guest import IPV4, IPV6
from support.lab import run, until, within
from support.umask import umask
from support.world import World, open_world

pytestmark = pytest.mark.root

_HTTP: Final = 80
_BEHIND_THE_GATE: Final = 254
_METADATA: Final = {
    (IPV4, _HTTP),
    (IPV6, _HTTP),
    (IPV4, _BEHIND_THE_GATE),
    (IPV6, _BEHIND_THE_GATE),
}
_LOOPBACK: Final = "127.0.0.1"

_SHOWN_BY_OTHERS: Final = (
    # Statistics and health of metadata_path's HAProxy and of others'.
    *("/admin/stats", "/admin/stats;csv", "/stats", "/haproxy?stats", "/monitor", "/health"),
    "/debug",
    # Our own admin API, metrics and health.
    *("/metrics", "/healthz", "/livez", "/readyz", "/openapi.json", "/docs"),
    *(f"/v1/{name}" for name in ("status", "instances", "records", "haproxy-configuration")),
    "/v1/documents?network=green&address=10.0.0.5&path=/latest/user-data",
)
_BODIES: Final = (b"", b"no instance has this address in this network")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    metrics = {"listen": f"{_LOOPBACK}:19321", "haproxy_listen": f"{_LOOPBACK}:19322"}
    with ExitStack() as stack:
        # The umask under which the proxies of Neutron's predecessor wrote, as root.
        with umask(0):
            made = stack.enter_context(
                open_world({"metrics": metrics, "resolver": {"hold_s": 0.5}})
            )
        yield made


def _listeners(namespace: str) -> set[tuple[str, int]]:
    """Address and port of everything that takes TCP connections there, or UDP packets."""
    sockets = [line.split()[4] for line in run(*within(namespace), "ss", "-Hltun").splitlines()]
    found = (one.rpartition(":")[::2] for one in sockets)
    return {(re.sub(r"%\w+|[][]", "", address), int(port)) for address, port in found}


def test_nothing_listens_where_guests_reach_but_the_metadata_service(world: World) -> None:
    """Neutron's listened at the router's addresses and at any address of isolated networks."""
    assert _listeners(world.lab.name("red")) <= _METADATA
    assert _listeners(world.lab.name("green")) <= _METADATA
    (made,) = world.lab.made_by_daemon()
    assert _listeners(made) <= _METADATA
    # The network `grey` is on an interface of the host's.
    on_host = _listeners(world.lab.host)
    assert {one for one in on_host if one[0] != _LOOPBACK} <= _METADATA
    assert {port for address, port in on_host if address == _LOOPBACK} == {19321, 19322}


@pytest.mark.slow
def test_what_other_proxies_show_is_a_path_like_any_other(world: World) -> None:
    """On metadata_path's listener a guest reads the statistics of all instances, known or not."""
    stranger = world.lab.guest("red", 77)
    until(stranger.reaches, what="the stranger's reaching it")
    ids = [str(one["id"]).encode() for one in world.instances]
    for guest in (*world.everybody, stranger):
        behind = replace(guest, port=_BEHIND_THE_GATE)
        askers = [(guest, IPV4), (guest, IPV6)]
        askers += [(behind, to) for to in (IPV4, IPV6) if behind.reaches(to=to)]
        asked = [(guest, IPV4, "GET", target) for target in _SHOWN_BY_OTHERS]
        for (asker, to), method in product(askers, ("GET", "POST", "OPTIONS")):
            asked += [(asker, to, method, target) for target in _SHOWN_BY_OTHERS[::6]]
        for asker, to, method, target in asked:
            reply = asker.ask(target, to=to, method=method)
            assert reply.status in (400, 403, 404, 405, 503), (asker, method, target, reply)
            assert reply.status == 503 or reply.body in _BODIES, (method, target, reply)
            assert not any(one in reply.body for one in ids)


def test_haproxy_compares_macs_by_its_function_of_constant_time_alone(world: World) -> None:
    """Nova once compared signatures byte by byte."""
    text = (world.daemon.runtime / "haproxy.cfg").read_text()
    rules = [line.strip() for line in text.splitlines() if "txn.mac" in line]
    compared = {
        condition: rule
        for rule in rules
        for condition in re.findall(r"!?{ [^}]*txn\.mac[^}]* }", rule)
        if not condition.endswith(" -m found }")
    }
    checked = compared.pop("!{ var(txn.token),bytes(20),secure_memcmp(txn.mac) }")
    assert checked.startswith("http-request return status 401 ")
    # The other one only knows again what this connection was given, once it has been found good.
    (again,) = compared.values()
    assert again.startswith("http-request set-fc-tos 0 if { var(txn.seconds_left) -m found } ")


def test_nobody_else_may_write_or_read_what_it_writes_though_its_umask_is_0(world: World) -> None:
    """Any user of the host could rewrite what was then loaded as root."""
    world.all_right()
    modes = {
        str(one.relative_to(world.daemon.directory)): one.lstat().st_mode
        for place in (world.daemon.runtime, world.daemon.state)
        for one in place.rglob("*")
        if not one.is_symlink()
    }
    assert not {name for name, mode in modes.items() if mode & stat.S_IWOTH}
    files = {name: mode for name, mode in modes.items() if stat.S_ISREG(mode)}
    assert not {name for name, mode in files.items() if mode & stat.S_IWGRP}
    # Nothing in there is anybody's.
    open_to_all = {"haproxy.pid", "documents.pid", "empty.map", "silence.http", "unavailable.http"}
    readable = {name for name, mode in files.items() if mode & stat.S_IROTH}
    assert readable <= {f"run/{name}" for name in open_to_all}


def test_the_memory_that_holds_keys_and_documents_is_roots_alone(world: World) -> None:
    """Whoever has the worker's account can have it by a fault in another program of that account."""
    account = pwd.getpwnam("haproxy")
    read = "import sys; open(sys.argv[1], 'rb').read(1)"
    for name in ("mem", "maps", "environ"):
        done = subprocess.run(
            ("/usr/bin/python3", "-c", read, f"/proc/{world.settled().worker}/{name}"),
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert "PermissionError" in done.stderr, (name, done)
    world.all_right()
