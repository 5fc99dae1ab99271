"""Each row of script/bench can be measured; how good its figure is, is not looked at."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import GROUPS

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

_REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rows", GROUPS, ids=lambda rows: rows[0])
def test_each_row_gives_its_figure(rows: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    only = ("--only", ",".join(rows))
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "bench", "--smallest", *only, "--json", str(file)],
        env={**os.environ, "PYTHONPATH": f"{_REPOSITORY}:{_REPOSITORY / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = {row["key"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(found) == set(rows)
    for row in found.values():
        assert row["verdict"] != "not measured", row
        assert math.isfinite(row["value"]), row
        assert row["figure"], row
