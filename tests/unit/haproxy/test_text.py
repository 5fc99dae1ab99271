from __future__ import annotations

import ast
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core import haproxy
from imdsproxy.core.haproxy.text import UnquotableWord, fill, quote


@pytest.mark.parametrize("word", ["a\nb", "\0", "a\rb", "\x1b[0m"])
def test_control_characters_are_refused(word: str) -> None:
    with pytest.raises(UnquotableWord):
        quote(word)


@given(st.text(st.characters(exclude_categories=("Cc", "Cs"))))
def test_what_is_written_is_read_as_the_same_word(word: str) -> None:
    # What `quote` writes a shell reads as HAProxy does (manual, section 2.2).
    assert shlex.split(quote(word)) == [word]


@pytest.mark.parametrize("value", [True, 1.5, b"x"])
def test_what_is_no_text_or_not_there_is_refused(value: Any) -> None:  # noqa: ANN401 - anything
    with pytest.raises(TypeError, match=r"<map> is .*, which can't be written"):
        fill("map_str(<map>)", {"map": value})
    with pytest.raises(KeyError, match="map"):
        fill("map_str(<map>)", {"other": value})


def test_no_template_of_a_rule_is_an_f_string() -> None:
    """What is put in by an f-string is not quoted."""
    for path in Path(haproxy.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                text = [one for one in node.args if isinstance(one, ast.JoinedStr)]
                assert not text or name not in {"fill", "fill_sections", "Block"}, path
