"""What continuous integration makes of tests that fail once, or twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parents[3]
_TESTS = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range({flaky}))
def test_flaky(number):
    been_here = Path(f"been-here-{{number}}")
    assert been_here.exists() or been_here.touch()

def test_good(): ...

def test_bad():
    assert not {bad}
"""


def _run(
    directory: Path, *, flaky: int, bad: bool = False, check: int = 0
) -> tuple[int, list[str]]:
    """`.ci/run` in a tree of so many flaky tests; its status, and what it printed."""
    for name, text in (
        (".ci/run", (_REPOSITORY / ".ci/run").read_text()),
        ("script/check", f"#!/bin/sh\nexit {check}\n"),
        (
            "script/test",
            f'#!/bin/sh\nscript/check && exec {sys.executable} -m pytest -q -p support.flaky "$@"\n',
        ),
    ):
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (directory / "test_it.py").write_text(_TESTS.format(flaky=flaky, bad=bad))
    (directory / "pytest.ini").touch()
    ran = subprocess.run(
        [directory / ".ci/run"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{_REPOSITORY}/tests"},
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout.splitlines()


def test_what_passes_at_once_is_run_once(tmp_path: Path) -> None:
    status, lines = _run(tmp_path, flaky=0)
    assert status == 0
    assert lines[-1].startswith("2 passed")
    assert not any("FLAKY" in line or "once more" in line for line in lines)


@pytest.mark.parametrize(("flaky", "expected"), [(2, 0), (3, 1)])
def test_flaky_tests_are_named_and_the_third_fails_the_run(
    tmp_path: Path, flaky: int, expected: int
) -> None:
    status, lines = _run(tmp_path, flaky=flaky)
    assert status == expected
    named = [line for line in lines if line.startswith("FLAKY ")]
    assert named == [f"FLAKY test_it.py::test_flaky[{number}]" for number in range(flaky)]
    assert lines[-1].startswith(f"{flaky} passed in ")


def test_what_fails_twice_fails_the_run_and_is_not_flaky(tmp_path: Path) -> None:
    status, lines = _run(tmp_path, flaky=1, bad=True)
    assert status == 1
    assert [line for line in lines if line.startswith("FLAKY ")] == [
        "FLAKY test_it.py::test_flaky[0]"
    ]
    assert lines[-1].startswith("1 failed, 1 passed in ")


def test_a_check_that_finds_something_fails_the_run(tmp_path: Path) -> None:
    assert _run(tmp_path, flaky=0, check=1)[0] == 1
