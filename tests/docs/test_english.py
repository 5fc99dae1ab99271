"""The measure of plain English finds the habits, and no text that only looks like one."""

from pathlib import Path

import pytest

from script.english import find_habits, is_fragment, main, read_docstrings, read_page


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("Keep what is placed on the host.", ["what is"]),
        ("The socket is to be removed, as far as it can be had.", ["is to be", "be had"]),
        ("Not the one of before, nor any more of it.", ["of it", "the one", "any more"]),
        ("The hub sends a host the records placed on this host.", []),
        ("HAProxy refuses a request if another instance owns the address.", []),
    ],
)
def test_habits_are_found(text: str, phrases: list[str]) -> None:
    assert find_habits(text) == phrases


@pytest.mark.parametrize(
    ("docstring", "is_one"),
    [
        ("What a host gets.", True),
        ("Of asyncio.", True),
        ("Have HAProxy know a rule.", True),
        ("Return the records of a host.", False),
        ("Offset of the header.", False),
        ("All records in force.", False),
    ],
)
def test_a_docstring_begins_with_a_noun_or_a_verb(docstring: str, is_one: bool) -> None:  # noqa: FBT001 - a parameter
    assert is_fragment(docstring) is is_one


def test_code_of_a_page_is_not_read(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n    what is indented\n```\nwhat is fenced\n```\nmore\n")
    assert [text.text for text in read_page(page)] == ["text", "", "```", "more"]


def test_each_kind_of_docstring_is_read(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""First."""\nclass A:\n    """Second."""\n    def f(self):\n        """Third."""\n'
    )
    assert [text.text for text in read_docstrings(module)] == ["First.", "Second.", "Third."]


def test_a_ceiling_that_is_exceeded_lists_the_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "a.py").write_text('"""What is here."""\n')
    assert main(tmp_path, is_listing=False) == 1
    assert "src/a.py:1: What is\n" in capsys.readouterr().out
    (source / "a.py").write_text('"""Records in force."""\n')
    assert main(tmp_path, is_listing=False) == 0
    assert "src/a.py" not in capsys.readouterr().out
