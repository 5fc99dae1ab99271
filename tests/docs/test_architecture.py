"""ARCHITECTURE.md shows the two ways through the code with functions that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

_STATION = re.compile(r"`([a-z_/]+):([A-Za-z_.]+)`")
_MOST = {"`instance add` goes:": 12, "a request of an unknown address goes:": 8}


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


def test_no_method_only_calls_one_of_the_same_name_in_another_class_of_ours() -> None:
    """Such a class is a relay: its caller may as well be given what it calls. One that closes what it owns is none."""
    relays = []
    for path in sorted((REPOSITORY / "src/imdsproxy").glob("a*/*.py")):
        for owner in ast.walk(ast.parse(path.read_text())):
            if isinstance(owner, ast.ClassDef):
                relays += [f"{path.name} {owner.name}.{one}" for one in _relays(owner)]
    assert relays == []


def _relays(owner: ast.ClassDef) -> list[str]:
    found = []
    for method in owner.body:
        if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = [one for one in method.body if not _is_text(one)]
        value = getattr(body[0], "value", None) if len(body) == 1 else None
        call = value.value if isinstance(value, ast.Await) else value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            receiver = call.func.value
            of_a_part = isinstance(receiver, ast.Attribute) and isinstance(receiver.value, ast.Name)
            public = not method.name.startswith("_") and method.name != "close"
            if call.func.attr == method.name and of_a_part and public:
                found.append(method.name)
    return found


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
