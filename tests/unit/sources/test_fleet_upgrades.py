"""Hubs and hosts of two versions, in each order: nothing is open that one of them limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.fleet import layout
from imdsproxy.fleet.guests import FleetPolicies
from imdsproxy.model.records.levels import Schema
from imdsproxy.sources.fleet import source as source_module
from imdsproxy.sources.fleet.source import FleetSource
from support.fleet_backing import fleet_source
from support.fleet_hub import HOST, FleetHub
from support.record_builders import instance, network
from support.source_runs import running, until
from support.versions import ADDED, LATER, NEWER, OLDER

N1: Final = network("n1")
A: Final = instance("a", "10.0.0.5")
_PLACE: Final = f"{layout.POLICIES}host/{HOST}"
_BOTH: Final = {LATER: 1, ADDED: 7, "tokens": "required"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FleetHub]:
    monkeypatch.setattr(source_module, "_LOOK_EVERY_S", 0.05)
    made = FleetHub()
    yield made
    made.close()


def _host(kept: Path, hub: FleetHub, schema: Schema) -> tuple[FleetSource, list[FleetPolicies]]:
    source, taken = fleet_source(kept, hub), list[FleetPolicies]()
    source.known.schema, source.take_policies = schema, taken.append
    return source, taken


def _rules(**rules: object) -> dict[str, bytes]:
    return {_PLACE: json.dumps(rules).encode()}


async def test_a_host_that_is_upgraded_later_observes_a_policy_without_what_it_does_not_know(
    hub: FleetHub, tmp_path: Path
) -> None:
    hub.streams.schema = NEWER
    hub.put([N1], [A])
    hub.write(_rules(tokens="required", **{ADDED: 7}))
    source, taken = _host(tmp_path / "fleet.sqlite", hub, OLDER)
    async with running(source) as heard:
        assert (taken[-1].rules.host.tokens, taken[-1].rules.host.burst) == ("required", None)
        assert not heard.last.problems


async def test_a_host_that_is_upgraded_later_serves_nothing_that_a_limit_is_for_that_it_does_not_know(
    hub: FleetHub, tmp_path: Path
) -> None:
    hub.streams.schema = NEWER
    hub.put([N1], [A])
    hub.write(_rules(**_BOTH))
    source, taken = _host(tmp_path / "fleet.sqlite", hub, OLDER)
    async with running(source) as heard:
        assert not heard.inventory.instances
        assert LATER in str(heard.last.problems)
        hub.write(_rules(tokens="required"))
        await heard.until(lambda each: each.inventory.instances and not each.last.problems)
        assert taken[-1].rules.host.tokens == "required"
        # What it has in force stays so, whatever it does not know.
        revision = hub.write(_rules(**_BOTH))
        await until(lambda: LATER in hub.wait(revision, 0.0).get(HOST, ""))
        assert taken[-1].rules.host.tokens == "required"
        assert set(heard.inventory.instances) == {"a"}
    # Upgraded, it takes all of it.
    source, taken = _host(tmp_path / "fleet.sqlite", hub, NEWER)
    async with running(source) as heard:
        await heard.until(lambda each: each.last.in_sync and not each.last.problems)
        assert (taken[-1].rules.host.hop_limit, taken[-1].rules.host.burst) == (1, 7)


async def test_a_host_that_is_upgraded_first_gets_all_that_an_older_hub_passes_on(
    hub: FleetHub, tmp_path: Path
) -> None:
    hub.streams.schema = OLDER
    hub.put([N1], [A])
    # Written by a hub that was upgraded, too.
    hub.write(_rules(**_BOTH))
    source, taken = _host(tmp_path / "fleet.sqlite", hub, NEWER)
    async with running(source) as heard:
        assert hub.streams.hosts[HOST].level == NEWER.level == OLDER.level + 1
        assert (taken[-1].rules.host.hop_limit, taken[-1].rules.host.burst) == (1, 7)
        assert not heard.last.problems
