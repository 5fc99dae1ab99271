"""Two sources behind one data plane: what they say together, and what neither may decide alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import pytest

from support.daemon import Daemon, instance, user_data_of
from support.guest import Load
from support.lab import until
from support.world import RIGHT_WITHIN_S, World, open_world, own

pytestmark = pytest.mark.root

_TARGET: Final = "/latest/user-data"
_SETTINGS: Final[Mapping[str, Mapping[str, object]]] = {
    "resolver": {"hold_s": 1.0},
    "sources": {"file": {"enabled": True, "directory": "{directory}/records"}},
}


def _write(daemon: Daemon, name: str, instances: Sequence[Mapping[str, object]]) -> None:
    directory = daemon.directory / "records"
    temporary = directory / f".{name}.new"
    temporary.write_text(json.dumps({"instances": list(instances)}))
    temporary.rename(directory / f"{name}.json")


def _prepare(daemon: Daemon) -> None:
    (daemon.directory / "records").mkdir()


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    with open_world(_SETTINGS, prepare=_prepare) as world:
        yield world


@pytest.fixture(autouse=True)
def _no_files(world: World) -> Iterator[None]:
    yield
    for file in (world.daemon.directory / "records").iterdir():
        file.unlink()
    until(lambda: world.daemon.status()["instances"] == len(world.instances), what="files' end")


def test_an_address_that_two_sources_give_to_two_instances_is_answered_503_and_reported(
    world: World,
) -> None:
    with Load([world.guests["green"]], _TARGET, own) as load:
        with world.red.connect() as kept:
            assert own(world.red, kept.request(_TARGET)) is None
            _write(world.daemon, "a", [instance("other-5", "red")])
            until(lambda: world.daemon.status()["conflicts"], within_s=2, what="a conflict")
            until(lambda: kept.request(_TARGET).status == 503, within_s=RIGHT_WITHIN_S)
            for _ in range(5):
                reply = kept.request(_TARGET)
                assert reply.status == 503
                assert reply.headers["retry-after"]
        conflicts = world.daemon.status()["conflicts"]
        claimants = {
            (one["instance"], one["source"])
            for conflict in conflicts
            for one in conflict["claimants"]
        }
        assert claimants == {("red-5", "sqlite"), ("other-5", "file")}
        assert world.daemon.explain("red", "10.0.0.5")["verdict"] == "conflict"
        (world.daemon.directory / "records" / "a.json").unlink()
        until(lambda: own(world.red, world.red.ask(_TARGET)) is None, within_s=2)
        assert world.daemon.status()["conflicts"] == []
    assert load.report.lost == []


def test_a_conflict_outlives_the_controller(world: World) -> None:
    _write(world.daemon, "a", [instance("other-5", "red")])
    until(lambda: world.red.ask(_TARGET).status == 503, within_s=2)
    world.daemon.kill_controller()
    assert world.red.ask(_TARGET).status == 503
    world.daemon.start()
    assert world.red.ask(_TARGET).status == 503


def test_a_record_file_is_in_force_soon_stays_so_while_it_is_broken_and_is_gone_soon(
    world: World,
) -> None:
    guest = world.lab.guest("red", 90)
    _write(world.daemon, "b", [instance("red-90", "red", 90)])
    assert own(guest, guest.ask(_TARGET)) is None
    (world.daemon.directory / "records" / "b.json").write_text("{broken")
    until(lambda: any(one["problems"] for one in world.daemon.status()["sources"]), within_s=2)
    assert own(guest, guest.ask(_TARGET)) is None
    (problem,) = (one for source in world.daemon.status()["sources"] for one in source["problems"])
    assert problem["file"].endswith("b.json")
    world.daemon.kill_controller()
    _write(world.daemon, "b", [{**instance("red-90", "red", 90), "user_data": "meanwhile"}])
    assert guest.ask(_TARGET).body == user_data_of("red-90")
    world.daemon.start()
    until(lambda: guest.ask(_TARGET).text == "meanwhile", within_s=2)
    (world.daemon.directory / "records" / "b.json").unlink()
    until(lambda: guest.ask(_TARGET).status == 404, within_s=3)
