"""What operators do about tokens and boots: in every worker when it returns, or reported why not."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.admin import tokens
from imdsproxy.core.identity import Learned
from imdsproxy.core.model import InstanceId
from imdsproxy.core.observation import Observation
from imdsproxy.core.policy import OperatorOverride
from imdsproxy.errors import NotFound, Problem
from support.admin_server import AdminServer
from support.record_builders import key

_WEB = InstanceId("web-1")


def _act(server: AdminServer, what: str = "revoke-tokens", name: str = "web-1") -> dict[str, Any]:
    done: dict[str, Any] = server.client.request("POST", f"/v1/instances/{name}/{what}")
    return done


def _epoch(server: AdminServer, address: str) -> str:
    """In the policy that HAProxy's worker has for the address."""
    applier = server.records.applier
    (worker,) = server.haproxy.workers
    found = (
        worker.lookup(applier.layout.overlay_map, applier.layout.base_map, f"blue/{address}") or ""
    )
    return found.partition("|")[0].split(":")[1] if found.startswith("+") else "0"


@pytest.mark.parametrize(
    ("configured", "shared"), [(None, False), ("keys", False), ("theirs", True)]
)
def test_a_revocation_reports_keys_that_other_hosts_have_too(
    server: AdminServer, tmp_path: Path, configured: str | None, *, shared: bool
) -> None:
    keys = server.policy_store.keys
    theirs = tmp_path / "theirs"
    theirs.write_bytes(keys.path.read_bytes())
    theirs.chmod(0o600)
    path = {None: None, "keys": keys.path, "theirs": theirs}[configured]
    keys.read(path)
    assert _act(server)["shared"] == (str(path) if shared else None)


def test_a_revocation_returns_when_every_address_is_in_force_and_not_before(
    server: AdminServer,
) -> None:
    learned = key("blue", "fe80::5")
    server.records.learned[learned] = Learned(_WEB, time.monotonic() + 600)
    server.haproxy.stop_answering_after = 0
    with ThreadPoolExecutor() as threads:
        revoking = threads.submit(_act, server)
        while _WEB not in server.policy_store.overrides:
            time.sleep(0.01)
        assert not revoking.done(), "on disk first"
        assert _epoch(server, "10.0.0.5") == "0"
        server.haproxy.stop_answering_after = None
        assert revoking.result(20)["applied"]
    assert (_epoch(server, "10.0.0.5"), _epoch(server, "fe80::5")) == ("1", "1")


def test_two_at_once_are_two_epochs(server: AdminServer) -> None:
    with ThreadPoolExecutor(2) as both:
        done = list(both.map(lambda _: _act(server)["epoch"], range(2)))
    assert sorted(done) == [1, 2]
    assert server.policy_store.overrides == {_WEB: OperatorOverride(2)}


@pytest.mark.parametrize("what", ["revoke-tokens", "reopen"])
def test_an_unknown_instance_is_refused_with_a_hint(server: AdminServer, what: str) -> None:
    with pytest.raises(NotFound, match="there is no instance nobody") as refused:
        _act(server, what, "nobody")
    assert refused.value.hint == "imdsproxy instance list"
    server._observe(Observation("file", in_sync=False))
    with pytest.raises(NotFound) as refused:
        _act(server, what, "nobody")
    assert refused.value.hint == "source file is not in sync yet and may tell of it: try again"
    assert not server.policy_store.overrides


def test_what_haproxy_has_of_a_source_that_is_silent_is_reported(server: AdminServer) -> None:
    _act(server)
    server.client.request("DELETE", "/v1/instances/web-1")
    server._observe(Observation("file", in_sync=False))
    overlay = server.records.applier.state.overlay
    overlay["blue/10.0.0.5"] = "+1tooo--:1:0:64|web-1|0f3a9c"
    changed = _act(server)
    assert (changed["epoch"], changed["applied"]) == (2, False)
    assert "no source that is in sync reports it" in changed["pending"][0]
    overlay["blue/10.0.0.5"] = "mail|0f3a9c"
    assert _act(server)["applied"]


def test_what_is_not_confirmed_in_time_says_why(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_APPLY_DEADLINE_S", 0.05)
    server.unapplied.append(Problem("records", "HAProxy does not answer"))
    server.haproxy.stop_answering_after = 0
    for done in (_act(server), server.client.request("POST", "/v1/token-keys/rotate")):
        assert not done["applied"]
        assert done["pending"] == [
            "the data plane has not confirmed it yet",
            "HAProxy does not answer",
        ]


def test_a_rotation_returns_when_workers_know_the_key(server: AdminServer) -> None:
    keys = server.policy_store.keys
    rotated = server.client.request("POST", "/v1/token-keys/rotate")
    assert (rotated["kid"], rotated["file"], rotated["applied"]) == (
        keys.keys[0].kid,
        str(keys.path),
        True,
    )
    (worker,) = server.haproxy.workers
    (known,) = (entries for path, entries in worker.maps.items() if "token" in Path(path).name)
    assert rotated["kid"] in {name for name, _ in known}
