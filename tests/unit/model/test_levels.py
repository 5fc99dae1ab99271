"""What a host of an older version gets of a newer record."""

from __future__ import annotations

from typing import Any

import pytest

from imdsproxy.model.policy import RULES
from imdsproxy.model.records import values
from imdsproxy.model.records.levels import SCHEMA, Schema
from imdsproxy.model.records.schema import Key, Table, list_of


def _make(**keys: object) -> dict[str, object]:
    return keys


_INNER = Table(
    "Inner",
    _make,
    "",
    Key("plain", values.TEXT),
    Key("shown", values.TEXT, since=2, limits=False),
    Key("closed", values.SWITCH, since=3),
)
_OUTER = Table("Outer", _make, "", Key("one", _INNER.kind), Key("many", list_of(_INNER.kind)))
_SCHEMA = Schema({"instance": _OUTER})
_PLAIN: dict[str, Any] = {"plain": "x"}
_FULL = {**_PLAIN, "shown": "y"}


@pytest.mark.parametrize(
    ("level", "fitted"),
    [(1, {"one": _PLAIN, "many": [_PLAIN, _PLAIN]}), (2, {"one": _FULL, "many": [_PLAIN, _FULL]})],
)
def test_what_only_adds_is_left_out_for_an_older_host_wherever_it_stands(
    level: int, fitted: dict[str, Any]
) -> None:
    record = {"one": _FULL, "many": [_PLAIN, _FULL]}
    assert _SCHEMA.fit("instance", record, level) == fitted
    assert _SCHEMA.needed("instance", record) == 1


def test_what_limits_is_left_to_an_older_host_which_refuses_it() -> None:
    record = {"many": [_PLAIN, {"closed": True}]}
    assert _SCHEMA.fit("instance", record, 1) == record
    assert (_SCHEMA.needed("instance", record), _SCHEMA.level) == (3, 3)


def test_every_rule_of_a_policy_limits_something_and_is_of_the_first_level() -> None:
    assert {(rule.since, rule.limits) for rule in RULES.values()} == {(1, True)}
    assert SCHEMA.level == 1
