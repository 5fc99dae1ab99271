from __future__ import annotations

from pathlib import Path

import pytest

from imdsproxy.cli.docgen import PAGES

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.parametrize("name", PAGES)
def test_a_reference_page_says_what_the_code_says(name: str) -> None:
    written = (REFERENCE / name).read_text(encoding="utf-8")

    assert written == PAGES[name](), "run `python -m imdsproxy.cli.docgen`"


def test_there_are_no_other_pages() -> None:
    assert {path.name for path in REFERENCE.iterdir()} == set(PAGES)
