"""`imdsproxy token` and `instance reopen`, against the admin API on a real unix socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.admin import tokens
from imdsproxy.cli.main import main
from imdsproxy.core.model import InstanceId
from imdsproxy.core.policy import OperatorOverride
from imdsproxy.errors import Problem
from support.admin_server import NOW, AdminServer, admin_server

_WEB = InstanceId("web-1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    with admin_server(tmp_path) as found:
        for arguments in (
            ("network", "add", "blue", "--namespace", "blue"),
            ("instance", "add", "web-1", "--network", "blue", "--address", "10.0.0.5"),
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
    assert server.policy_store.overrides.overrides == {_WEB: OperatorOverride(1, NOW)}


def test_a_revocation_says_that_hosts_with_the_same_keys_do_not_hear_of_it(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.policy_store.keys._path = Path("/etc/imdsproxy/token-keys")
    status, out, _ = _run(server, capsys, "token", "revoke", "web-1")
    assert status == 0
    assert "good on every other host that has the keys of /etc/imdsproxy/token-keys" in out
    assert "revoke there too" in out


def test_rotation_tells_the_new_key_by_its_name(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = _run(server, capsys, "token", "rotate")
    assert status == 0
    keys = server.policy_store.keys
    assert out == f"done: key {keys.keys[0].kid} signs tokens, {keys.path} has it\n"
    assert len(keys.keys) == 2


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
    server: AdminServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
) -> None:
    body = {"created_at": 1_700_000_000, "policy": {"seal_user_data": True}}
    server.client.request("PATCH", "/v1/instances/web-1", body=body)
    server.unapplied.append(Problem("x", "HAProxy does not answer"))
    server.haproxy.stop_answering_after = 0
    monkeypatch.setattr(tokens, "_APPLY_DEADLINE_S", 0.1)
    status, out, _ = _run(server, capsys, *command)
    assert status == 75
    assert out.startswith("stored: ")
    assert (
        "not in force yet:\n  the data plane has not confirmed it yet\n  HAProxy does not answer"
        in out
    )
    assert '"applied": false' in _run(server, capsys, "--json", *command)[1]
