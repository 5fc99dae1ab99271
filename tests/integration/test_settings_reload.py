"""Settings that are read anew; those of files that were emptied, cut short or removed are not."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml

from support.commands import Command
from support.daemon import instance
from support.health import METRICS, ask_operator
from support.lab import until
from support.world import World, open_world

pytestmark = pytest.mark.root

_DENIED: Final = "/latest/user-data"
_PAGE: Final = "/latest/meta-data/hostname"
_POLICY: Final = {"host": {"paths": {_DENIED: "deny"}}, "networks": {"red": {"tokens": "required"}}}


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    with open_world({"policy": _POLICY, "metrics": METRICS}) as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    yield shared_world
    shared_world.daemon.configure({**shared_world.daemon.settings, "policy": _POLICY})
    for path in _conf_d(shared_world).glob("*"):
        path.unlink()
    assert _reload(shared_world, "--allow-dropped").status == 0


def _conf_d(world: World) -> Path:
    return world.daemon.directory / "conf.d"


def _reload(world: World, *flags: str) -> Command:
    socket = str(world.daemon.runtime / "admin.sock")
    return world.daemon.command("reload", "--socket", socket, *flags)


def _send_sighup(world: World) -> None:
    assert world.daemon.process is not None
    before = len(world.daemon.log_entries())
    world.daemon.process.send_signal(signal.SIGHUP)
    until(lambda: len(world.daemon.log_entries()) > before, what="a line in the log")


def _answers(world: World) -> tuple[int, int]:
    green = world.guests["green"]
    return green.ask(_DENIED).status, world.red.ask(_PAGE).status


def _metric(world: World) -> str:
    lines = ask_operator(world.lab, "/metrics").text.splitlines()
    return next(one for one in lines if one.startswith("imdsproxy_settings_"))


def _is_refused(world: World) -> None:
    """Everywhere an operator may look; and the exit status of what systemd runs."""
    assert _answers(world) == (403, 401)
    assert world.daemon.log_entries()[-1]["code"] == "settings-dropped"
    status = world.daemon.status()
    assert any("settings" in line for line in status["readiness"]["degraded"])
    assert any(one["field"] == "settings" for one in status["problems"])
    assert _metric(world) == "imdsproxy_settings_refused 1.0"
    done = _reload(world)
    assert done.status == 78
    assert "--allow-dropped" in done.err
    assert _answers(world) == (403, 401)


@pytest.mark.parametrize("how", ["cut short", "emptied", "removed"])
def test_settings_that_were_cut_short_emptied_or_removed_are_refused_and_those_before_stay(
    world: World, how: str
) -> None:
    if how == "cut short":
        text = world.daemon.config.read_text()
        world.daemon.config.write_text(text[: text.index("policy:")])
    else:
        _conf_d(world).mkdir(exist_ok=True)
        file = _conf_d(world) / "50-limits.yaml"
        file.write_text("resolver: {hold_s: 0.5}\n")
        assert _reload(world).status == 0
        file.write_text("# nothing\n")
        if how == "removed":
            file.unlink()
    _send_sighup(world)
    _is_refused(world)


def test_policies_are_dropped_where_the_operator_allows_it_and_the_alarm_ends(world: World) -> None:
    settings = yaml.safe_load(world.daemon.config.read_text())
    del settings["policy"]
    world.daemon.config.write_text(yaml.safe_dump(settings))
    assert _reload(world).status == 78
    assert _answers(world) == (403, 401)
    assert _reload(world, "--allow-dropped").status == 0
    assert _answers(world) == (200, 200)
    assert world.daemon.status()["readiness"]["degraded"] == []
    assert _metric(world) == "imdsproxy_settings_refused 0.0"


def test_a_reload_that_finds_the_file_broken_is_in_status_until_one_succeeds(world: World) -> None:
    text = world.daemon.config.read_text()
    world.daemon.config.write_text(f"{text}haproxy: [\n")
    _send_sighup(world)
    assert any("not YAML" in line for line in world.daemon.status()["readiness"]["degraded"])
    world.daemon.config.write_text(text)
    _send_sighup(world)
    assert world.daemon.status()["readiness"]["degraded"] == []


def test_the_command_says_why_where_the_emptied_file_named_the_socket(world: World) -> None:
    world.daemon.config.write_text("# nothing here\n")
    done = world.daemon.command("reload")
    assert done.status == 78
    assert "contains no settings" in done.err
    checked = world.daemon.command("check")
    assert "contains no settings" in checked.out


def test_a_start_with_a_file_of_comments_takes_the_defaults_and_warns(world: World) -> None:
    text = world.daemon.config.read_text()
    beside = _conf_d(world) / "0-paths.yaml"
    beside.parent.mkdir(exist_ok=True)
    beside.write_text(text)
    world.daemon.kill_controller()
    world.daemon.config.write_text("# nothing here\n")
    world.daemon.start()
    warned = [one for one in world.daemon.log_entries() if "settings file is empty" in one.values()]
    assert [one["file"] for one in warned] == [str(world.daemon.config)]
    assert _reload(world).status == 0
    world.daemon.config.write_text(text)
    beside.write_text("{}\n")
    assert _reload(world).status == 0


def test_the_region_of_the_settings_replaces_the_one_made_of_the_zone(world: World) -> None:
    def region() -> str:
        return world.guests["green"].ask("/latest/meta-data/placement/region").text

    zone = {"availability_zone": "zone-green"}
    world.daemon.put([], [instance("green-5", "green", fields=zone)])
    settings = world.daemon.settings
    before = region()
    world.daemon.reconfigure({**settings, "documents": {"region": "north"}})
    during = region()
    world.daemon.reconfigure(settings)
    assert (before, during, region()) == ("zone-green", "north", "zone-green")
