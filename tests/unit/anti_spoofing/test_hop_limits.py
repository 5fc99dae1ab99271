"""Hop limits: no record counts on a rule that is not there."""

from __future__ import annotations

import asyncio
import json
from ipaddress import ip_address
from pathlib import Path

import pytest

from imdsproxy.anti_spoofing.hop_limits import HopLimits
from imdsproxy.anti_spoofing.kernel import HopPlace, table_journal
from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.core.model import NetworkId
from imdsproxy.core.wire import hop_limit_of, withhold_token
from support.fake_mac_filters import FakeHopLimits

_RED, _GREY = NetworkId("red"), NetworkId("grey")
_ONE, _OTHER = NamespaceRef("ns-red", 1), NamespaceRef("ns-red", 2)
_LIMITED = "+1tooo--:0:0:2|i-1|r-1"
_WITHHELD = "+1tooo--:0:0:0|i-1|r-1"


class _Case:
    def __init__(self, directory: Path, kernel: FakeHopLimits | None = None) -> None:
        self.kernel = kernel or FakeHopLimits()
        self.hops = HopLimits(self.kernel, table_journal(directory / "hops.json"))
        self.changed: list[frozenset[NetworkId]] = []
        self.needed: list[frozenset[NetworkId]] = []
        self.hops.on_change, self.hops.on_need = self.changed.append, self.needed.append

    def records(self, *, complete: bool = True, **values: str | None) -> dict[str, str | None]:
        """A round of the record loop; what would be in force."""
        wanted: dict[str, str | None] = {f"{name}/10.0.0.5": one for name, one in values.items()}
        armed = self.hops.restrict(wanted)
        self.hops.commit(armed, complete=complete)
        return wanted

    async def open(self, place: HopPlace = _ONE) -> frozenset[NetworkId]:
        """The listener loop makes HAProxy listen in red, and in grey on the host."""
        at = ip_address("169.254.169.254")
        return await self.hops.open(
            [Endpoint(_RED, at, 80, None, place), Endpoint(_GREY, at, 80, None, None)]
        )


@pytest.fixture
def case(tmp_path: Path) -> _Case:
    return _Case(tmp_path)


def test_a_map_value_has_its_limit() -> None:
    assert hop_limit_of(_LIMITED) == 2
    assert [hop_limit_of(one) for one in (None, "-", "!", "i-1|r-1", "@main|x|i|p")] == [64] * 5
    assert withhold_token(_LIMITED) == _WITHHELD
    assert withhold_token("+1tooo--:3:9:2") == "+1tooo--:3:9:0"
    assert withhold_token("+1tooo--:3:9:2:more|i|r") == "+1tooo--:3:9:0:more|i|r"


async def test_a_record_waits_for_the_rule_and_then_has_its_limit(case: _Case) -> None:
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}
    assert case.needed == [frozenset({_RED})]
    assert case.hops.effective(_RED, "+1tooo--:0:0:2") == "+1tooo--:0:0:0"
    assert await case.open() == frozenset()
    assert case.kernel.there == {_ONE}
    assert case.changed == [frozenset({_RED})]
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _LIMITED}
    assert case.hops.effective(_RED, "+1tooo--:0:0:2") == "+1tooo--:0:0:2"


async def test_without_limits_there_is_no_rule(case: _Case) -> None:
    case.records(red="+1trro--:0:0:64|i|r", grey="i|r")
    await case.open()
    assert not case.kernel.there
    assert not case.hops.journal.path.exists()


async def test_the_rule_is_removed_when_no_record_in_force_relies_on_it(case: _Case) -> None:
    case.records(red=_LIMITED)
    await case.open()
    case.records(red=_LIMITED)
    wanted: dict[str, str | None] = {"red/10.0.0.5": None}
    armed = case.hops.restrict(wanted)
    await case.hops.sweep()
    assert case.kernel.there == {_ONE}
    case.hops.commit(armed, complete=True)
    assert case.needed[-1] == frozenset({_RED})
    await case.open()
    await case.hops.sweep()
    assert not case.kernel.there
    assert json.loads(case.hops.journal.path.read_text()) == {}


