"""The document for operators of OpenStack: what it has a newcomer do here is done, as it stands there."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.daemon import alive
from support.document_blocks import Block, blocks_of, missing_lines
from support.lab import until
from support.openstack.install import REPOSITORY

pytestmark = pytest.mark.root

_PAGE: Final = REPOSITORY / "docs/openstack.md"
_HEADING: Final = "## Trying it here"
_NAMESPACES: Final = ("imdst-try-net", "imdst-try-guest")
_MARK: Final = "@@ block "
_RUN_S: Final = 240


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where `mktemp` makes its directory; whatever a run has left that failed half-way goes with it."""
    # Short: sockets are in it.
    made = Path(tempfile.mkdtemp(prefix="imdst-"))
    made.chmod(0o755)
    try:
        yield made
    finally:
        _kill(_processes(made))
        shutil.rmtree(made)
        for one in _left():
            subprocess.run(["ip", "netns", "delete", one], check=True)  # noqa: S607 - iproute2's


def _processes(directory: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{directory}/".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return [pid for pid in found if pid != os.getpid() and alive(pid)]


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in pids), what="the end of what was left")


def _left() -> list[str]:
    return [name for name in _NAMESPACES if Path("/run/netns", name).exists()]


def _run(blocks: list[Block], directory: Path) -> dict[int, str]:
    """Run the blocks in one shell, as somebody who copies them; what each printed, by its line."""
    script = "\n".join(f"echo; echo '{_MARK}{one.line}'\n{one.script}" for one in blocks)
    transcript = directory / "transcript"
    with transcript.open("wb") as sink:
        # Its own session: Ctrl-C of the tests is not for the daemon that it starts.
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],  # noqa: S607 - the one that reads this document
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=_RUN_S,
            start_new_session=True,
        )
    text = transcript.read_text(errors="replace")
    printed = {
        int(part.partition("\n")[0]): part.partition("\n")[2] for part in text.split(_MARK)[1:]
    }
    assert done.returncode == 0, f"{_PAGE.name}, block of line {max(printed)}:\n{text[-3000:]}"
    return printed


@pytest.mark.slow
def test_a_newcomer_moves_a_network_over_and_back_and_tries_every_way_as_the_document_says(
    directory: Path,
) -> None:
    assert not _left(), "somebody else is trying it on this host"
    blocks = blocks_of(_PAGE, _HEADING)
    printed = _run(blocks, directory)

    assert sum(bool(one.printed) for one in blocks) > 6
    missing = {
        f"{_PAGE.name}:{one.line}": (absent, printed[one.line])
        for one in blocks
        if (absent := missing_lines(one, printed[one.line]))
    }
    assert missing == {}
    assert _left() == []
    assert _processes(directory) == []
    assert [path.name for path in directory.iterdir()] == ["transcript"]
