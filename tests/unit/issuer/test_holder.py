"""Tokens that a host holds: fetched ahead, renewed, shared, and gone with their subjects."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.errors import SourceUnavailable
from imdsproxy.issuer.claims import Refusal
from imdsproxy.issuer.exchange import MOST_AT_ONCE, Token
from imdsproxy.issuer.holder import Held, TokenHolder, Wanted
from imdsproxy.issuer.rotation import MARGIN_S
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.subject import Subject

_LIFE_S: Final = 600
_SUBJECT: Final = Subject(
    InstanceId("web"), NetworkId("red"), "p", audiences=("*", "keystone", "vault")
)


@dataclass(slots=True)
class Rig:
    """Holder with a clock and a source of the test's own."""

    directory: Path
    now: float = 1000.0
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    away: bool = False
    refuses: Refusal | None = None
    pauses: list[float] = field(default_factory=list)
    rounds: int = 1
    parts: list[float] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    broken: str = ""
    key: str = "by key 1"
    ahead_s: float = 0.0

    def holder(self) -> TokenHolder:
        return TokenHolder(
            self.directory,
            self,
            lambda: self.now,
            self._uniform,
            lambda: self.now + self.ahead_s,
            pause=self._pause,
        )

    def _uniform(self, low: float, _: float) -> float:
        return self.parts.pop(0) if self.parts else low

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        if len(self.pauses) >= self.rounds:
            raise asyncio.CancelledError

    async def request(self, wanted: Sequence[Wanted]) -> list[Token | Refusal]:
        await asyncio.sleep(0)
        if self.away or any(one.subject.instance == self.broken for one in wanted):
            raise SourceUnavailable("no hub")
        self.batches.append(len(wanted))
        self.asked += [(one.audience, one.nonce) for one in wanted]
        number = len(self.asked)
        if self.refuses is not None:
            return [self.refuses for _ in wanted]
        return [Token(f"t{number}", f"id{number}", 0, _LIFE_S) for _ in wanted]

    async def document(self, name: str, subject: Subject) -> dict[str, str] | Refusal:
        if self.away:
            raise SourceUnavailable("no hub")
        self.asked.append((name, None))
        return self.refuses or {"document": subject.document or "", "signature": self.key}

    def have(self, *subjects: Subject) -> None:
        """Have these subjects, and no other."""
        for path in self.directory.iterdir():
            path.unlink()
        for one in subjects:
            (self.directory / one.id).write_bytes(one.render())


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    made = Rig(tmp_path)
    made.have(_SUBJECT)
    return made


async def _run(rig: Rig, holder: TokenHolder, rounds: int = 1) -> None:
    rig.rounds = len(rig.pauses) + rounds
    with pytest.raises(asyncio.CancelledError):
        await holder.run()


async def _get(
    holder: TokenHolder, audience: str = "vault", nonce: str | None = None
) -> Held | Refusal | None:
    return await holder.get(_SUBJECT.id, _SUBJECT, audience, nonce)


async def test_named_audiences_are_fetched_before_a_guest_requests_them(rig: Rig) -> None:
    holder = rig.holder()
    await _run(rig, holder)
    assert sorted(rig.asked) == [("keystone", None), ("vault", None)]
    assert isinstance(await _get(holder), Held)
    assert len(rig.asked) == 2


async def test_a_token_is_the_same_for_half_of_its_life_and_renewed_then(rig: Rig) -> None:
    holder = rig.holder()
    first = await _get(holder)
    rig.now += _LIFE_S / 2 - 1
    assert await _get(holder) == first
    rig.now += 2
    await _run(rig, holder, 2)
    assert await _get(holder) != first


async def test_tokens_of_a_host_are_renewed_together_by_one_request(rig: Rig) -> None:
    holder = rig.holder()
    # The second one would be due later.
    rig.parts = [0.5, 0.6]
    await _get(holder, "keystone")
    rig.now += 10
    await _get(holder, "vault")
    rig.now += _LIFE_S / 2 - 1
    await _run(rig, holder)
    # The token of `vault` is in the first half of its life.
    assert rig.batches == [1, 1, 1]
    rig.now += _LIFE_S / 2 + 1
    rig.parts = [0.55]
    await _run(rig, holder)
    assert rig.batches == [1, 1, 1, 2]
    rig.now += 0.54 * _LIFE_S
    await _run(rig, holder)
    assert rig.batches == [1, 1, 1, 2]
    rig.now += 0.02 * _LIFE_S
    await _run(rig, holder)
    assert rig.batches == [1, 1, 1, 2, 2]


