"""The line at the bottom of a terminal that shows how far a start of `imdsproxy run` is."""

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from imdsproxy.cli.output import BottomLine
from imdsproxy.reconcile.progress import Step
from support.patience import patience

_ERASE = "\r\x1b[K"


@pytest.fixture
def terminal() -> Iterator[tuple[int, TextIO]]:
    """A terminal of 80 columns: what is read from it, and the stream of who writes to it."""
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stream:
        yield reader, stream
    os.close(reader)


def _read(reader: int, expected: str) -> str:
    """What is read until that is all that is expected, or for as long as more comes."""
    text = ""
    while text != expected and select.select([reader], [], [], 10 * patience())[0]:
        text = (text + os.read(reader, 65536).decode()).replace("\r\n", "\n")
    return text


def test_what_is_written_goes_above_the_line_and_its_end_leaves_nothing(
    terminal: tuple[int, TextIO],
) -> None:
    reader, stream = terminal
    line = BottomLine(stream)
    line.write("before\n")
    line.show_start(())
    line.write("a log line\n")
    line.show_start([Step("reading instances", 3_000, 12_000), Step("other", 0, 0)])
    line.show_start([Step("reading instances", 3_000, 12_000)])
    line.show_start(None)
    line.show_start(None)
    line.write("after\n")
    assert line.isatty()
    stream.flush()
    expected = (
        f"before\n{_ERASE}the daemon is starting{_ERASE}a log line\nthe daemon is starting"
        f"{_ERASE}the daemon is starting: reading instances [####------------] 3,000 of 12,000"
        f"{_ERASE}after\n"
    )
    assert _read(reader, expected) == expected


def test_a_line_is_never_longer_than_the_terminal(terminal: tuple[int, TextIO]) -> None:
    reader, stream = terminal
    BottomLine(stream).show_start([Step("reading /" + "x" * 200, 0, 0)])
    expected = f"{_ERASE}the daemon is starting: reading /{'x' * 46}"
    assert len(expected.removeprefix(_ERASE)) == 79
    assert _read(reader, expected) == expected


@pytest.mark.root
def test_a_daemon_in_the_foreground_shows_that_it_starts(
    terminal: tuple[int, TextIO], tmp_path: Path
) -> None:
    reader, stream = terminal
    haproxy, config = tmp_path / "haproxy", tmp_path / "imdsproxy.yaml"
    haproxy.write_text("#!/bin/sh\nexec sleep 60\n")
    haproxy.chmod(0o755)
    config.write_text(
        f"paths: {{runtime_dir: {tmp_path}/run, state_dir: {tmp_path}/state}}\n"
        f"haproxy: {{binary: {haproxy}, supervisor: spawn}}\ndocuments: {{supervisor: spawn}}\n"
        "metrics: {listen: null, haproxy_listen: null}\n"
    )
    command = [sys.executable, "-m", "imdsproxy", "run", "--config", str(config)]
    with subprocess.Popen(command, stderr=stream, start_new_session=True) as process:
        try:
            stream.close()
            expected = f"{_ERASE}the daemon is starting"
            assert _read(reader, expected) == expected
        finally:
            os.killpg(process.pid, signal.SIGKILL)
