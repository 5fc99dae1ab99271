from __future__ import annotations

from io import StringIO

from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.haproxy.maps import (
    MapChanges,
    MapState,
    parse_base_map,
    parse_map,
    render_map,
    split_payload,
)
from imdsproxy.core.wire import MAP_TOMBSTONE

_KEYS = st.sampled_from([f"n/{number}" for number in range(6)])
_VALUES = st.sampled_from(["a|1", "a|2", "b|1", "!"])
_ENTRIES = st.dictionaries(_KEYS, _VALUES)
_WANTED = st.dictionaries(_KEYS, st.none() | _VALUES)


def _follow(present: dict[str, str], changes: MapChanges) -> dict[str, str]:
    after = dict(present)
    for key, value in changes.changed:
        assert key in after or value == MAP_TOMBSTONE
        assert after.get(key) != value
        after[key] = value
    for key in changes.removed:
        del after[key]
    for key, value in changes.added:
        assert key not in after
        after[key] = value
    return after


def test_a_removal_of_what_only_the_overlay_has_leaves_no_tombstone() -> None:
    state = MapState("1", overlay={"n/1": "a|1"})
    assert state.overlay_changes({"n/1": None}) == MapChanges(removed=("n/1",))


def test_tombstones_come_before_additions() -> None:
    state = MapState("1", base={"n/9": "a|1"})
    changes = state.overlay_changes({"n/1": "a|1", "n/9": None})
    assert changes == MapChanges(changed=(("n/9", MAP_TOMBSTONE),), added=(("n/1", "a|1"),))


@given(_ENTRIES, _WANTED, _WANTED)
def test_overlay_changes_lead_every_request_to_the_wanted_record(
    base: dict[str, str], first: dict[str, str | None], second: dict[str, str | None]
) -> None:
    state = MapState("1", base=base)
    for wanted in (first, second):
        before = {key: state.lookup(key) for key in base}
        state.overlay = _follow(state.overlay, state.overlay_changes(wanted))
        for key, value in wanted.items():
            assert state.lookup(key) == value
        for key in base.keys() - wanted.keys():
            assert state.lookup(key) == before[key]
        assert state.effective() == {
            key: value
            for key in {*base, *state.overlay}
            if (value := state.lookup(key)) is not None
        }


@given(_ENTRIES)
def test_a_map_file_is_read_as_it_was_written(entries: dict[str, str]) -> None:
    text = render_map(entries, "7")
    assert parse_map(text) == ("7", entries)
    generation, base = parse_base_map(StringIO(text))
    assert (generation, dict(base)) == ("7", entries)
    assert all(base[key] == value for key, value in entries.items())


def test_a_file_may_have_no_generation_and_of_a_key_that_is_there_twice_the_first_counts() -> None:
    text = "n/1 a|1\n# a remark\nbroken\nn/1 b|1\n"
    assert parse_map(text) == (None, {"n/1": "a|1"})


@given(st.lists(st.tuples(_KEYS, _VALUES)), st.integers(10, 60))
def test_payloads_hold_all_entries_in_order_within_the_limit(
    entries: list[tuple[str, str]], limit: int
) -> None:
    payloads = split_payload(entries, limit)
    assert "".join(payloads) == "".join(f"{key} {value}\n" for key, value in entries)
    assert all(len(payload) <= limit or payload.count("\n") == 1 for payload in payloads)
