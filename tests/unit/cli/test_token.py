"""`imdsproxy token` and `instance reopen`, against the admin API on a real unix socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.cli.main import main
from imdsproxy.core.model import InstanceId
from imdsproxy.core.policy import Guard
from support.admin_server import AdminServer, admin_server

_WEB = InstanceId("web-1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    with admin_server(tmp_path) as found:
        for arguments in (
            ("network", "add", "blue", "--namespace", "blue"),
            ("instance", "add", "web-1", "--network", "blue"),
        ):
            assert main(["--socket", str(found.socket), *arguments]) == 0
        yield found


def _run(
    server: AdminServer, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["--socket", str(server.socket), *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_tokens_are_revoked_and_a_boot_is_opened_again(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    revoked = _run(server, capsys, "token", "revoke", "web-1")
    assert revoked == (0, "done: all tokens of instance web-1 revoked\n", "")
    reopened = _run(server, capsys, "instance", "reopen", "web-1")
    assert reopened == (0, "done: instance web-1 boots anew\n", "")
    assert server.operations.guards == {_WEB: Guard(1, 1_760_093_000)}


def test_a_revocation_says_that_hosts_with_the_same_keys_do_not_hear_of_it(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.operations.shared_keys = "/etc/imdsproxy/token-keys"
    status, out, _ = _run(server, capsys, "token", "revoke", "web-1")
    assert status == 0
    assert "good on every other host that has the keys of /etc/imdsproxy/token-keys" in out
    assert "revoke there too" in out


def test_rotation_tells_the_new_key_by_its_name(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = _run(server, capsys, "token", "rotate")
    assert status == 0
    assert out == "done: key 0f3a9c11 signs tokens, /var/lib/imdsproxy/token-keys has it\n"
    assert server.operations.rotations == 1


@pytest.mark.parametrize("command", [("token", "revoke"), ("instance", "reopen")])
def test_an_instance_that_nobody_knows_is_66_with_a_hint(
    server: AdminServer, capsys: pytest.CaptureFixture[str], command: tuple[str, str]
) -> None:
    status, out, err = _run(server, capsys, *command, "nobody")
    assert (status, out) == (66, "")
    assert "there is no instance nobody" in err
    assert "instance list" in err


@pytest.mark.parametrize(
    "command", [("token", "revoke", "web-1"), ("instance", "reopen", "web-1"), ("token", "rotate")]
)
def test_what_is_not_in_force_yet_is_said_with_its_reason(
    server: AdminServer, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    server.operations.pending = ("HAProxy does not answer",)
    status, out, _ = _run(server, capsys, *command)
    assert status == 75
    assert out.startswith("stored: ")
    assert "not in force yet:\n  HAProxy does not answer" in out
    assert '"applied": false' in _run(server, capsys, "--json", *command)[1]
