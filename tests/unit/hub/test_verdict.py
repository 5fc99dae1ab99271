"""What `fleet status --check` goes by."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from imdsproxy.hub.api.operations import FleetStatus
from imdsproxy.hub.api.verdict import judge_fleet
from imdsproxy.hub.store.etcd_messages import Header, MemberSilent, MemberStatus

_HUB = {"name": "hub-1", "url": None, "answers": True, "absent": False, "absent_since": None}
_WELL = FleetStatus(
    fleet="f", incarnation=1, revision=9, suspect=None, writes_stopped=False, hubs=[_HUB],
    networks=1, instances=1, hosts=3, connected=3, behind=[], absent=[], renewing=[],
    regained={},
    authority_ends=None, problems={}, token_keys=None, imports=[], etcd=[],
)  # fmt: skip
_UP = MemberStatus("m", 1, "3.5", 1, 1, 100, (), 1, Header(9, 1))
_DOWN = MemberSilent("m", "no answer in time")


def test_a_fleet_without_a_problem_is_ready_and_not_degraded() -> None:
    found = judge_fleet(_WELL, [_UP] * 3, ())
    assert (found.ready, found.reasons, found.degraded) == (True, (), ())


@pytest.mark.parametrize(
    ("fields", "members", "reason"),
    [
        ({"suspect": "x is missing", "writes_stopped": True}, [_UP] * 3, "x is missing"),
        ({}, [_UP, _DOWN, _DOWN], "no quorum: 2 of 3"),
        (
            {"problems": {"etcd": "no quorum: 1 of 3 members answer"}},
            [_UP],
            "etcd has no quorum: 1",
        ),
        ({}, [replace(_UP, problems=("NOSPACE",)), _UP, _UP], "etcd is full"),
    ],
)
def test_a_fleet_in_which_nothing_can_be_written_is_not_ready(
    fields: Mapping[str, Any], members: list[MemberStatus | MemberSilent], reason: str
) -> None:
    found = judge_fleet(replace(_WELL, **fields), members, ())
    assert not found.ready
    assert reason in found.reasons[0]


def test_a_hub_that_serves_no_host_is_not_ready() -> None:
    assert not judge_fleet(_WELL, [_UP], ["it lacks a key"]).ready


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"hubs": [_HUB, {**_HUB, "name": "hub-2", "answers": False}]}, "hub-2 does not answer"),
        ({"hubs": [_HUB, {**_HUB, "name": "hub-2", "absent": True}]}, "hub-2 is absent"),
        ({"etcd": [{"url": "m", "problems": ["does not answer: why"]}]}, "m does not answer"),
        ({"absent": ["a"]}, "1 of 3 hosts are absent"),
        ({"behind": ["a"]}, "not everything is in force on 1"),
        ({"renewing": ["a"]}, "do not know all CAs"),
        ({"token_keys": "no key"}, "no key"),
        ({"suspect": "one host claims it"}, "one host claims it"),
        ({"problems": {"/imds/1/net/x": "not readable"}}, "/imds/1/net/x: not readable"),
    ],
)
def test_what_does_not_stop_changes_is_degraded(fields: Mapping[str, Any], word: str) -> None:
    found = judge_fleet(replace(_WELL, **fields), [_UP, _UP, _DOWN], ())
    assert found.ready
    assert len(found.degraded) == 1
    assert word in found.degraded[0]
