import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from support.progress import over_budget, share

_TESTS: Final = """
def test_good(): ...

def test_bad():
    assert not "a reason"
"""


def test_a_file_over_its_budget_is_named() -> None:
    durations = {"tests/integration/test_a.py": 199.0, "tests/unit/test_b.py": 61.0}
    assert over_budget(durations) == ["over its budget: tests/unit/test_b.py: 61 s of 60 s"]


def test_a_test_with_genuine_programs_weighs_more() -> None:
    both = ["tests/e2e/test_a.py::test_a", *(f"tests/unit/test_b.py::test_{n}" for n in range(20))]
    assert share(both[:1], both) == 50
    assert share([], []) == 0


def test_a_failure_is_printed_at_once_and_durations_are_kept(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(_TESTS)
    (tmp_path / "pytest.ini").touch()
    words = [sys.executable, "-m", "pytest", "-p", "support.progress", "--progress", "all"]
    support = Path(__file__).parents[2]
    ran = subprocess.run(
        [*words, "-p", "no:randomly"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin", "PYTHONPATH": str(support)},
        capture_output=True,
        text=True,
        check=False,
    )
    before, _, _ = ran.stdout.partition("= FAILURES =")
    assert "FAILED test_it.py::test_bad (call, " in before
    assert "a reason" in before
    kept = tmp_path / ".pytest_cache/d/durations/all.json"
    assert list(json.loads(kept.read_text())) == ["test_it.py"]
