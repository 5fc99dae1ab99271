from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from typing import Final, TypeAlias

import pytest

from imdsproxy.config.strict_yaml import Decoded, Undecodable, decode_yaml
from imdsproxy.core.records.schema import render_path
from imdsproxy.sources.file.record_file import decode_json

Decode: TypeAlias = Callable[[str], Decoded | Undecodable]
BOTH: Final[tuple[Decode, ...]] = (decode_yaml, decode_json)


def decoded(text: str) -> Decoded:
    found = decode_yaml(text)
    assert isinstance(found, Decoded), found
    return found


def refused(text: str) -> Undecodable:
    found = decode_yaml(text)
    assert isinstance(found, Undecodable), found
    return found


_TEXTS = "52:54:00:12:34:56 10:20:30:40:50:51 no on Yes 0123 1_000 2024-01-01 = " + "9" * 400
_NUMBERS = {"0": 0, "-7": -7, "0x10": 16, "0o17": 15, "1.10": 1.1, "1e3": 1000.0, "1.": 1.0}
_OTHERS = {"true": True, "False": False, "~": None, "null": None, "": None}


@pytest.mark.parametrize(
    ("plain", "value"),
    [
        *((text, text) for text in _TEXTS.split()),
        *_NUMBERS.items(),
        *_OTHERS.items(),
        (".5", 0.5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        (".nan", math.nan),
        ("'7'", "7"),
        ("!!str 7", "7"),
        ("!!binary H4sA/w==", b"\x1f\x8b\x00\xff"),
    ],
)
def test_a_plain_word_is_what_it_looks_like(plain: str, value: object) -> None:
    found = decoded(f"a: {plain}")
    # As text: 1 equals true and 1.0, and NaN not even itself.
    assert repr(found.value) == repr({"a": value})
    assert not found.faults


@pytest.mark.parametrize("decode", BOTH)
def test_a_duplicate_key_is_reported_with_its_path_and_line(decode: Decode) -> None:
    text = '{"a": 1,\n "b": [0, {"c": 1,\n"c": 2}]}'
    found = decode(text)
    assert isinstance(found, Decoded)
    assert found.value == {"a": 1, "b": [0, {"c": 1}]}
    assert [(render_path(fault.path), fault.line) for fault in found.faults] == [("b[1].c", 3)]


@pytest.mark.parametrize("decode", BOTH)
def test_every_part_knows_its_line(decode: Decode) -> None:
    found = decode('{"a":\n {"b": [1,\n2]},\n\n"c": 3}')
    assert isinstance(found, Decoded)
    lines = {
        path: found.line_of(path)
        for path in [(), ("a",), ("a", "b"), ("a", "b", 0), ("a", "b", 1), ("c",)]
    }
    assert lines == {(): 1, ("a",): 1, ("a", "b"): 2, ("a", "b", 0): 2, ("a", "b", 1): 3, ("c",): 5}
    assert found.line_of(("a", "b", 7)) == 2
    assert found.line_of(("a", "missing", "x")) == 1
    assert found.line_of(("c", "x", 0)) == 5


def test_a_merge_key_takes_what_is_not_there_and_an_alias_is_what_it_stands_for() -> None:
    found = decoded(
        "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: *a, y: 3}\nd: {<<: [*a, *b]}\n'<<': *b\n"
    )
    assert not found.faults
    a, b = {"x": 1, "y": 1}, {"y": 2, "z": 2}
    assert found.value == {"a": a, "b": b, "c": {"x": 1, "y": 3}, "d": {**b, **a}, "<<": b}


@pytest.mark.parametrize(
    "value",
    [
        *("!!python/object:os.system {}", "!!set {}", "!mine {}", "!!timestamp x"),
        *("!!int x", "!!bool no", "!!float x", "!!binary H4s"),
    ],
)
def test_a_tag_that_is_unknown_or_does_not_fit_is_reported(value: str) -> None:
    assert decoded(f"a: {value}").faults


def test_aliases_of_themselves_or_of_aliases_are_refused_before_they_fill_the_memory() -> None:
    refused("a: &a [*a]\n")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "aliases" in refused("\n".join(lines)).reason


def test_nesting_without_end_is_refused() -> None:
    depth = 5000
    refused("[" * depth + "]" * depth)
    refused("- " * depth + "x")
    assert isinstance(decode_json('{"a":' * depth + "1" + "}" * depth), Undecodable)


def test_json_may_be_nested_a_hundred_levels_deep() -> None:
    value: object = 1
    for _ in range(101):
        value = [value]
    found = decode_json(json.dumps(value))
    assert isinstance(found, Decoded)
    assert found.value == value
    assert isinstance(decode_json(json.dumps([value])), Undecodable)


def test_a_long_text_in_json_takes_little_more_memory_than_its_own() -> None:
    text = json.dumps({"user_data": '#cloud-config\n"' * 100_000})
    tracemalloc.start()
    try:
        assert isinstance(decode_json(text), Decoded)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        *((text, 1) for text in ('{"a" 1}', "{a: 1}", "[1 2]", '["\n"]', '["\\ud8"]', '"a')),
        *((text, 1) for text in ("tru", "01", "{", "[")),
        *((text, 2) for text in ('{"a": 1\n,}', "[1,\n2", "1\n2", "[1,\nNaN]")),
        ("[1,\n" + "9" * 1001 + "]", 2),
        ("9" * 5000, None),
        ("[" * 200_000, None),
    ],
)
def test_what_is_no_json_is_reported_with_its_line(text: str, line: int | None) -> None:
    found = decode_json(text)
    assert isinstance(found, Undecodable)
    assert found.line == line
    assert "not JSON" in found.reason


@pytest.mark.parametrize("decode", BOTH)
def test_an_empty_text_is_nothing(decode: Decode) -> None:
    for text in ("", " \n\n"):
        found = decode(text)
        assert isinstance(found, Decoded)
        assert (found.value, found.line_of(("a",))) == (None, None)
