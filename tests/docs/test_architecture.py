"""ARCHITECTURE.md names functions and files that exist, in lines that fit beside the code."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

_STATION = re.compile(r"`([a-z_/]+):([A-Za-z_.]+)`")
_PATH = re.compile(r"`([a-z_]+(?:/[\w.-]+)+)`")
_MOST = {
    "`instance add` goes:": 12,
    "a request of an unknown address goes:": 8,
    "the first port of an OVN network goes:": 17,
}


def _functions(path: str) -> set[str]:
    found = set()
    for node in ast.parse((REPOSITORY / f"src/imdsproxy/{path}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, functions)}
    return found


@pytest.mark.parametrize("way", _MOST)
def test_a_way_through_the_code_names_functions_that_exist_in_few_modules(way: str) -> None:
    text = (REPOSITORY / "ARCHITECTURE.md").read_text()
    stations = _STATION.findall(text.partition(way)[2].partition("\n\n")[0])
    assert 5 <= len({module for module, _ in stations}) <= _MOST[way]
    for module, name in stations:
        assert name in _functions(module), module


def test_each_file_to_begin_in_exists() -> None:
    part = (REPOSITORY / "ARCHITECTURE.md").read_text().partition("## Where do I change")[2]
    named = _PATH.findall(part)
    assert len(named) > 40
    places = (REPOSITORY, REPOSITORY / "src/imdsproxy")
    assert [path for path in named if not any((place / path).exists() for place in places)] == []


def test_no_line_is_longer_than_a_hundred_characters() -> None:
    lines = (REPOSITORY / "ARCHITECTURE.md").read_text().splitlines()
    assert [line for line in lines if len(line) > 100] == []
