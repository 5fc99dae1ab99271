"""Verdicts on the lines of a demonstration's table."""

from dataclasses import replace

import pytest
from rich.console import Console

from demo.lines import Line, holds, render_table

_RIGHT = Line("web", "a", "reads a secret", "refused: Code: 403", "refused: Code: 403")
_COUNT = Line("web", "a → b", "logs in", "12 logins, 0 lost", r"[1-9]\d* logins, 0 lost")


def _shown(*lines: Line) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render_table(lines))
    return capture.get()


def test_a_table_whose_lines_are_all_right_holds() -> None:
    assert holds([_RIGHT, _COUNT])
    assert "WRONG" not in _shown(_RIGHT, _COUNT)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(_RIGHT, answer="bank-s3cret"),
        replace(_RIGHT, answer="refused: Code: 403 and more"),
        replace(_RIGHT, answer=""),
        replace(_COUNT, answer="12 logins, 1 lost"),
        replace(_COUNT, answer="0 logins, 0 lost"),
    ],
    ids=lambda line: line.answer,
)
def test_one_wrong_answer_fails_the_whole_and_is_named(wrong: Line) -> None:
    assert not holds([_RIGHT, wrong, _COUNT])
    assert _shown(_RIGHT, wrong, _COUNT).count("WRONG") == 1


def test_no_line_at_all_proves_nothing() -> None:
    assert not holds([])


def test_a_name_stands_once_above_its_lines_whatever_their_order() -> None:
    other = replace(_RIGHT, who="db")
    assert _shown(_RIGHT, other, _COUNT).count("web") == 1


def test_an_answer_with_brackets_is_shown_as_it_came() -> None:
    assert "[red]" in _shown(replace(_RIGHT, answer="[red]"))
