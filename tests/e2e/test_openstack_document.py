"""The document for operators of OpenStack: what it has a newcomer do here is done, as it stands there."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.demonstration import REPOSITORY
from support.document_blocks import blocks_of, find_fault, script_of
from support.patience import patience
from support.reaper import processes_of, reap

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

_RUN_S: Final = 240
_NAMESPACES: Final = "imdst-try-"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where `mktemp` makes its directory; whatever a run has left that failed half-way goes with it."""
    # Short: sockets are in it.
    made = Path(tempfile.mkdtemp(prefix="imdst-"))
    made.chmod(0o755)
    assert not list(Path("/run/netns").glob(f"{_NAMESPACES}*")), "it is being tried on this host"
    yield made
    reap([made], (_NAMESPACES,))


def test_a_newcomer_moves_a_network_over_and_back_and_tries_every_way_as_the_document_says(
    directory: Path,
) -> None:
    blocks = blocks_of(
        REPOSITORY / "docs/tutorials/first-openstack-node.md", "# Your first OpenStack node"
    )
    transcript = directory / "transcript"
    with transcript.open("wb") as sink:
        # Its own session: Ctrl-C of the tests is not for the daemon that it starts.
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script_of(blocks)],  # noqa: S607 - the one that reads this document
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=_RUN_S * patience(),
            start_new_session=True,
        )
    assert find_fault(blocks, done.returncode, transcript.read_text(errors="replace")) == ""
    assert sum(bool(one.printed) for one in blocks) > 6
    assert not list(Path("/run/netns").glob(f"{_NAMESPACES}*"))
    assert list(processes_of([directory])) == []
    assert [path.name for path in directory.iterdir()] == ["transcript"]
