"""Commands while the daemon starts: how far it is, waiting for it, and no request lost when it has started."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.api import client as admin_client
from imdsproxy.api.answers import Readiness
from imdsproxy.api.client import AdminClient
from imdsproxy.cli import output
from imdsproxy.cli import status as status_command
from imdsproxy.errors import Starting
from imdsproxy.reconcile.progress import Step
from support.cli import Cli, Ran, run_main
from support.starting_daemon import StartingDaemon, starting_daemon

_STEP: Final = Step("reading instances", 3_000, 10_000)
_WORDS: Final = "the daemon is starting: reading instances, 3,000 of 10,000"


@pytest.fixture
def daemon(filled: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartingDaemon]:
    monkeypatch.setattr(admin_client, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(output, "_LINE_EVERY_S", 0.0)
    with starting_daemon(filled.server, [_STEP]) as one:
        yield one


def _run(daemon: StartingDaemon, *words: str) -> Ran:
    return run_main("--socket", str(daemon.path), *words)


def test_status_says_how_far_a_start_is_and_check_that_it_is_not_ready(
    daemon: StartingDaemon,
) -> None:
    assert _run(daemon, "status") == Ran(0, f"state  {_WORDS}\n", "")
    assert _run(daemon, "status", "--check").status == 1
    shape = _run(daemon, "status", "--json").json
    assert shape["readiness"] == {"ready": False, "reasons": [_WORDS], "degraded": []}
    assert shape["progress"] == [{"what": "reading instances", "done": 3_000, "of": 10_000}]
    daemon.show()
    assert "the daemon is starting\n" in _run(daemon, "status").out


@pytest.mark.parametrize(
    ("words", "out"),
    [
        ("status --wait", "state ready"),
        ("instance list", "web-1"),
        ("instance set web-1 --tag a=b", "done: instance web-1 changed"),
        ("explain web-1", "verdict"),
    ],
)
def test_a_command_shows_how_far_the_start_is_and_then_its_answer(
    daemon: StartingDaemon, words: str, out: str
) -> None:
    daemon.go_on_when_asked()
    ran = _run(daemon, *words.split())
    assert ran.status == 0
    assert out in ran.words
    assert "the daemon is starting: reading instances: 3,000 of 10,000\n" in ran.err


def test_who_waits_sees_why_a_daemon_is_not_ready_and_gets_its_status_once_it_is(
    filled: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_LINE_EVERY_S", 0.0)
    status = filled.server.status
    status["readiness"] = Readiness(ready=False, reasons=("source file is not in sync",))
    threading.Timer(0.5, status.clear).start()
    ran = filled("status", "--wait", "--check")
    assert ran.status == 0
    assert "state ready" in ran.words
    assert "the daemon is starting: source file is not in sync\n" in ran.err


def test_a_daemon_that_never_appears_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_command, "_APPEARS_WITHIN_S", 0.5)
    ran = run_main("--socket", str(tmp_path / "none.sock"), "status", "--wait")
    assert ran.status == 69
    assert "no daemon answers" in ran.err


def test_a_program_that_waits_is_not_bothered(daemon: StartingDaemon) -> None:
    daemon.go_on_when_asked()
    ran = _run(daemon, "instance", "list", "--json")
    assert (ran.status, ran.err) == (0, "")
    assert [one["record"]["id"] for one in ran.json] == ["web-1"]


def test_a_start_without_progress_is_waited_for_as_long_as_for_an_answer(
    daemon: StartingDaemon,
) -> None:
    for client in (AdminClient(daemon.path, timeout_s=0.2), AdminClient(daemon.path, waiting=None)):
        with pytest.raises(Starting, match=_WORDS) as caught:
            client.get("/v1/status")
        assert (caught.value.code, caught.value.exit_status) == ("starting", 69)


def test_a_client_that_sends_a_long_body_reads_why_it_is_refused(daemon: StartingDaemon) -> None:
    body = {"id": "web-2", "name": "web-2", "user_data": "x" * 8_000_000}
    with pytest.raises(Starting, match=_WORDS):
        AdminClient(daemon.path, waiting=None).request("POST", "/v1/instances", body=body)


def test_records_of_a_file_are_sent_once_the_daemon_has_started(
    filled: Cli, daemon: StartingDaemon
) -> None:
    daemon.go_on_when_asked()
    seen: list[object] = []
    line = b'{"instance": {"id": "web-2", "name": "web-2"}}\n'
    AdminClient(daemon.path).post_records(iter([line]), {}, seen.extend)
    assert filled.instance("web-2").name == "web-2"
    assert seen[0] == {"what": "reading instances", "done": 3_000, "of": 10_000}


def test_no_request_is_lost_from_one_server_to_the_next(daemon: StartingDaemon) -> None:
    begun = threading.Barrier(9)

    def ask_often(_number: int) -> int:
        client = AdminClient(daemon.path)
        begun.wait()
        return sum(len(client.get("/v1/instances")) for _ in range(30))

    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(ask_often, range(8))
        begun.wait()
        daemon.go_on()
        assert list(answers) == [30] * 8
