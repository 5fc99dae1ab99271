"""When keys of an issuer change their state."""

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.issuer.ring import KeyRing, KeyState
from imdsproxy.issuer.rotation import MARGIN_S, Pace, ends_tokens, plan_rotation

_PACE: Final = Pace(3600, 600)


def test_the_next_key_signs_when_each_verifier_knows_it_and_the_old_one_goes_after_its_last_token() -> (
    None
):
    ring = KeyRing().add("a", 0).add("b", 1000)
    assert plan_rotation(ring, _PACE, 1000 + 7199) == ring
    promoted = plan_rotation(ring, _PACE, 1000 + 7200)
    assert promoted.signing == "b"
    assert {one.id for one in promoted.entries} == {"a", "b"}
    at = 1000 + 7200
    assert plan_rotation(promoted, _PACE, at + 600 + MARGIN_S - 1) == promoted
    assert [one.id for one in plan_rotation(promoted, _PACE, at + 600 + MARGIN_S).entries] == ["b"]


def test_a_ring_without_a_rotation_stays() -> None:
    ring = KeyRing().add("a", 0)
    assert plan_rotation(ring, _PACE, 10**9) == ring


@pytest.mark.parametrize("now", [0, 999])
def test_a_clock_that_is_set_back_changes_nothing(now: int) -> None:
    ring = KeyRing().add("a", 0).add("b", 1000)
    assert plan_rotation(ring, _PACE, now) == ring


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20_000)), max_size=12))
def test_whenever_one_looks_a_key_was_published_long_enough_before_it_signs(
    steps: list[tuple[bool, int]],
) -> None:
    now, ring, published = 0, KeyRing().add("k0", 0), {"k0": 0}
    for number, (adds, passed) in enumerate(steps, 1):
        now += passed
        before = ring.signing
        ring = plan_rotation(ring, _PACE, now)
        assert [one.state for one in ring.entries].count(KeyState.SIGNING) == 1
        if ring.signing != before:
            assert now - published[ring.signing or ""] >= 2 * _PACE.cache_s
        if adds:
            published[f"k{number}"] = now
            ring = ring.add(f"k{number}", now)


def test_no_key_signs_before_its_time_by_a_clock_that_is_behind() -> None:
    ring = KeyRing().add("a", 100_000)
    assert ring.explain_early(100_000 - 60) is None
    assert "39940 s before" in (ring.explain_early(60_060) or "")


def test_tokens_end_with_a_key_that_goes_before_its_time_and_with_no_other() -> None:
    ring = KeyRing().add("a", 0)
    both = ring.add("b", 10)
    promoted = both.promote("b", 1000)
    assert not ends_tokens(KeyRing(), ring, _PACE, 0)
    assert not ends_tokens(both, ring, _PACE, 10)
    assert not ends_tokens(both, promoted, _PACE, 1000)
    assert ends_tokens(ring, KeyRing().add("b", 1000), _PACE, 1000)
    dropped = promoted.drop(["a"])
    assert ends_tokens(promoted, dropped, _PACE, 1000 + 600 + MARGIN_S - 1)
    assert not ends_tokens(promoted, dropped, _PACE, 1000 + 600 + MARGIN_S)
