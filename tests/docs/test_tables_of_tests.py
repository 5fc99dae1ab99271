"""Tests that documents name are there, and the tables of tests are complete and honest."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from support.demonstration import REPOSITORY
from support.document_blocks import section
from support.pages import each_page

_CHECKLIST: Final = (REPOSITORY / "docs/reference/neutron-features.md", "## The checklist")
_THREATS: Final = (REPOSITORY / "SECURITY.md", "## Tests by threat")
_NAME: Final = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
_REASON: Final = re.compile(r"(not reached|none): .{20,}")
_MUST: Final = frozenset({*range(1, 34), 36, 37, *range(45, 66), *range(67, 73), 74, 75})

tables = pytest.mark.parametrize("table", [_CHECKLIST, _THREATS], ids=lambda one: one[0].name)


def _rows(table: tuple[Path, str]) -> list[list[str]]:
    """The cells of each row, without the heads."""
    cells = [line.strip("| ").split(" | ") for line in section(*table)[1] if line.startswith("| ")]
    return [row for row in cells if row[-1] not in ("test", "reached by, or why not")]


@cache
def _names_in(file: Path) -> frozenset[str]:
    tree = ast.walk(ast.parse(file.read_text()))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in tree if isinstance(node, functions))


@each_page
def test_every_test_that_is_named_exists_in_the_one_file_of_that_name(page: Path) -> None:
    named = _NAME.findall(page.read_text())
    files = {name: sorted((REPOSITORY / "tests").rglob(name)) for name, _ in named}
    assert {name: found for name, found in files.items() if len(found) != 1} == {}
    missing = [f"{name}::{test}" for name, test in named if test not in _names_in(files[name][0])]
    assert missing == []


@tables
def test_every_row_has_either_a_test_or_a_reason(table: tuple[Path, str]) -> None:
    rows = {row[0]: row[-1] for row in _rows(table)}
    assert len(rows) > 40
    wrong = [
        row for row, cell in rows.items() if bool(_NAME.search(cell)) == bool(_REASON.match(cell))
    ]
    assert wrong == []


def test_the_checklist_is_whole_and_what_must_be_reached_has_a_test() -> None:
    rows = {int(row[0]): row[-1] for row in _rows(_CHECKLIST)}
    assert list(rows) == list(range(1, 76))
    assert {number for number, cell in rows.items() if _NAME.search(cell)} >= _MUST
