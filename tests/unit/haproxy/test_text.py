from __future__ import annotations

import ast
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core import haproxy
from imdsproxy.core.haproxy.text import (
    Text,
    UnquotableWord,
    Value,
    blocks_of,
    fill,
    fill_sections,
    option,
    quote,
)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *((word, word) for word in ("127.0.0.1:80", "%[so_name]", "unix@/run/x.sock", "a|b")),
        *((word, f"'{word}'") for word in ("", "a b", "a#b", '"', "$HOME", "a\\b")),
        ("it's", "'it'\\''s'"),
    ],
)
def test_a_word_is_quoted_where_haproxy_would_read_it_otherwise(word: str, expected: str) -> None:
    assert quote(word) == expected


@pytest.mark.parametrize("word", ["a\nb", "\0", "a\rb", "\x1b[0m"])
def test_control_characters_are_refused(word: str) -> None:
    with pytest.raises(UnquotableWord):
        quote(word)


@given(st.text(st.characters(exclude_categories=("Cc", "Cs"))))
def test_what_is_written_is_read_as_the_same_word(word: str) -> None:
    # What `quote` writes a shell reads as HAProxy does (manual, section 2.2).
    assert shlex.split(quote(word)) == [word]


def test_a_value_quotes_itself_inside_a_word_and_alone() -> None:
    values: dict[str, Value] = {
        "map": "/a b.map",
        "user": option("user", "it's"),
        "most": 7,
        "raw": Text("a b"),
    }
    lines = fill("set-var(x) map_str(<map>) <user> <raw> if { x gt <most> }", values)
    assert lines == ["set-var(x) map_str('/a b.map') user 'it'\\''s' a b if { x gt 7 }"]


@pytest.mark.parametrize("value", [True, 1.5, b"x"])
def test_what_is_no_text_is_refused(value: Any) -> None:  # noqa: ANN401 - anything
    with pytest.raises(TypeError, match=r"<map> is .*, which can't be written"):
        fill("map_str(<map>)", {"map": value})


def test_a_name_without_a_value_is_refused() -> None:
    with pytest.raises(KeyError, match="map"):
        fill("map_str(<map>)", {})


def test_a_line_is_there_only_under_its_flags_and_with_its_values() -> None:
    template = """
        # A comment.
        [nova] one
        [!nova] [fair] two <user>
        three <none>
    """
    user = option("user", None)
    assert fill(template, {"nova": True, "fair": False, "user": user, "none": None}) == ["one"]
    lines = fill(template, {"nova": False, "fair": True, "user": user, "none": "x"})
    assert lines == ["two", "three x"]


def test_a_line_that_is_indented_further_continues_the_one_before() -> None:
    template = """
        return status 403
            if { a }
            { b }
        next
    """
    assert fill(template, {}) == ["return status 403 if { a } { b }", "next"]


def test_an_empty_condition_takes_its_if_with_it() -> None:
    assert fill("rule if <when>", {"when": Text()}) == ["rule"]
    assert fill("rule if <when> { b }", {"when": Text()}) == ["rule if { b }"]
    assert fill("rule if <when>", {"when": Text("!{ a }")}) == ["rule if !{ a }"]


def test_lines_that_are_finished_are_not_filled_again() -> None:
    inner = Text("bind name <user>")
    (section,) = fill_sections("frontend x\n    <inner>\n", {"inner": inner, "user": "root"})
    assert section == "frontend x\n  bind name <user>"


def test_a_block_is_written_where_it_is_named_with_its_argument_and_its_flags() -> None:
    text = """
check:
    [nova] deny if <argument>
    <last>
last:
    allow
[nova] frontend a
    <check(guest)>
frontend b
    <check(guest)>
"""
    values: dict[str, Value] = {**blocks_of(text), "guest": Text("{ src }")}
    (section,) = fill_sections(text, {**values, "nova": False})
    assert section == "frontend b\n  allow"
    section, _ = fill_sections(text, {**values, "nova": True})
    assert section == "frontend a\n  deny if { src }\n  allow"


def test_no_template_of_a_rule_is_an_f_string() -> None:
    """What is put in by an f-string is not quoted."""
    for path in Path(haproxy.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                text = [one for one in node.args if isinstance(one, ast.JoinedStr)]
                assert not text or name not in {"fill", "fill_sections", "Block"}, path
