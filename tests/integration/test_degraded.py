"""A network that is configured and not served is degraded: in the command's answer and its status, `readyz`,
`status --check` and metrics, until it is mended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import pytest

from support.guest import IPV4, Guest, Lost
from support.lab import until, within
from support.world import World, open_world

pytestmark = pytest.mark.root

_METRICS: Final = {"listen": "127.0.0.1:9465"}
_NOT_IN_FORCE: Final = 75


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    # What listens is not changed while it runs.
    with open_world({"metrics": _METRICS}) as world:
        yield world


def _fetch(world: World, path: str) -> tuple[int, str]:
    host = Guest("operator", world.lab.host, "", "", (), "lo", port=9465)
    reply = host.ask(path, to="127.0.0.1")
    return reply.status, reply.text


def _readyz(world: World) -> dict[str, Any]:
    status, text = _fetch(world, "/readyz")
    return {"status": status, **json.loads(text)}


def _metric(world: World, name: str) -> float:
    lines = _fetch(world, "/metrics")[1].splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def _degraded(world: World, code: str, *words: str, count: int = 1) -> None:
    """Every report has it."""
    until(
        lambda: _metric(world, f'imdsproxy_networks_left_out{{code="{code}"}}') == count,
        what=f"{count} networks that are {code}",
    )
    ready = _readyz(world)
    assert (ready["status"], ready["reasons"]) == (200, [])
    assert all(word in ready["degraded"][0] for word in (code, *words)), ready
    checked = world.daemon.command("status", "--check")
    assert checked.status == _NOT_IN_FORCE
    assert "degraded" in checked.out
    status = world.daemon.status()
    assert status["readiness"]["ready"]
    assert status["serving"] == status["networks"] - count


def _mended(world: World) -> None:
    until(lambda: _readyz(world)["degraded"] == [], what="the end of it")
    world.wait_all_right()
    assert world.daemon.command("status", "--check").status == 0


def _answered(guest: Guest) -> bool:
    try:
        return guest.ask("/", timeout_s=0.5).status == 200
    except Lost:
        return False


def test_a_network_whose_port_another_program_has_is_degraded_and_named_by_the_command(
    world: World,
) -> None:
    world.lab.namespace_network("busy")
    name = world.lab.name("busy")
    guest = world.lab.guest("busy", 5)
    server = subprocess.Popen(
        (*within(name), sys.executable, "-m", "http.server", "80", "--bind", IPV4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: _answered(guest), what="the other program's answer")
        added = world.daemon.command("network", "add", "busy", "--namespace", name)
        assert added.status == _NOT_IN_FORCE
        assert f"(pid {server.pid})" in added.out
        assert "network busy is not served over IPv4" in " ".join(added.out.split())
        assert "stop it" in added.out
        again = world.daemon.command("network", "set", "busy", "--name", "Busy", "--json")
        assert again.status == _NOT_IN_FORCE
        assert not json.loads(again.out)["applied"]
        _degraded(world, "port-busy", f"(pid {server.pid})")
        assert _metric(world, 'imdsproxy_foreign_listeners{effect="blocks"}') == 1
    finally:
        server.kill()
        server.wait()
    _mended(world)
    assert world.daemon.command("network", "set", "busy", "--name", "Free").status == 0


def test_a_program_that_shares_the_port_is_degraded_and_named(world: World) -> None:
    name = world.lab.name("shared")
    world.lab.namespace_network("shared")
    intruder = world.lab.intrude(name, IPV4, reuse_port=True)
    added = world.daemon.command("network", "add", "shared", "--namespace", name)
    assert added.status == _NOT_IN_FORCE
    assert f"(pid {intruder.pid})" in added.out
    _degraded(world, "foreign-listener", f"(pid {intruder.pid})")
    assert _metric(world, 'imdsproxy_foreign_listeners{effect="shares"}') == 1
    logged = [one for one in world.daemon.log_entries() if one["message"] == "foreign listener"]
    command = Path(f"/proc/{intruder.pid}/comm").read_text().strip()
    assert (logged[-1]["pids"], logged[-1]["programs"]) == ([intruder.pid], [command])
    intruder.stop()
    _mended(world)


def test_instances_whose_record_is_not_in_force_are_listed_so_with_the_reason(world: World) -> None:
    file = _file_source(world) / "web.yaml"
    port = {"network": "red", "addresses": ["10.0.0.77"]}
    web: dict[str, object] = {"id": "web", "name": "web", "ports": [port]}
    file.write_text(json.dumps({"instances": [web]}))
    until(lambda: _pending(world).get("web") == [], what="the record")
    file.write_text(json.dumps({"instances": [{**web, "tags": 5}]}))
    until(lambda: _pending(world)["web"], what="the refused version")
    shown = world.daemon.command("instance", "show", "web")
    assert "# not in force 1: a newer version is refused:" in shown.out
    world.lab.delete_namespace("green")
    until(lambda: _pending(world)["green-5"], what="the network that went")
    lines = world.daemon.command("instance", "list").out.splitlines()
    states = {line.split()[0]: re.split(r"\s{2,}", line.strip())[-1] for line in lines[1:]}
    assert (states["web"], states["green-5"], states["red-5"]) == (*["not in force"] * 2, "ok")
    file.unlink()
    until(lambda: "web" not in _pending(world), what="its end")


def _file_source(world: World) -> Path:
    """Start the controller with a source that reads files, until the end of the test; where they are."""
    records = Path(tempfile.mkdtemp(dir=world.daemon.directory))
    source = {"sources": {"file": {"enabled": True, "directory": str(records)}}}
    world.daemon.configure({**world.settings, **source})
    world.daemon.kill_controller()
    world.daemon.start()
    return records


def _pending(world: World) -> dict[str, Any]:
    listed = cast("list[dict[str, Any]]", world.daemon.admin.get("/v1/instances"))
    return {one["record"]["id"]: one["pending"] for one in listed}
