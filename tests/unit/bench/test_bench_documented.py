from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import ROWS

_PAGE = Path(__file__).resolve().parents[3] / "docs" / "performance.md"


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_told_in_the_page_of_figures(row: str) -> None:
    assert f"| `{row}` |" in _PAGE.read_text()
