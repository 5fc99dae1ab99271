"""Check that docstrings and pages stay in plain English (CONTRIBUTING.md, "Plain English").

Usage: `.venv/bin/python script/english.py [--list]`. Exits with 1 if a ceiling is exceeded, and then lists each place.

Counted are habits that make a reader stop: a relative clause in the place of a noun, a pronoun whose noun stands
elsewhere, a passive with "is to be". A low figure does not prove good English.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOST_HABITS: Final = 2.0
"""Highest number of habits in 1,000 words."""

MOST_FRAGMENTS: Final = 0.5
"""Highest share of docstrings that begin with a fragment, in percent."""

_HABITS: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b(?:is|are|was|were) to (?:be|do|have)\b",
        r"\b(?:be|is|are) had\b",
        r"\bwhat (?:is|are|was|has|have|it|they|one|comes?|came|goes|went)\b",
        r"\bwho(?:se|ever)? (?:is|are|has|have|it|they|asks?)\b",
        r"\bwhere (?:it|they|that|there) (?:is|are|has|have)\b",
        r"\bof (?:it|them|that|those|these|what|whom)\b",
        r"\b(?:the|another|any|each|no) ones?\b",
        r"\b(?:any|no) more\b",
    )
)
_FRAGMENT: Final = re.compile(
    r"(?:All that|As|Be|By|For|From|Have|How|In|Its?|None|Nothing|Of|On|So|Take|That|Those|To"
    r"|What|Where|Which|Whose?|With)\b"
)
_DOCUMENTED: Final = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Text:
    """A docstring, or a line of a page.

    Attributes:
        line: Number of the line, or of the docstring's function or class.
    """

    path: Path
    line: int
    text: str

    @property
    def is_docstring(self) -> bool:
        """Return whether the text is a docstring."""
        return self.path.suffix == ".py"


def find_habits(text: str) -> list[str]:
    """Return the phrases of a text that are habits."""
    return [match[0] for habit in _HABITS for match in habit.finditer(text)]


def is_fragment(docstring: str) -> bool:
    """Return whether a docstring begins with neither a noun nor an imperative verb."""
    return _FRAGMENT.match(docstring) is not None


def read_docstrings(path: Path) -> Iterator[Text]:
    """Yield each docstring of a module, class or function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield Text(path, getattr(node, "lineno", 1), docstring)


def read_page(path: Path) -> Iterator[Text]:
    """Yield each line of a page that is not code."""
    is_code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        is_code ^= line.startswith("```")
        if not (is_code or line.startswith("    ")):
            yield Text(path, number, line)


def read_all(repository: Path) -> list[Text]:
    """Return the texts of a checkout, without decisions: those are a record of their time."""
    pages = [*repository.glob("*.md"), *(repository / "docs").rglob("*.md")]
    return [
        *(text for path in (repository / "src").rglob("*.py") for text in read_docstrings(path)),
        *(text for path in pages if "adr" not in path.parts for text in read_page(path)),
    ]


def main(repository: Path, *, is_listing: bool) -> int:
    """Print the two figures, and the places if a ceiling is exceeded; return the exit status."""
    texts = read_all(repository)
    words = sum(len(text.text.split()) for text in texts)
    docstrings = [text for text in texts if text.is_docstring]
    habits = [(text, phrase) for text in texts for phrase in find_habits(text.text)]
    fragments = [(text, text.text[:60]) for text in docstrings if is_fragment(text.text)]
    density, share = 1000 * len(habits) / words, 100 * len(fragments) / len(docstrings)
    is_exceeded = density > MOST_HABITS or share > MOST_FRAGMENTS
    if is_exceeded or is_listing:
        for text, phrase in (*habits, *fragments):
            place = f"{text.path.relative_to(repository)}:{text.line}"
            sys.stdout.write(f"{place}: {phrase.splitlines()[0]}\n")
    sys.stdout.write(
        f"english: {density:.1f} habits in 1,000 words (at most {MOST_HABITS}), "
        f"{share:.1f} % of docstrings begin with a fragment (at most {MOST_FRAGMENTS})\n"
    )
    return int(is_exceeded)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parents[1], is_listing="--list" in sys.argv[1:]))
