"""What records say of how their guests may read, and when instances came, as guests see it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest
import yaml

from support.daemon import instance
from support.guest import Guest
from support.lab import until
from support.world import World, open_world

pytestmark = pytest.mark.root

_USER_DATA = "/latest/user-data"
_META = "/openstack/latest/meta_data.json"


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    settings = {"sources": {"file": {"enabled": True, "directory": "{directory}/records"}}}

    def prepare(daemon: Any) -> None:  # noqa: ANN401 - what `open_world` passes
        (daemon.directory / "records").mkdir()

    with open_world(settings, prepare=prepare) as world:
        yield world


def _settings(world: World, policy: Mapping[str, Any]) -> None:
    world.daemon.reconfigure({**world.settings, "policy": policy})


def _network_says(world: World, name: str, policy: Mapping[str, Any]) -> None:
    record = next(one for one in world.networks if one["id"] == name)
    assert world.daemon.put([{**record, "policy": policy}])["applied"]


def _instance_says(world: World, guest: Guest, policy: Mapping[str, Any], **fields: object) -> None:
    said = {**fields, "policy": policy}
    record = instance(f"{guest.network}-5", guest.network, fields=said)
    assert world.daemon.put(instances=[record])["applied"]


def _status(guest: Guest, target: str = _USER_DATA) -> int:
    return guest.ask(target).status


def test_records_are_in_force_by_scope_at_once_and_settings_over_those_of_the_same_scope(
    world: World,
) -> None:
    pids = world.settled()
    second = world.lab.guest("red", 6)
    world.daemon.put(instances=[instance("red-6", "red", 6)])

    def statuses() -> list[int]:
        return [_status(one) for one in (world.red, second, world.guests["green"])]

    _network_says(world, "red", {"tokens": "required"})
    assert statuses() == [401, 401, 200]
    _instance_says(world, world.red, {"tokens": "optional"})
    assert statuses() == [200, 401, 200]
    _settings(world, {"networks": {"red": {"tokens": "optional"}}})
    assert statuses() == [200, 200, 200]
    _instance_says(world, world.red, {"tokens": "required"})
    _settings(world, {"host": {"tokens": "optional"}})
    assert statuses() == [401, 401, 200]
    _settings(world, {"instances": {"red-5": {"tokens": "optional"}}})
    # What the instance's record does not set is the network's.
    _network_says(world, "red", {"endpoint": False})
    assert statuses() == [403, 403, 200]
    _network_says(world, "red", {})
    assert statuses() == [200, 200, 200]
    assert world.settled() == pids


def test_settings_for_somebody_whom_nobody_tells_of_are_named_by_status(world: World) -> None:
    """A name that is mistyped protects nobody, and nothing else would say so."""
    optional = {"tokens": "optional"}
    _instance_says(world, world.red, {}, project="payments")
    _settings(
        world,
        {
            "networks": {"red": optional, "rad": optional},
            "projects": {"payments": optional, "payment": optional},
            "instances": {"red-5": optional, "red-55": optional},
        },
    )
    named = ["policy.networks.rad", "policy.projects.payment", "policy.instances.red-55"]
    assert world.daemon.status()["policy_for_nobody"] == named
    assert named[2] in world.daemon.command("status").out
    _settings(world, {})
    assert world.daemon.status()["policy_for_nobody"] == []


def test_a_record_files_policy_is_in_force_and_a_bad_one_is_told_with_its_line(
    world: World,
) -> None:
    path = world.daemon.directory / "records" / "guests.yaml"
    guest = world.lab.guest("green", 7)
    record = instance("green-7", "green", 7)

    def write(policy: str) -> None:
        body = yaml.safe_dump([dict(record)], sort_keys=False)
        beside = path.with_suffix(".tmp")
        beside.write_text(f"instances:\n{body}  policy:\n    tokens: {policy}\n")
        beside.rename(path)

    try:
        write("required")
        until(lambda: _status(guest) == 401, within_s=5)
        write("sometimes")
        line = path.read_text().count("\n")

        def told() -> bool:
            problems = json.dumps(world.daemon.status())
            return f'"line": {line}' in problems and "policy.tokens" in problems

        until(told, within_s=5)
        assert _status(guest) == 401
        write("off")
        until(lambda: _status(guest) == 200, within_s=5)
    finally:
        path.unlink()
        until(lambda: world.daemon.command("instance", "show", "green-7").status != 0, within_s=5)


def test_the_boot_is_counted_from_when_the_store_was_first_told(world: World) -> None:
    guest = world.lab.guest("red", 8)
    began = int(time.time())
    record = instance("red-8", "red", 8, fields={"policy": {"openstack_tokens": "required"}})
    world.daemon.put(instances=[record])
    made = _created_at(world, "red-8")
    assert began <= made <= time.time()
    assert _status(guest, _META) == 200
    # Told again and again, it has not been made again.
    grace = {"openstack_tokens": "required", "boot_grace_s": 1}
    until(lambda: time.time() > made + 2, within_s=5)
    world.daemon.put(instances=[{**record, "policy": grace}])
    assert _created_at(world, "red-8") == made
    assert _status(guest, _META) == 401
    world.daemon.remove_instance("red-8")
    world.daemon.put(instances=[record])
    assert _created_at(world, "red-8") > made
    assert _status(guest, _META) == 200


def _created_at(world: World, name: str) -> int:
    shape = cast("Mapping[str, Any]", world.daemon.admin.get(f"/v1/instances/{name}"))
    return int(shape["record"]["created_at"])
