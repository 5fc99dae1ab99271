"""The whole of script/bench can be measured in one go, in any order; how good its figures are, is not looked at."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import ROWS, WITH_PEER

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

_REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_whole_run_gives_each_row_its_figure_in_a_random_order(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    seed = str(random.randrange(1_000_000))  # noqa: S311 - shown when the test fails
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "bench", "--smallest", "--shuffle", seed, "--json", str(file)],
        env={**os.environ, "PYTHONPATH": f"{_REPOSITORY}:{_REPOSITORY / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"--shuffle {seed}\n{ran.stdout}{ran.stderr}"
    found = {row["key"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(found) == set(ROWS) - set(WITH_PEER)
    for row in found.values():
        assert math.isfinite(row["value"]), row
        assert row["figure"], row
