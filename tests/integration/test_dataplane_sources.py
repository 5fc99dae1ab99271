"""Two sources behind one data plane: what they say together, and what neither may decide alone."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from support.daemon import Daemon, instance
from support.guest import Load
from support.lab import until
from support.world import World, open_world, own

pytestmark = pytest.mark.root

_TARGET: Final = "/latest/user-data"
_SETTINGS: Final[Mapping[str, Mapping[str, object]]] = {
    "resolver": {"hold_s": 1.0},
    "sources": {"file": {"enabled": True, "directory": "{directory}/records"}},
}


def _prepare(daemon: Daemon) -> None:
    (daemon.directory / "records").mkdir()


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    with open_world(_SETTINGS, prepare=_prepare) as world:
        yield world


@pytest.fixture
def file(world: World) -> Iterator[Path]:
    """The one record file, which is not there yet."""
    yield (file := world.daemon.directory / "records" / "a.json")
    file.unlink(missing_ok=True)
    until(lambda: _counts(world) == (len(world.networks), len(world.instances)), what="its end")


def _counts(world: World) -> tuple[int, int]:
    status = world.daemon.status()
    return status["networks"], status["instances"]


def _write(file: Path, *instances: Mapping[str, object], **more: object) -> None:
    temporary = file.with_name(".new")
    temporary.write_text(json.dumps({"instances": list(instances), **more}))
    temporary.rename(file)


def test_an_address_that_two_sources_give_to_two_instances_is_answered_503_until_only_one_does(
    world: World, file: Path
) -> None:
    with Load([world.guests["green"]], _TARGET, own) as load:
        with world.red.connect() as kept:
            assert own(world.red, kept.request(_TARGET)) is None
            _write(file, instance("other-5", "red"))
            until(lambda: kept.request(_TARGET).status == 503, within_s=3)
            assert kept.request(_TARGET).is_to_come_again
        (conflict, *_) = world.daemon.status()["conflicts"]
        claimants = {(one["instance"], one["source"]) for one in conflict["claimants"]}
        assert claimants == {("red-5", "sqlite"), ("other-5", "file")}
        assert world.daemon.explain("red", "10.0.0.5")["verdict"] == "conflict"
        # It outlives the controller.
        world.daemon.kill_controller()
        assert world.red.ask(_TARGET).status == 503
        world.daemon.start()
        assert world.red.ask(_TARGET).status == 503
        file.unlink()
        until(lambda: own(world.red, world.red.ask(_TARGET)) is None, within_s=2)
        assert world.daemon.status()["conflicts"] == []
    assert load.report.lost == []


def _why_not_served(world: World, network: str) -> object:
    return world.daemon.not_served().get(network, {}).get("code")


def test_a_second_network_on_a_listener_is_refused_or_left_out_and_the_first_is_served_on(
    world: World, file: Path
) -> None:
    namespace = world.lab.name("red")
    done = world.daemon.command("network", "add", "second", "--namespace", namespace)
    assert (done.status, "network red has this listener" in done.err) == (73, True)
    with Load([world.red], _TARGET, own) as load:
        # By its id it would be first.
        _write(file, networks=[{"id": "a-second", "listener": {"namespace": namespace}}])
        for _ in range(2):
            until(lambda: _why_not_served(world, "a-second") == "listener-shared", what="a refusal")
            assert "network red has" in world.daemon.not_served()["a-second"]["reason"]
            load.wait_answers(20)
            world.daemon.kill_controller()
            world.daemon.start()
    assert load.report.lost == []
