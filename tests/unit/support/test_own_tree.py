"""What is tested is this clone's package, also where tests start programs."""

import shutil
import subprocess
import sys
from pathlib import Path

import imdsproxy
from support.own_tree import foreign_programs

_REPOSITORY = Path(__file__).resolve().parents[3]


def test_this_process_and_the_programs_that_it_starts_have_this_clones_package() -> None:
    assert list(imdsproxy.__path__) == [str(_REPOSITORY / "src/imdsproxy")]
    assert foreign_programs(_REPOSITORY) is None


def test_another_clones_tests_are_refused_where_this_clones_environment_runs_them(
    tmp_path: Path,
) -> None:
    shutil.copy(_REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(_REPOSITORY / "src", tmp_path / "src")
    shutil.copytree(_REPOSITORY / "tests/support", tmp_path / "tests/support")
    shutil.copy(_REPOSITORY / "tests/conftest.py", tmp_path / "tests")
    (tmp_path / "tests/test_nothing.py").write_text("def test_nothing() -> None: ...\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_nothing.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 4
    assert f"imports imdsproxy from {_REPOSITORY}/src/imdsproxy" in ran.stderr
    assert "passed" not in ran.stdout
