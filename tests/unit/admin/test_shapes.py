from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.admin.bodies import merge_patch
from imdsproxy.admin.shapes import to_json
from imdsproxy.core.model import BridgeListener, Dialect, Network, NetworkId


@dataclass(frozen=True)
class Inner:
    address: object
    items: tuple[object, ...] = ()


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (None, None),
        (True, True),
        (1.5, 1.5),
        (ip_address("fe80::1"), "fe80::1"),
        (Path("/x"), "/x"),
        (Dialect.EC2, "ec2"),
        (b"text", {"text": "text"}),
        (b"\xff", {"base64": "/w=="}),
        (frozenset({"b", "a"}), ["a", "b"]),
        ({"k": ip_address("10.0.0.1")}, {"k": "10.0.0.1"}),
        (
            Inner(ip_address("10.0.0.1"), (Inner(None),)),
            {"address": "10.0.0.1", "items": [{"address": None, "items": []}]},
        ),
        (
            Network(NetworkId("n"), BridgeListener("br0")),
            {"id": "n", "listener": {"bridge": "br0"}},
        ),
    ],
)
def test_a_value_has_one_shape(value: object, shape: object) -> None:
    assert to_json(value) == shape


# The examples of RFC 7396, appendix A.
@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_patch_merges_as_the_rfc_says(target: object, patch: object, result: object) -> None:
    assert merge_patch(target, patch) == result


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=5))
def test_a_patch_with_what_is_there_changes_nothing(value: dict[str, object]) -> None:
    assert merge_patch(value, value) == value
