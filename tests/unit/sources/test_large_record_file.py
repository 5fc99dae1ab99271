"""Files that are read by a process of their own."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from imdsproxy.sources import file_contents
from imdsproxy.sources.file_contents import read_contents

if TYPE_CHECKING:
    from pathlib import Path

_COUNT = 3_000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    instances: list[dict[str, object]] = [
        {"id": f"vm{number}", "name": "vm", "user_data": "x" * 400} for number in range(_COUNT)
    ]
    instances += [{"id": "bad", "name": ""}, {"name": "nameless"}]
    path = tmp_path / "large.json"
    path.write_text(json.dumps({"instances": instances}, indent=1))
    assert path.stat().st_size > 1024 * 1024
    return path


def test_a_large_file_is_read_by_another_process_and_just_the_same(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(file_contents, "_APART", sys.maxsize)
        here = read_contents(large)
    assert len(here.instances) == _COUNT + 1
    assert here.nameless_instances
    monkeypatch.delattr(file_contents, "decode_records")
    assert read_contents(large) == here


def test_a_reader_that_dies_is_a_problem_of_the_file(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (problem,) = read_contents(large).problems
    assert problem.reason == "the process that read it ended with status 1"
    assert problem.file == str(large)
