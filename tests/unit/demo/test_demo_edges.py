from __future__ import annotations

import contextlib
import io
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from demo.boot import Boot
from demo.cloudinit import download
from demo.place import alone, prepare, unfit
from demo.processes import CommandError, run
from demo.reading import Dialect, Reading, Transport
from demo.roster import guests
from demo.show import table
from demo.verdict import Verdict


def test_runs_that_begin_together_fetch_the_packages_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_want_them = threading.Barrier(2)
    filled: list[Path] = []

    def fill(debs: Path) -> None:
        filled.append(debs)
        (debs / "one.deb").touch()

    def fetch(_: int) -> Path:
        both_want_them.wait()
        return download(tmp_path, say=lambda _: None)

    monkeypatch.setattr("demo.cloudinit._fill", fill)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(fetch, range(2))
    assert first == second
    assert [path.name for path in first.iterdir()] == ["one.deb"]
    assert len(filled) == 1


def test_a_directory_with_too_long_a_name_for_sockets_is_unfit() -> None:
    assert unfit(Path("/") / ("d" * 80)) is not None


def test_a_directory_that_mount_options_cannot_name_is_unfit() -> None:
    for name in ("/srv/a:b", "/srv/a,b", "/srv/a b", "/srv/a\\b"):
        assert unfit(Path(name)) is not None


def test_a_directory_below_a_closed_one_is_unfit(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)

    assert unfit(closed / "demo") is not None


def test_an_open_short_directory_is_fit() -> None:
    assert unfit(Path("/srv/imdst-demo")) is None


def test_files_that_no_demonstration_made_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("x")

    with pytest.raises(CommandError):
        prepare(tmp_path)

    assert (tmp_path / "run" / "precious").read_text() == "x"


def test_an_earlier_runs_files_make_room(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    prepare(directory)
    (directory / "state").mkdir()
    (directory / "state" / "store.sqlite").write_text("old")

    prepare(directory)

    assert not (directory / "state").exists()


def test_a_second_demonstration_is_told_of_the_first() -> None:
    with socket.socket(socket.AF_UNIX) as first:
        with contextlib.suppress(OSError):  # a real one runs: as good
            first.bind("\0imdsproxy-demo")
        with pytest.raises(CommandError, match="another"), alone():
            pass


def test_a_command_without_end_is_given_up() -> None:
    with pytest.raises(CommandError, match=r"no end after 0\.1 s"):
        run(["sleep", "30"], timeout_s=0.1)


def verdicts(*, wrong: bool = False) -> list[Verdict]:
    faults = ("hostname is 'x', not 'y'",) if wrong else ()
    return [
        Verdict(
            guest,
            dialect,
            {
                transport: Reading(guest.uuid, guest.hostname, guest.user_data_sha256, faults)
                for transport in Transport
            },
            Boot(3.2, ""),
            (),
        )
        for guest in guests("w")
        for dialect in Dialect
    ]


def shown(rows: list[Verdict], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(rows, width=width))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_narrow_terminal_shows_every_verdict() -> None:
    text = shown(verdicts(), width=80)

    assert text.count("own, 3.2 s") == 18
    assert max(map(len, text.splitlines())) <= 80
    assert shown(verdicts(wrong=True), width=80).count("WRONG") == 36
