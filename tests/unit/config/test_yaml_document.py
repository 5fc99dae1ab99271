from __future__ import annotations

import pytest

from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.errors import ConfigInvalid, ConfigUnreadable


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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", "f:2 is not YAML"),
        ("a: b: c", "f:1 is not YAML"),
        ("\x00", "f:1 is not YAML"),
        ("a: 1\nb: \x01\n", "f:2 is not YAML"),
        ("a: 1\n\tb: 2\n", "f:2 is not YAML"),
        ("a: 1\n---\nb: 2\n", "f:2 is not YAML"),
        ("a: *nobody\n", "f:1 is not YAML"),
        ("a: 'x\n", "f:2 is not YAML"),
        ("a: 1\nb: [\nc: }\n", "f:3 is not YAML"),
        ("[" * 200 + "]" * 200, "f:1 is nested deeper than 100 levels"),
    ],
)
def test_what_is_not_yaml_is_unreadable_at_its_line(text: str, reason: str) -> None:
    with pytest.raises(ConfigUnreadable, match=f"^{reason}"):
        parse_yaml(text, "f")
