"""Counts of HAProxy's workers added up, and the trees that required tokens leave open."""

from collections.abc import Sequence

import pytest

from imdsproxy.controller.token_report import (
    GuestWithoutToken,
    OpenTree,
    ReaderWithoutToken,
    TokenLedger,
    open_trees,
)
from imdsproxy.haproxy.rules.counting import CountedRow
from imdsproxy.model.entities import Dialect, Instance, InstanceId, NetworkId, Port, Upstream
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import Observation, SourceName
from imdsproxy.model.path_rules import PathWord
from imdsproxy.model.policy import PolicyBook, PolicyRules, TokenMode

_NOW = 1_795_000_000.0
_WEEK_S = 7 * 86_400


def _guest(reads: int, refused: int = 0, *, name: str = "web", age_s: float = 1.0) -> CountedRow:
    return CountedRow(("blue", name), reads, refused, age_s)


def _reader(looks: int, refused: int = 0, *, age_s: float = 1.0) -> CountedRow:
    return CountedRow(("blue", "web", "latest/user-data", "curl/8"), looks, refused, age_s)


@pytest.mark.parametrize(
    ("looks", "sums"),
    [
        # The same worker again counts what is more, a new one begins at zero.
        (((1, (5, 0)), (1, (8, 1)), (2, (1, 0)), (1, (9, 1)), (2, (3, 2))), (12, 3)),
        # HAProxy has forgotten an entry and made it anew.
        (((1, (9, 4)), (1, (2, 0)), (1, None), (1, (1, 1))), (12, 5)),
        # A pid that comes again is another worker.
        (((1, (5, 0)), (None, None), (1, (6, 0))), (11, 0)),
    ],
)
def test_what_each_worker_counts_more_is_added_up(
    looks: Sequence[tuple[int | None, tuple[int, int] | None]], sums: tuple[int, int]
) -> None:
    ledger = TokenLedger(_NOW)
    for worker, counts in looks:
        if worker is None:
            ledger.keep_workers(["2"])
        else:
            ledger.add(str(worker), [] if counts is None else [_guest(*counts)], [], _NOW)
    assert (ledger.read["blue"], ledger.refused["blue"]) == sums


def test_guests_are_reported_with_their_clients_the_last_seen_first() -> None:
    ledger = TokenLedger(_NOW)
    ledger.add("1", [_guest(3, 2, age_s=60), _guest(1, name="db", age_s=5)],
               [_reader(3, 1, age_s=60)], _NOW)  # fmt: skip
    trees = [OpenTree(NetworkId("blue"), InstanceId(f"i-{n}"), "/openstack") for n in range(150)]
    told = ledger.report(trees)
    assert (len(told.open_trees), told.open_tree_count) == (100, 150)
    assert told.guests == (
        GuestWithoutToken("blue", "db", 1, 0, _NOW - 5, ()),
        GuestWithoutToken("blue", "web", 3, 2, _NOW - 60,
                          (ReaderWithoutToken("latest/user-data", "curl/8", 3, 1, _NOW - 60),)),
    )  # fmt: skip


def test_two_clients_whose_names_are_shown_alike_are_added_up_once() -> None:
    ledger = TokenLedger(_NOW)
    for _ in range(3):
        ledger.add("1", [_guest(5)], [_reader(3, 1, age_s=60), _reader(2, age_s=9)], _NOW)
    (guest,) = ledger.report([]).guests
    assert guest.readers == (ReaderWithoutToken("latest/user-data", "curl/8", 5, 1, _NOW - 9),)


def test_what_is_a_week_old_is_not_told_and_the_sums_stay() -> None:
    ledger = TokenLedger(_NOW)
    ledger.add("1", [_guest(3)], [_reader(3)], _NOW)
    ledger.add("1", [_guest(1, name="db")], [], _NOW + _WEEK_S)
    assert [one.instance for one in ledger.report([]).guests] == ["db"]
    assert ledger.read["blue"] == 4


def test_of_too_many_guests_those_seen_longest_ago_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("imdsproxy.controller.token_report._GUESTS_KEPT", 2)
    ledger = TokenLedger(_NOW)
    rows = [_guest(1, name=name, age_s=age) for name, age in (("a", 9), ("b", 1), ("c", 5))]
    ledger.add("1", rows, [], _NOW)
    assert [one.instance for one in ledger.report([]).guests] == ["b", "c"]
    assert ledger.read["blue"] == 3


def _inventory(instance: Instance) -> Inventory:
    source = SourceName("file")
    inventory = Inventory([source])
    inventory.observe(Observation(source, instances={instance.id: instance}))
    return inventory


def _instance(
    user_data: bytes | None = b"#!/bin/sh\n",
    upstream: Upstream = Upstream.EMBEDDED,
    dialects: frozenset[Dialect] = frozenset(Dialect),
) -> Instance:
    port = Port(NetworkId("blue"))
    return Instance(InstanceId("web"), "web", "web", ports=(port,), user_data=user_data,
                    upstream=upstream, dialects=dialects)  # fmt: skip


_DENIED = (("/nocloud/user-data", PathWord.DENY),)
_OPTIONAL = {"tokens": TokenMode.OPTIONAL}
_LOCKED = {"openstack_tokens": TokenMode.REQUIRED, "nocloud_tokens": TokenMode.REQUIRED}


@pytest.mark.parametrize(
    ("instance", "more", "trees"),
    [
        (_instance(), {}, ["/openstack", "/nocloud"]),
        (_instance(), {"openstack_tokens": TokenMode.REQUIRED}, ["/nocloud"]),
        (_instance(), _LOCKED, []),
        (_instance(), {"seal_user_data": True}, []),
        (_instance(), {"endpoint": False}, []),
        (_instance(), {"tokens": TokenMode.OPTIONAL}, []),
        (_instance(user_data=None), {}, []),
        (_instance(dialects=frozenset({Dialect.EC2, Dialect.NOCLOUD})), {}, ["/nocloud"]),
        (_instance(dialects=frozenset({Dialect.OPENSTACK})), {}, []),
        (_instance(user_data=None, upstream=Upstream.NOVA), {}, ["/openstack"]),
        (_instance(), {**_OPTIONAL, "paths": _DENIED}, ["/latest", "/openstack"]),
        (_instance(), {"paths": _DENIED}, ["/openstack"]),
        (_instance(dialects=frozenset({Dialect.EC2})), {**_OPTIONAL, "paths": _DENIED}, []),
        (_instance(upstream=Upstream.NOVA), {**_OPTIONAL, "paths": _DENIED}, []),
    ],
)
def test_a_tree_is_open_that_gives_the_user_data_that_another_one_keeps(
    instance: Instance, more: dict[str, object], trees: list[str]
) -> None:
    rules = PolicyRules(**{"tokens": TokenMode.REQUIRED, **more})
    book = PolicyBook(networks={"blue": rules})
    expected = [OpenTree(NetworkId("blue"), InstanceId("web"), tree) for tree in trees]
    assert open_trees(_inventory(instance), book) == expected
    assert open_trees(_inventory(instance), book, InstanceId("web")) == expected
    assert open_trees(_inventory(instance), book, InstanceId("gone")) == []
