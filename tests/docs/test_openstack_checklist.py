"""The checklist of docs/openstack.md: complete, honest, and each test that it names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY
from support.document_blocks import section

_PAGE: Final = REPOSITORY / "docs/openstack.md"
_ROW: Final = re.compile(r"^\| ([0-9]+) \| (.+?) \| (.+) \|$")
_NAME: Final = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
_LAST: Final = 50
_MUST: Final = frozenset({*range(1, 33), 36, 37, 45, 46, 47})
_SHORTEST_REASON: Final = 20


def rows() -> Iterator[tuple[int, str, str]]:
    _, lines = section(_PAGE, "## The checklist")
    for line in lines:
        if found := _ROW.match(line):
            yield int(found[1]), found[2], found[3]


@cache
def names_in(file: Path) -> frozenset[str]:
    return frozenset(
        node.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def test_every_row_is_there_once_and_in_order() -> None:
    assert [number for number, _, _ in rows()] == list(range(1, _LAST + 1))


def test_every_test_that_is_named_exists_in_the_one_file_of_that_name() -> None:
    named = [found for _, _, reached in rows() for found in _NAME.findall(reached)]
    files = {name: sorted((REPOSITORY / "tests").rglob(name)) for name, _ in named}
    assert {name: found for name, found in files.items() if len(found) != 1} == {}
    assert [f"{name}::{test}" for name, test in named if test not in names_in(files[name][0])] == []


def test_what_must_be_reached_has_a_test_and_what_is_not_has_a_reason() -> None:
    reached = {number for number, _, cell in rows() if _NAME.search(cell)}
    assert reached >= _MUST
    without = {number: cell for number, _, cell in rows() if number not in reached}
    assert all(cell.startswith("not reached: ") for cell in without.values())
    assert all(len(cell) > _SHORTEST_REASON for cell in without.values())
    assert not [number for number, _, cell in rows() if number in reached and "not reached" in cell]


def test_the_rows_after_the_checklists_last_are_spoken_of() -> None:
    _, lines = section(_PAGE, "## The checklist")
    text = " ".join(line for line in lines if not line.startswith("|"))
    told: set[int] = set()
    for begin, end in re.findall(r"\b([5-7][0-9])(?:\N{EN DASH}([5-7][0-9]))?\b", text):
        told |= set(range(int(begin), int(end or begin) + 1))
    assert told == set(range(_LAST + 1, 76))
