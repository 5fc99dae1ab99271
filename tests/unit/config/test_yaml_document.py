from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.errors import ConfigInvalid, ConfigUnreadable

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(JSON)
def test_json_is_yaml_too(value: object) -> None:
    assert parse_yaml(json.dumps(value, ensure_ascii=False), "f").value == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("52:54:00:12:34:56", "52:54:00:12:34:56"),
        ("2024-01-01", "2024-01-01"),
        ("0660", "0660"),
        ("0x10", 16),
        ("'0660'", "0660"),
        ("true", True),
        ("null", None),
        ("", None),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("-7", -7),
        (".inf", float("inf")),
        ("!!binary aGk=", b"hi"),
    ],
)
def test_a_word_means_what_it_looks_like(text: str, value: object) -> None:
    document = parse_yaml(f"key: {text}", "f")

    assert document.value == {"key": value}


def test_every_key_that_stands_twice_is_told_with_its_line() -> None:
    text = "a: 1\nb:\n  c: 1\n  c: 2\nlist:\n  - d: 1\n    d: 2\na: 3\n"

    with pytest.raises(ConfigInvalid) as caught:
        parse_yaml(text, "/etc/x.yaml")

    assert [(one.field, one.file, one.line) for one in caught.value.problems] == [
        ("b.c", "/etc/x.yaml", 4),
        ("list[0].d", "/etc/x.yaml", 7),
        ("a", "/etc/x.yaml", 8),
    ]
    assert "line 1" in caught.value.problems[2].hint


def test_lines_are_known_by_path() -> None:
    document = parse_yaml("a:\n  b: 1\nlist:\n  - 1\n  - c: 2\n", "f")

    paths = [("a",), ("a", "b"), ("list",), ("list", 0), ("list", 1), ("list", 1, "c")]
    assert [document.line_of(path) for path in paths] == [1, 2, 3, 4, 5, 5]


def test_a_merge_key_takes_what_is_not_there() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: *a, y: 3}\nd: {<<: [*a, *b]}\n'<<': q\n"
    data = parse_yaml(text, "f").value
    assert isinstance(data, dict)
    assert data["c"] == {"x": 1, "y": 3}
    assert data["d"] == {"x": 1, "y": 1, "z": 2}
    assert data["<<"] == "q"


@pytest.mark.parametrize(
    ("text", "field"),
    [("? [a]\n: 1\n", "configuration"), ("a: !!x 1", "a"), ("a: {<<: 1}", 'a["<<"]')],
)
def test_what_has_no_plain_value_is_invalid_with_its_place(text: str, field: str) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        parse_yaml(text, "f")
    assert [(one.field, one.line) for one in refused.value.problems] == [(field, 1)]


def test_aliases_of_aliases_are_refused_before_they_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ConfigUnreadable, match="aliases"):
        parse_yaml("\n".join(lines), "f")


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\x00", "a\n  b: 1"])
def test_what_is_not_yaml_is_unreadable(text: str) -> None:
    with pytest.raises(ConfigUnreadable, match="is not YAML"):
        parse_yaml(text, "f")


def test_the_line_of_a_syntax_error_is_told() -> None:
    with pytest.raises(ConfigUnreadable, match=r"f:3 is not YAML"):
        parse_yaml("a: 1\nb: [\nc: }\n", "f")


def test_text_nested_beyond_reason_is_unreadable() -> None:
    with pytest.raises(ConfigUnreadable):
        parse_yaml("[" * 5000 + "]" * 5000, "f")