async def test_a_held_token_outlives_an_outage_of_the_source(rig: Rig) -> None:
    holder = rig.holder()
    first = await _get(holder)
    rig.away = True
    rig.now += _LIFE_S - 1
    await _run(rig, holder)
    assert await _get(holder) == first
    rig.now += 2
    with pytest.raises(SourceUnavailable):
        await _get(holder)


@pytest.mark.parametrize("step_s", [-86_400, -60, 60, 86_400])
async def test_no_held_token_is_given_after_the_clock_was_set_or_the_host_suspended(
    rig: Rig, step_s: int
) -> None:
    holder = rig.holder()
    await _run(rig, holder)
    first = await _get(holder)
    rig.ahead_s = step_s
    # No token of before, though no other one can be had.
    rig.away = True
    with pytest.raises(SourceUnavailable):
        await _get(holder)
    rig.away = False
    await _run(rig, holder)
    assert len(holder.held) == 2
    assert await _get(holder) != first


async def test_requests_at_one_time_share_one_signature(rig: Rig) -> None:
    holder = rig.holder()
    found = await asyncio.gather(*(_get(holder) for _ in range(10)))
    assert len(set(map(str, found))) == len(rig.asked) == 1


async def test_an_instance_that_requests_too_many_signatures_has_to_wait(rig: Rig) -> None:
    holder = rig.holder()
    found = [await _get(holder, nonce=str(number)) for number in range(30)]
    assert [isinstance(one, Held) for one in found] == [True] * 20 + [False] * 10
    # Held tokens cost nothing, and other instances have a share of their own.
    other = replace(_SUBJECT, instance=InstanceId("other"))
    assert isinstance(await holder.get(other.id, other, "vault", "n"), Held)
    rig.now += 1
    again = [await _get(holder, nonce=str(number)) for number in range(10)]
    assert [isinstance(one, Held) for one in again] == [True] * 5 + [False] * 5


async def test_tokens_go_with_their_subject(rig: Rig) -> None:
    holder = rig.holder()
    await _run(rig, holder)
    rig.have()
    assert holder.read(_SUBJECT.id) is None
    assert not holder.held
    rig.have(_SUBJECT)
    await _run(rig, holder)
    rig.have(replace(_SUBJECT, epoch=1))
    await _run(rig, holder, 2)
    assert {key[0] for key in holder.held} == {replace(_SUBJECT, epoch=1).id}


async def test_a_refused_token_is_not_requested_again_at_once(rig: Rig) -> None:
    rig.refuses = Refusal.AUDIENCE
    holder = rig.holder()
    await _run(rig, holder, 5)
    assert len(rig.asked) == 2
    rig.now += 61
    rig.refuses = None
    await _run(rig, holder)
    assert len(holder.held) == 2


async def test_a_token_that_only_a_guest_has_requested_is_not_renewed(rig: Rig) -> None:
    holder = rig.holder()
    await _get(holder, "free")
    rig.now += _LIFE_S
    await _run(rig, holder, 2)
    assert "free" not in {audience for _, audience in holder.held}


async def test_a_guest_that_may_request_any_audience_fills_no_memory(rig: Rig) -> None:
    holder = rig.holder()
    await _run(rig, holder)
    for number in range(100):
        rig.now += 1
        assert isinstance(await _get(holder, f"free{number}"), Held)
    assert len(holder.held) == 2 + 16
    # Named audiences, and those that are held, are held on.
    first = await _get(holder, "free0")
    assert await _get(holder, "free0") == first
    # A failure takes no place, and the places come free.
    rig.now += _LIFE_S
    rig.away = True
    for number in range(20):
        with pytest.raises(SourceUnavailable):
            await _get(holder, f"lost{number}")
    rig.away = False
    await _run(rig, holder, 2)
    assert await _get(holder, "other") == await _get(holder, "other")


