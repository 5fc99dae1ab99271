"""What SECURITY.md says is tested is tested, and the units are as closed as it says."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY
from support.document_blocks import section

_PAGE: Final = REPOSITORY / "SECURITY.md"
_NAME: Final = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
_EXPOSURE: Final = re.compile(r"^\| `(\S+\.service)` \| ([0-9.]+) \|", re.MULTILINE)
_SHORTEST_REASON: Final = 20


def _rows() -> Iterator[tuple[str, str]]:
    _, lines = section(_PAGE, "## Tests by threat")
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[1] != "test":
            yield cells[0], cells[1]


def _names_in(file: Path) -> set[str]:
    tree = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    named = [found for _, cell in _rows() for found in _NAME.findall(cell)]
    assert len(named) > len(list(_rows())) - 5
    files = {name: sorted((REPOSITORY / "tests").rglob(name)) for name, _ in named}
    assert {name: found for name, found in files.items() if len(found) != 1} == {}
    missing = [f"{name}::{test}" for name, test in named if test not in _names_in(files[name][0])]
    assert missing == []


def test_every_threat_has_a_test_or_a_reason() -> None:
    rest = {threat: cell for threat, cell in _rows() if not _NAME.search(cell)}
    assert all(cell.startswith("none: ") for cell in rest.values())
    assert all(len(cell) > _SHORTEST_REASON for cell in rest.values())


def test_no_unit_is_more_open_than_it_is_said_to_be() -> None:
    units = sorted((REPOSITORY / "packaging/systemd").glob("*.service"))
    said = {name: float(figure) for name, figure in _EXPOSURE.findall(_PAGE.read_text())}
    assert set(said) == {unit.name for unit in units}
    told = subprocess.run(
        ("/usr/bin/systemd-analyze", "security", "--offline=true", "--no-pager", *units),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    ).stdout
    found = re.findall(r"exposure level for (\S+): ([0-9.]+)", told)
    assert len(found) == len(units)
    assert {name: figure for name, figure in found if float(figure) > said[name]} == {}
