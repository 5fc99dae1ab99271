"""`documents.region`, taken over live: every guest reads the new region with its next request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pytest

from support.daemon import instance
from support.world import World

pytestmark = pytest.mark.root

_REGION: Final = "/latest/meta-data/placement/region"


def _reload(world: World, settings: Mapping[str, Mapping[str, object]]) -> None:
    world.daemon.configure(settings)
    socket = str(world.daemon.runtime / "admin.sock")
    done = world.daemon.command("reload", "--socket", socket, "--allow-dropped")
    assert done.status == 0, done.err


def test_the_region_of_the_settings_replaces_the_one_made_of_the_zone(world: World) -> None:
    zone = {"availability_zone": "zone-red"}
    world.daemon.put([], [instance("red-5", "red", fields=zone)])
    told = [world.red.ask(_REGION).text]
    settings = world.daemon.settings
    try:
        _reload(world, {**settings, "documents": {"region": "north"}})
        told.append(world.red.ask(_REGION).text)
    finally:
        _reload(world, settings)
    told.append(world.red.ask(_REGION).text)
    assert told == ["zone-red", "north", "zone-red"]
