"""Hop limits: no record counts on a rule that is not there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from imdsproxy.anti_spoofing.hop_limits import HopLimits
from imdsproxy.anti_spoofing.kernel import HopPlace, TableJournal
from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.core.model import NetworkId
from imdsproxy.core.wire import hop_limit_of, withhold_token
from support.fake_mac_filters import FakeHopLimits

_RED, _GREY = NetworkId("red"), NetworkId("grey")
_ONE, _OTHER = NamespaceRef("ns-red", 1), NamespaceRef("ns-red", 2)
_LIMITED = "+1tooo--:0:0:2|i-1|r-1"
_WITHHELD = "+1tooo--:0:0:0|i-1|r-1"


@dataclass
class _Case:
    hops: HopLimits
    kernel: FakeHopLimits
    changed: list[frozenset[NetworkId]] = field(default_factory=list)
    needed: list[frozenset[NetworkId]] = field(default_factory=list)

    def records(self, *, complete: bool = True, **values: str | None) -> dict[str, str | None]:
        """A round of the record loop; what would be in force."""
        wanted: dict[str, str | None] = {f"{name}/10.0.0.5": one for name, one in values.items()}
        armed = self.hops.restrict(wanted)
        self.hops.commit(armed, complete=complete)
        return wanted


def _case(directory: Path, kernel: FakeHopLimits | None = None) -> _Case:
    kernel = kernel or FakeHopLimits()
    hops = HopLimits(kernel, TableJournal(directory / "hops.json"))
    case = _Case(hops, kernel)
    hops.on_change, hops.on_need = case.changed.append, case.needed.append
    return case


def _endpoint(network: NetworkId, place: HopPlace) -> Endpoint:
    return Endpoint(network, ip_address("169.254.169.254"), 80, None, place)


@pytest.fixture
def case(tmp_path: Path) -> _Case:
    return _case(tmp_path)


def test_a_map_value_tells_its_limit() -> None:
    assert hop_limit_of(_LIMITED) == 2
    assert [hop_limit_of(one) for one in (None, "-", "!", "i-1|r-1", "@main|x|i|p")] == [64] * 5
    assert withhold_token(_LIMITED) == _WITHHELD
    assert withhold_token("+1tooo--:3:9:2") == "+1tooo--:3:9:0"
    assert withhold_token("+1tooo--:3:9:2:more|i|r") == "+1tooo--:3:9:0:more|i|r"


async def test_a_record_waits_for_the_rule_and_then_has_its_limit(case: _Case) -> None:
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}
    assert case.needed == [frozenset({_RED})]
    assert case.hops.effective(_RED, "+1tooo--:0:0:2") == "+1tooo--:0:0:0"
    assert await case.hops.open([_endpoint(_RED, _ONE), _endpoint(_GREY, None)]) == frozenset()
    assert case.kernel.there == {_ONE}
    assert case.changed == [frozenset({_RED})]
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _LIMITED}
    assert case.hops.effective(_RED, "+1tooo--:0:0:2") == "+1tooo--:0:0:2"


async def test_nobody_who_has_no_limit_pays(case: _Case) -> None:
    case.records(red="+1trro--:0:0:64|i|r", grey="i|r")
    await case.hops.open([_endpoint(_RED, _ONE)])
    assert not case.kernel.there
    assert not case.hops.journal.path.exists()


async def test_the_rule_goes_when_no_record_in_force_counts_on_it(case: _Case) -> None:
    case.records(red=_LIMITED)
    await case.hops.open([_endpoint(_RED, _ONE)])
    case.records(red=_LIMITED)
    wanted: dict[str, str | None] = {"red/10.0.0.5": None}
    armed = case.hops.restrict(wanted)
    await case.hops.sweep()
    assert case.kernel.there == {_ONE}
    case.hops.commit(armed, complete=True)
    assert case.needed[-1] == frozenset({_RED})
    await case.hops.open([_endpoint(_RED, _ONE)])
    await case.hops.sweep()
    assert not case.kernel.there
    assert json.loads(case.hops.journal.path.read_text()) == {}


async def test_where_the_kernel_refuses_no_token_is_given_and_a_reason_is(case: _Case) -> None:
    case.kernel.refuses.add(_ONE)
    case.records(red=_LIMITED)
    assert await case.hops.open([_endpoint(_RED, _ONE)]) == frozenset()
    assert [one.field for one in case.hops.problems] == ["networks.red"]
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}
    case.kernel.refuses.clear()
    await case.hops.open([_endpoint(_RED, _ONE)])
    assert not case.hops.problems
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _LIMITED}


async def test_nobody_listens_where_records_count_on_a_rule_that_cannot_be_had(
    case: _Case,
) -> None:
    """A namespace made anew, before HAProxy has been told that its guests get no tokens."""
    case.records(red=_LIMITED)
    await case.hops.open([_endpoint(_RED, _ONE)])
    case.records(red=_LIMITED)
    case.kernel.refuses.add(_OTHER)
    assert await case.hops.open([_endpoint(_RED, _OTHER)]) == {_RED}
    assert case.changed[-1] == frozenset({_RED})
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}
    assert case.needed[-1] == frozenset({_RED})
    assert await case.hops.open([_endpoint(_RED, _OTHER)]) == frozenset()


async def test_what_an_earlier_process_left_is_relied_on_where_it_can_be_had(
    tmp_path: Path,
) -> None:
    kernel = FakeHopLimits()
    first = _case(tmp_path, kernel)
    first.records(red=_LIMITED, grey=_LIMITED)
    await first.hops.open([_endpoint(_RED, _ONE), _endpoint(_GREY, None)])
    kernel.there.clear()
    kernel.refuses.add(None)
    second = _case(tmp_path, kernel)
    await second.hops.preload()
    assert second.records(complete=False, red=_LIMITED, grey=_LIMITED) == {
        "red/10.0.0.5": _LIMITED,
        "grey/10.0.0.5": _WITHHELD,
    }


async def test_an_earlier_process_rule_stays_until_all_records_were_looked_at(
    tmp_path: Path,
) -> None:
    kernel = FakeHopLimits()
    first = _case(tmp_path, kernel)
    first.records(red=_LIMITED)
    await first.hops.open([_endpoint(_RED, _ONE)])
    second = _case(tmp_path, kernel)
    await second.hops.preload()
    second.records(complete=False, grey="i|r")
    await second.hops.open([_endpoint(_RED, _ONE)])
    await second.hops.sweep()
    assert kernel.there == {_ONE}
    second.records(complete=True)
    await second.hops.open([_endpoint(_RED, _ONE)])
    await second.hops.sweep()
    assert not kernel.there


async def test_a_rule_that_somebody_took_away_is_there_again_or_counted_on_no_more(
    case: _Case,
) -> None:
    case.records(red=_LIMITED)
    await case.hops.open([_endpoint(_RED, _ONE)])
    case.records(red=_LIMITED)
    case.kernel.there.clear()
    case.needed.clear()
    case.hops.lost("another")
    assert not case.needed
    case.hops.lost("td-hops")
    assert case.needed == [frozenset({_RED})]
    await case.hops.open([_endpoint(_RED, _ONE)])
    assert case.kernel.there == {_ONE}
    case.kernel.refuses.add(_ONE)
    case.hops.lost("")
    assert await case.hops.open([_endpoint(_RED, _ONE)]) == {_RED}
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}


async def test_all_of_it_is_taken_away_at_the_end(tmp_path: Path) -> None:
    kernel = FakeHopLimits()
    first = _case(tmp_path, kernel)
    first.records(red=_LIMITED)
    await first.hops.open([_endpoint(_RED, _ONE)])
    await _case(tmp_path, kernel).hops.close_all()
    assert not kernel.there
