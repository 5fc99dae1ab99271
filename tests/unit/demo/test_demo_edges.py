from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from demo.boot import Boot
from demo.cloudinit import download, parse_packages
from demo.daemon import Pids
from demo.place import alone, prepare, unfit
from demo.processes import CommandError, run
from demo.reading import Dialect, Reading, Transport
from demo.roster import guests
from demo.show import document, hints, table, write_json
from demo.verdict import Verdict

DEPENDS = """\
cloud-init
  Depends: eject
 |Depends: dhcpcd-base
  Depends: <python3:any>
    python3
  Depends: python3-yaml
python3-yaml
  Depends: python3:any
python3-minimal
eject
locales
"""


def test_only_cloud_init_and_its_python_libraries_are_fetched() -> None:
    assert parse_packages(DEPENDS) == ["cloud-init", "python3-yaml"]


def test_no_package_lists_means_no_packages() -> None:
    assert parse_packages("") == []


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


def test_a_failed_command_tells_its_own_words() -> None:
    with pytest.raises(CommandError, match="only this"):
        run(["sh", "-c", "echo only this >&2; exit 3"])


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


def test_the_table_shows_every_guest_in_every_dialect() -> None:
    text = shown(verdicts())

    for guest in guests("w"):
        assert text.count(guest.hostname) == len(Dialect)
        assert guest.user_data_sha256[:8] in text
    assert "WRONG" not in text
    assert "\x1b" not in text


def test_a_narrow_terminal_shows_every_verdict() -> None:
    text = shown(verdicts(), width=80)

    assert text.count("own, 3.2 s") == 18
    assert max(map(len, text.splitlines())) <= 80
    assert shown(verdicts(wrong=True), width=80).count("WRONG") == 36


def test_the_table_shows_what_is_wrong() -> None:
    assert shown(verdicts(wrong=True)).count("WRONG") == 36


def test_faults_say_where_they_were_seen() -> None:
    assert verdicts(wrong=True)[0].faults == [
        "IPV4: hostname is 'x', not 'y'",
        "IPV6: hostname is 'x', not 'y'",
    ]


def test_the_json_file_has_everything_that_a_program_needs(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    write_json(file, document(guests("w"), Pids(1, 2, (3, 4), 5), ["imdsproxy", "--config", "c"]))

    written = json.loads(file.read_text())
    assert set(written) == {"guests", "haproxy", "documents", "controller", "cli"}
    assert written["haproxy"] == {"master": 1, "worker": 2}
    assert set(written["guests"][0]) == {
        *("name", "network", "netns", "enter", "instance_id", "uuid", "hostname"),
        *("availability_zone", "addresses", "ssh_keys", "user_data_sha256"),
    }
    assert list(tmp_path.iterdir()) == [file]


def test_the_hints_can_be_pasted_into_a_shell() -> None:
    lines = list(hints(guests("w"), ["imdsproxy", "--config", "/a b/c.yaml"]))

    assert "'/a b/c.yaml'" in lines[-1]
    assert lines[0].startswith("ip netns exec imdsdemo-red-a curl ")
