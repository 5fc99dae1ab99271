"""What continuous integration makes of tests that fail once, or twice."""

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
_SCRIPT = """#!/bin/sh
[ "$1" != --all ] || shift
script/check && exec {python} -m pytest -q -p support.flaky "$@"
"""


def _run(
    directory: Path, *, flaky: int, bad: bool = False, check: int = 0
) -> tuple[int, list[str]]:
    """`.ci/run` in a tree of so many flaky tests; its status, and what it printed."""
    for name, text in (
        (".ci/run", (_REPOSITORY / ".ci/run").read_text()),
        ("script/check", f"#!/bin/sh\nexit {check}\n"),
        ("script/test", _SCRIPT.format(python=sys.executable)),
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


@pytest.mark.parametrize(
    ("flaky", "bad", "status", "last"),
    [
        (0, False, 0, "2 passed"),
        (2, False, 0, "2 passed in "),
        # The third that is flaky fails the run, and so does what fails twice.
        (3, False, 1, "3 passed in "),
        (1, True, 1, "1 failed, 1 passed in "),
    ],
)
def test_what_fails_is_run_once_more_and_named_where_it_passes_then(
    tmp_path: Path, flaky: int, status: int, last: str, *, bad: bool
) -> None:
    ended, lines = _run(tmp_path, flaky=flaky, bad=bad)
    assert ended == status
    named = [line for line in lines if line.startswith("FLAKY ")]
    assert named == [f"FLAKY test_it.py::test_flaky[{number}]" for number in range(flaky)]
    assert lines[-1].startswith(last)


def test_a_check_that_finds_something_fails_the_run(tmp_path: Path) -> None:
    assert _run(tmp_path, flaky=0, check=1)[0] == 1