async def test_a_held_token_outlives_a_record_that_a_hub_cannot_read(rig: Rig) -> None:
    holder = rig.holder()
    first = await _get(holder)
    rig.refuses = Refusal.UNREADABLE
    rig.now += _LIFE_S - 1
    await _run(rig, holder)
    assert await _get(holder) == first
    rig.now += 2
    assert await _get(holder) is Refusal.UNREADABLE


async def test_tokens_that_are_never_answered_keep_no_other_token_from_its_renewal(
    rig: Rig,
) -> None:
    audiences = tuple(f"a{number}" for number in range(MOST_AT_ONCE))
    broken = replace(_SUBJECT, instance=InstanceId("broken"), audiences=audiences)
    rig.have(broken)
    rig.broken = "broken"
    holder = rig.holder()
    await _run(rig, holder)
    rig.have(broken, _SUBJECT)
    await _run(rig, holder)
    assert {audience for _, audience in holder.held} == {"keystone", "vault"}


async def test_a_damaged_subject_keeps_no_other_one_from_its_tokens(rig: Rig) -> None:
    others = [replace(_SUBJECT, instance=InstanceId(f"i{number}")) for number in range(20)]
    rig.have(_SUBJECT, *others)
    (rig.directory / _SUBJECT.id).write_bytes(b"damaged")
    holder = rig.holder()
    await _run(rig, holder)
    assert {name for name, _ in holder.held} == {one.id for one in others}
    (rig.directory / _SUBJECT.id).write_bytes(_SUBJECT.render())
    await _run(rig, holder)
    assert _SUBJECT.id in {name for name, _ in holder.held}


@pytest.mark.parametrize("name", ["", "..", "../../etc/shadow", "x" * 32])
def test_no_other_file_is_taken_for_a_subject(rig: Rig, name: str) -> None:
    assert rig.holder().read(name) is None


async def test_a_document_is_signed_once_and_goes_with_its_subject(rig: Rig) -> None:
    subject = replace(_SUBJECT, document="{}")
    rig.have(subject)
    holder = rig.holder()
    for _ in range(30):
        assert await holder.document(subject.id, subject) == _signed("by key 1")
    assert len(rig.asked) == 1
    assert await holder.document(_SUBJECT.id, _SUBJECT) is Refusal.DOCUMENT
    rig.have()
    assert holder.read(subject.id) is None
    await holder.document(subject.id, subject)
    assert len(rig.asked) == 2


def _signed(key: str) -> dict[str, str]:
    return {"document": "{}", "signature": key}


async def test_a_document_of_an_old_key_is_given_no_longer_than_the_key_is_published(
    rig: Rig,
) -> None:
    subject = replace(_SUBJECT, document="{}")
    rig.have(subject)
    holder = rig.holder()
    await holder.document(subject.id, subject)
    rig.key = "by key 2"
    rig.now += MARGIN_S - 1
    assert await holder.document(subject.id, subject) == _signed("by key 1")
    rig.now += 1
    rig.away = True
    assert await holder.document(subject.id, subject) == _signed("by key 1")
    rig.away = False
    assert await holder.document(subject.id, subject) == _signed("by key 2")


async def test_named_audiences_are_fetched_ahead_though_a_guest_has_requested_another(
    rig: Rig,
) -> None:
    holder = rig.holder()
    subject = holder.read(_SUBJECT.id)
    assert subject is not None
    await holder.get(_SUBJECT.id, subject, "other", None)
    await _run(rig, holder)
    assert {"keystone", "vault"} <= {audience for audience, _ in rig.asked}


async def test_an_operator_s_check_asks_the_source_and_changes_no_guest_s_token(rig: Rig) -> None:
    holder = rig.holder()
    held = await _get(holder)
    tried = await holder.try_source(_SUBJECT.id, "vault")
    assert isinstance(tried, Token)
    assert isinstance(held, Held)
    assert tried != held.token
    assert await _get(holder) == held
    assert await holder.try_source("0" * 32, "vault") is Refusal.SUBJECT
    rig.away = True
    with pytest.raises(SourceUnavailable):
        await holder.try_source(_SUBJECT.id, "vault")
