from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.cli.main import main
from support.admin_server import AdminServer, admin_server

LINES = """\
1 1795684004318 blue 10.0.0.5 vm-1 - 200 3 documents documents-0 GET /latest/user-data
2 1795684004400 red 10.0.0.6 - - 404 12 resolver resolver GET /latest/meta-data/
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    with admin_server(tmp_path) as found:
        yield found


def run(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch, *arguments: str, lines: str = LINES
) -> int:
    """Watch while guests ask between the first question and the second, then Ctrl-C."""
    slept = 0

    def sleep(_seconds: float) -> None:
        nonlocal slept
        slept += 1
        if slept > 1:
            raise KeyboardInterrupt
        server.haproxy.events = lines

    monkeypatch.setattr("imdsproxy.cli.guests.time.sleep", sleep)
    return main(["--socket", str(server.socket), "watch", *arguments])


def test_requests_are_shown_as_they_happen_until_it_is_interrupted(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(server, monkeypatch) == 130
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["TIME", "NETWORK", "ADDRESS"]
    shown = "blue 10.0.0.5 vm-1 documents 3 200 GET /latest/user-data"
    assert " ".join(first.split()[1:]) == shown
    assert " ".join(second.split()[1:]) == "red 10.0.0.6 - resolver 12 404 GET /latest/meta-data/"


def test_only_a_network_or_an_instance_is_shown(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(server, monkeypatch, "--network", "red")
    assert len(capsys.readouterr().out.splitlines()) == 2
    more = LINES + LINES.replace("1 1795", "3 1795").replace("2 1795", "4 1795")
    run(server, monkeypatch, "--instance", "vm-1", lines=more)
    assert "vm-1" in capsys.readouterr().out.splitlines()[1]


def test_programs_get_a_line_of_json_each(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(server, monkeypatch, "--json")
    first, _second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {
        "at": 1795684004.318,
        "network": "blue",
        "address": "10.0.0.5",
        "instance": "vm-1",
        "method": "GET",
        "path": "/latest/user-data",
        "status": 200,
        "answered_by": "documents",
        "milliseconds": 3,
    }


@pytest.mark.parametrize(("flags", "said"), [([], "too many to show"), (["--json"], '"missed"')])
def test_that_some_were_missed_is_said(
    server: AdminServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    server.haproxy.events = LINES.replace("179568400", "179568300")
    run(server, monkeypatch, *flags)
    assert said in capsys.readouterr().out


def test_without_a_daemon_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", str(tmp_path / "nobody"), "watch"]) == 69
    assert "no daemon answers" in capsys.readouterr().err
