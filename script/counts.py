"""Print the size of the source: lines of code by package, modules, lines of templates and of tests.

A line of code holds something other than a comment or a docstring.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_TEXTS = (".cfg", ".css", ".html", ".js", ".toml", ".txt")
_SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_lines(tree: ast.Module) -> Iterator[int]:
    """Yield the numbers of lines that bare strings at module, class or function level take."""
    for scope in ast.walk(tree):
        for node in scope.body if isinstance(scope, _SCOPES) else ():
            value = node.value if isinstance(node, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def code_lines(text: str) -> int:
    """Count a module's lines of code."""
    ignored = set(docstring_lines(ast.parse(text)))
    numbered = enumerate((line.strip() for line in text.splitlines()), 1)
    return sum(bool(line) and line[0] != "#" and number not in ignored for number, line in numbered)


def rows(text: str) -> int:
    """Count the lines of a template or table that are not comments."""
    return sum(bool(line.strip()) and line.lstrip()[0] != "#" for line in text.splitlines())


def main(repository: Path) -> None:
    """Print the counts of one checkout."""
    source = repository / "src" / "imdsproxy"
    packages: Counter[str] = Counter()
    modules = sorted(source.rglob("*.py"))
    for module in modules:
        package, _, rest = str(module.relative_to(source)).partition("/")
        packages[package if rest else "(top)"] += code_lines(module.read_text())
    tests = [path.read_text() for path in (repository / "tests").rglob("*.py")]
    found = sum(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        for text in tests
        for node in ast.walk(ast.parse(text))
    )
    texts = [
        path.read_text()
        for path in source.rglob("*.*")
        if path.suffix in _TEXTS and "vendor" not in path.parts
    ]
    by_package = ", ".join(f"{name} {lines:,}" for name, lines in packages.most_common())
    sys.stdout.write(
        f"source: {packages.total():,} lines of code in {len(modules)} modules ({by_package})\n"
        f"templates and tables of texts: {sum(map(rows, texts)):,} lines\n"
        f"tests: {sum(map(code_lines, tests)):,} lines of code, {found:,} test functions\n"
    )


main(Path(__file__).parent.parent)