async def test_where_the_kernel_refuses_no_token_is_given_and_a_reason_is(case: _Case) -> None:
    case.kernel.refuses.add(_ONE)
    case.records(red=_LIMITED)
    assert await case.open() == frozenset()
    assert [one.field for one in case.hops.refused.values()] == ["networks.red"]
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}
    case.kernel.refuses.clear()
    await case.open()
    assert not case.hops.refused
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _LIMITED}


async def test_a_network_is_not_listened_in_while_its_records_rely_on_a_refused_rule(
    case: _Case,
) -> None:
    """A namespace made anew, before HAProxy's map says that its guests get no tokens."""
    case.records(red=_LIMITED)
    await case.open()
    case.records(red=_LIMITED)
    case.kernel.refuses.add(_OTHER)
    assert await case.open(_OTHER) == {_RED}
    assert case.changed[-1] == frozenset({_RED})
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}
    assert case.needed[-1] == frozenset({_RED})
    assert await case.open(_OTHER) == frozenset()


async def test_what_an_earlier_process_left_is_relied_on_where_it_can_be_had(
    tmp_path: Path,
) -> None:
    kernel = FakeHopLimits()
    first = _Case(tmp_path, kernel)
    first.records(red=_LIMITED, grey=_LIMITED)
    await first.open()
    kernel.there.clear()
    kernel.refuses.add(None)
    second = _Case(tmp_path, kernel)
    await second.hops.preload()
    assert second.records(complete=False, red=_LIMITED, grey=_LIMITED) == {
        "red/10.0.0.5": _LIMITED,
        "grey/10.0.0.5": _WITHHELD,
    }


async def test_an_earlier_process_s_rule_stays_until_all_records_were_looked_at(
    tmp_path: Path,
) -> None:
    first = _Case(tmp_path)
    first.records(red=_LIMITED)
    await first.open()
    second = _Case(tmp_path, first.kernel)
    await second.hops.preload()
    second.records(complete=False, grey="i|r")
    for there in ({_ONE}, set()):
        await second.open()
        await second.hops.sweep()
        assert first.kernel.there == there
        second.records(complete=True)


async def test_a_rule_that_another_program_removed_is_created_again_or_relied_on_no_more(
    case: _Case,
) -> None:
    case.records(red=_LIMITED)
    await case.open()
    case.records(red=_LIMITED)
    case.kernel.there.clear()
    case.needed.clear()
    await case.hops.lost("another")
    assert not case.needed
    # Before the next round, which may have to wait: answers have no limit meanwhile.
    await case.hops.lost("td-hops")
    assert case.kernel.there == {_ONE}
    assert case.needed == [frozenset({_RED})]
    case.kernel.there.clear()
    case.kernel.refuses.add(_ONE)
    await case.hops.lost("")
    assert await case.open() == {_RED}
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}


async def test_a_rule_that_is_removed_while_it_is_created_is_created_again(case: _Case) -> None:
    noticed: list[asyncio.Task[None]] = []

    def flush() -> None:
        case.kernel.watch = lambda: None
        case.kernel.there.clear()
        noticed.append(asyncio.create_task(case.hops.lost("")))

    case.records(red=_LIMITED)
    await case.open()
    await case.hops.lost("")
    case.kernel.watch = flush
    await case.open()
    await asyncio.gather(*noticed)
    assert case.kernel.there == {_ONE}


async def test_a_rule_that_is_being_removed_is_relied_on_no_more(case: _Case) -> None:
    case.records(red=_LIMITED)
    await case.open()
    case.records(red=None)
    came: list[dict[str, str | None]] = []
    case.kernel.watch = lambda: came.append(case.records(red=_LIMITED))
    await case.hops.sweep()
    assert came == [{"red/10.0.0.5": _WITHHELD}]
    await case.open()
    assert case.kernel.there == {_ONE}


async def test_every_rule_is_removed_at_the_end(case: _Case, tmp_path: Path) -> None:
    case.records(red=_LIMITED)
    await case.open()
    await _Case(tmp_path, case.kernel).hops.close_all()
    assert not case.kernel.there
