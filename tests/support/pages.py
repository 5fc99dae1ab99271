"""The pages of the documents, for tests that look at each: their blocks, and what stands as code in the text."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from support.demonstration import REPOSITORY

PAGES: Final = (
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
)
each_page: Final = pytest.mark.parametrize(
    "page", PAGES, ids=[str(page.relative_to(REPOSITORY)) for page in PAGES]
)
"""Runs a test for each of them, as `page`."""

_PRESENT = tuple(page for page in PAGES if page.name != "CHANGELOG.md")

each_page_of_now = pytest.mark.parametrize(
    "page", _PRESENT, ids=[str(page.relative_to(REPOSITORY)) for page in _PRESENT]
)
"""Each page that names only what exists: the changelog also has old names."""


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """A block of code, also one within a list.

    Attributes:
        line: Where it begins, from 1.
        language: Of its fence; of one that is indented, what it looks like: `sh`, `yaml` or `xml`.
    """

    line: int
    language: str
    text: str


@cache
def _tokens(page: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(page.read_text())


def code_blocks(page: Path) -> Iterator[CodeBlock]:
    """Every block of code of a page."""
    for token in _tokens(page):
        if token.type in ("fence", "code_block"):
            language = token.info.split(" ")[0] if token.type == "fence" else _guess(token.content)
            yield CodeBlock(token.map[0] + 1 if token.map else 0, language, token.content)


def _guess(text: str) -> str:
    first = next(line for line in text.splitlines() if not line.startswith("#")).strip()
    if first.startswith("<"):
        return "xml"
    name, colon, rest = first.removeprefix("- ").partition(":")
    is_key = bool(colon) and name.replace("_", "").replace("-", "").isalnum()
    return "yaml" if is_key and rest[:1] in ("", " ") else "sh"


def inline_code(page: Path) -> Iterator[str]:
    """Every piece of code in the text."""
    for token in _tokens(page):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def prose(page: Path) -> str:
    """Its text without any code."""
    children = (child for token in _tokens(page) for child in token.children or ())
    return " ".join(child.content for child in children if child.type == "text")
