"""Whatever comes from a hub, or is on a host's disk: it is taken or refused, and never an end of the source."""

import contextlib
import json

from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.fleet.stream import Batch, Broken, parse_from_hub
from imdsproxy.sources.fleet.known import FleetKnown, Position

_NUMBERS = st.integers(-1, 9) | st.just(2.5)
_WORDS = st.sampled_from(
    ["", "a", "instance/a", "network/n", "override/a", "keys/a", "password/a", "policy/fleet"]
)
_KNOWN_KEYS = st.sampled_from(
    [
        "record",
        "user_data",
        "sha256",
        "size",
        "epoch",
        "reopened_at",
        "current",
        "keys",
        "password",
        "tokens",
    ]
)
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(_KNOWN_KEYS | _WORDS, inner, max_size=3)
    ),
    max_leaves=8,
)
_FIELDS = st.sampled_from(
    ["put", "remove", "held", "revision", "more", "fleet", "incarnation", "time", "age_s", "path"]
)
_LINES = st.dictionaries(
    st.sampled_from(["batch", "ping", "ask", "bye", "status", "revision"]),
    st.dictionaries(_FIELDS, _JSON) | _JSON,
    max_size=3,
)
_ITEMS = st.dictionaries(
    _WORDS, st.tuples(st.integers(0, 9), st.dictionaries(_KNOWN_KEYS, _JSON, max_size=3))
)


@given(_LINES)
def test_a_line_is_one_of_a_hub_or_broken(line: dict[str, object]) -> None:
    with contextlib.suppress(Broken):
        parse_from_hub(json.dumps(line).encode())


@given(_ITEMS, _ITEMS, st.lists(_WORDS), st.dictionaries(_WORDS, st.just("why")))
def test_an_item_is_in_force_or_refused_and_never_of_an_older_revision(
    kept: dict[str, tuple[int, dict[str, object]]],
    put: dict[str, tuple[int, dict[str, object]]],
    remove: list[str],
    held: dict[str, str],
) -> None:
    known = FleetKnown(lambda _instance, _sha256: None)
    known.load(Position("fleet", 1, 9), kept)
    before = dict(known.items)
    batch = Batch(9, "fleet", 1, put, tuple(remove), held)
    known.missing_user_data(batch)
    applied = known.apply(batch, whole=True)
    for key, revision in known.items.items():
        assert revision >= before.get(key, 0) or key in remove
    refused = known.failed()
    for key, (revision, _) in put.items():
        assert known.items.get(key, -1) >= revision or key in refused
    assert {key for key, item in applied.stored.items() if item is not None} <= known.items.keys()
    known.policies()
    assert all(one is None or isinstance(one, bytes) for one in known.passwords().values())
    known.problems()
