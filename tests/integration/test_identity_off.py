"""A host whose settings give no identity tokens."""

from pathlib import Path
from typing import Final

import pytest

from imdsproxy.model.wire import DOCUMENT_PATHS
from support.guest import take_token, with_token
from support.world import World

pytestmark = pytest.mark.root

_LIBRARY: Final = "/cryptography/"
"""Part of the path of the library by which tokens are signed."""


def test_a_daemon_without_identity_has_no_process_library_or_rule_for_it(world: World) -> None:
    daemon = world.daemon
    processes = daemon.processes()
    assert world.pids().controller in processes
    assert not [one for one in processes.values() if "issuer" in one or "signer" in one]
    for pid in processes:
        assert _LIBRARY not in Path(f"/proc/{pid}/maps").read_text(), processes[pid]
    assert not [one for one in ("identity.pid", "signer.pid") if (daemon.runtime / one).exists()]
    config = (daemon.runtime / "haproxy.cfg").read_text()
    assert "backend documents" in config
    assert not [one for one in ("identity", "oauth2", "issuer") if one in config]


def test_explain_says_that_a_host_without_identity_has_no_signed_document_as_guests_are_answered(
    world: World,
) -> None:
    world.have_policy({"host": {"identity_document": True}})
    headers = with_token(take_token(world.red))
    path = DOCUMENT_PATHS[0]
    assert world.red.ask(path, headers=headers).status == 404
    query = {"network": "red", "address": "10.0.0.5", "path": path}
    decided = world.daemon.admin.get("/v1/explain", query)["decision"]["with_token"]
    assert (decided["status"], decided["rule"]) == (404, "identity.enabled")


def test_an_instance_of_a_host_without_identity_may_request_nothing(world: World) -> None:
    world.have_policy({"host": {"audiences": ["*"], "identity_document": True}})
    shape = world.daemon.admin.get("/v1/instances/red-5/identity")
    assert not shape["enabled"]
    (use,) = shape["networks"]
    reasons = {one["why"] for one in use["requests"]}
    assert reasons == {"this host gives no identity tokens"}
    assert not [one for one in use["audiences"] if one["allowed"]]
    shown = world.daemon.command("identity", "tokens", "red-5").out
    assert "identity.enabled turns them on" in shown
