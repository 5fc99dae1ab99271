"""Record of each hub in etcd, which stays when the hub ends: status shows a lost hub as absent.

A key with a lease shows that a hub runs (`layout.HUBS`). The record has no lease, so that it outlives the hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from imdsproxy.fleet import layout
from imdsproxy.fleet.members import operator_key
from imdsproxy.fleet.values import KnownHub, parse_known_hub, render_known_hub
from imdsproxy.host.clock import Clock
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Compare, absent, unchanged
from imdsproxy.hub.store.state import FleetState

_log: Final = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class HubRecord:
    """Record to write if the comparisons hold."""

    key: str
    record: KnownHub
    compares: tuple[Compare, ...] = ()


def known_hub(state: FleetState, name: str) -> KnownHub | None:
    """Return the record of a hub; `None` for a name that no hub has had."""
    found = state.value(layout.KNOWN_HUBS + name)
    return None if found is None else parse_known_hub(found[0])


def absent_hubs(state: FleetState) -> dict[str, KnownHub]:
    """Return the hubs that do not run and were not revoked, by name."""
    names = sorted(key.removeprefix(layout.KNOWN_HUBS) for key in state.keys(layout.KNOWN_HUBS))
    found = {
        name: known_hub(state, name)
        for name in names
        if state.stored(layout.HUBS + name) is None and state.stored(operator_key(name)) is None
    }
    return {name: record for name, record in found.items() if record is not None}


def plan_hub_records(state: FleetState, name: str, url: str, now: float) -> Iterator[HubRecord]:
    """Plan the records that the hub `name`, which runs at `url`, must write."""
    own = KnownHub(url)
    if known_hub(state, name) != own or layout.KNOWN_HUBS + name in state.unreadable:
        yield HubRecord(layout.KNOWN_HUBS + name, own)
    for other, record in absent_hubs(state).items():
        key, stored = layout.KNOWN_HUBS + other, state.stored(layout.KNOWN_HUBS + other)
        if other != name and record.absent_since is None and stored is not None:
            # Another hub may write the absence as well, and the absent hub may come back.
            compares = unchanged(key, stored[1]), absent(layout.HUBS + other)
            yield HubRecord(key, KnownHub(record.url, int(now)), compares)


async def keep_hub_records(
    etcd: Etcd, state: FleetState, name: str, url: str, clock: Clock
) -> None:
    """Write the records of `plan_hub_records`; raise `EtcdUnavailable`."""
    for one in tuple(plan_hub_records(state, name, url, clock.now().timestamp())):
        await etcd.commit(one.compares, {one.key: render_known_hub(one.record)})
        _log.info("hub noted", key=one.key, absent=one.record.absent_since is not None)


def list_hubs(
    state: FleetState, name: str, urls: Mapping[str, str], answering: frozenset[str]
) -> list[dict[str, Any]]:
    """List all hubs: this hub, other running hubs with their URLs, and absent hubs."""
    hubs: list[dict[str, Any]] = [{"name": name, "url": None, "answers": True, "absent": False}]
    hubs += (
        {"name": one, "url": url, "answers": one in answering, "absent": False}
        for one, url in sorted(urls.items())
    )
    hubs += (
        {"name": one, "url": record.url, "answers": False, "absent": True}
        for one, record in absent_hubs(state).items()
        if one != name
    )
    since = {one: record.absent_since for one, record in absent_hubs(state).items()}
    return [{**one, "absent_since": since.get(one["name"])} for one in hubs]
