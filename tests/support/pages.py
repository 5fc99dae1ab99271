"""The pages of the documents, for tests that look at each."""

from typing import Final

import pytest

from support.demonstration import REPOSITORY

PAGES: Final = (
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
)
each_page: Final = pytest.mark.parametrize(
    "page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES]
)
"""Runs a test for each of them, as `page`."""
