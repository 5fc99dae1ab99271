from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.haproxy.quoting import UnquotableWord, render_word


def _unquote(text: str) -> str:
    """HAProxy's own reading of one word, as far as `render_word` writes it (manual, section 2.2)."""
    out: list[str] = []
    quoted = False
    position = 0
    while position < len(text):
        character = text[position]
        if character == "'":
            quoted = not quoted
        elif character == "\\" and not quoted:
            position += 1
            out.append(text[position])
        else:
            out.append(character)
        position += 1
    assert not quoted
    return "".join(out)


@pytest.mark.parametrize("word", ["127.0.0.1:80", "%[so_name]", "unix@/run/x.sock", "a|b"])
def test_a_harmless_word_stays_bare(word: str) -> None:
    assert render_word(word) == word


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("", "''"),
        ("a b", "'a b'"),
        ("a#b", "'a#b'"),
        ("it's", "'it'\\''s'"),
        ('"', "'\"'"),
        ("$HOME", "'$HOME'"),
        ("a\\b", "'a\\b'"),
    ],
)
def test_a_word_that_haproxy_would_read_otherwise_is_quoted(word: str, expected: str) -> None:
    assert render_word(word) == expected


@pytest.mark.parametrize("word", ["a\nb", "\0", "a\rb", "\x1b[0m"])
def test_control_characters_are_refused(word: str) -> None:
    with pytest.raises(UnquotableWord):
        render_word(word)


@given(st.text(st.characters(exclude_categories=("Cc", "Cs"))))
def test_what_is_written_is_read_as_the_same_word(word: str) -> None:
    text = render_word(word)
    assert _unquote(text) == word
    assert text
