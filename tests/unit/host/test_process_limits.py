"""How many descriptors a process of ours may open."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

_PROGRAM: Final = """
import resource
from imdsproxy.host.process import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
raise_descriptor_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "then"),
    [
        pytest.param(256, 512, "512 512", id="no-further-than-the-hard-limit"),
        pytest.param(512, 512, "512 512", id="left-where-it-is-there"),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_it_may(soft: int, hard: int, then: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(soft=soft, hard=hard)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == then
