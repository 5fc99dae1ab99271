"""No secret of a fleet is in a log, a metric, an error or a packet: all of them are read, and searched."""

import base64
import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imdsproxy.errors import ImdsproxyError
from imdsproxy.fleet.members import Role, parse_invitation
from imdsproxy.hub.hosts.sealed import PLACE, open_keys
from imdsproxy.model.entities import InstanceId
from support.cli import Ran, run_main
from support.daemon import instance
from support.fleet_operator import Operator
from support.fleet_world import FleetWorld, fleet_world
from support.guest import take_token, with_token
from support.health import METRICS, ask_operator
from support.lab import until
from support.wire import tapped

pytestmark = pytest.mark.root

_USER_DATA = "#!/bin/sh\necho user-data-that-only-its-guest-reads-4711\n"
_PLAIN = "seen-in-plain-by-members-of-etcd"
_PEM = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\n(.+?)\n")


@dataclass(slots=True)
class _Wire:
    """What crossed every device of a namespace: of each TCP connection and direction its bytes in order."""

    flows: dict[bytes, bytearray] = field(default_factory=dict)

    def take(self, frame: bytes) -> None:
        if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
            return
        header = 14 + (frame[14] & 15) * 4
        end = 14 + int.from_bytes(frame[16:18])
        payload = frame[header + (frame[header + 12] >> 4) * 4 : end]
        ends = frame[26:34] + frame[header : header + 4]
        self.flows.setdefault(ends, bytearray()).extend(payload)

    def text(self) -> bytes:
        return b"\n".join(self.flows.values())


def _forms(secret: bytes) -> list[bytes]:
    """A secret, and how JSON, PEM files, headers and dumps would show it."""
    return [
        secret,
        json.dumps(secret.decode("latin-1")).encode()[1:-1],
        base64.b64encode(secret).rstrip(b"="),
        base64.urlsafe_b64encode(secret).rstrip(b"="),
        secret.hex().encode(),
    ]


def _found(secrets: Mapping[str, bytes], places: Mapping[str, bytes]) -> list[str]:
    return [
        f"{name} in {place}"
        for place, content in places.items()
        for name, secret in secrets.items()
        if any(form in content for form in _forms(secret))
    ]


def _keys_in(directory: Path) -> dict[str, bytes]:
    """The first line of each private key in files below a directory: as good as all of it."""
    files = [*directory.rglob("*.key"), *directory.rglob("*.pem")]
    found = {path.name: _PEM.search(path.read_bytes()) for path in files}
    return {name: one[1] for name, one in found.items() if one is not None}


@pytest.fixture(scope="module")
def world() -> Iterator[FleetWorld]:
    with fleet_world(log={"level": "debug", "format": "json"}, metrics=METRICS) as made:
        yield made


def _refused(action: Callable[[], object]) -> str:
    with pytest.raises(ImdsproxyError) as caught:
        action()
    error = caught.value
    return f"{error.message} {error.hint} {error!r} {error.__cause__!r} {vars(error)}"


def test_no_secret_is_in_a_log_a_metric_an_error_or_a_packet(
    world: FleetWorld, tmp_path: Path
) -> None:
    operator, reader = Operator.new(world, "olga"), Operator.new(world, "rita", Role.READER)
    seen: list[str] = []
    wire = _Wire()
    with tapped(world.etcd.lab.host, wire.take):
        host = world.add_host("a")
        guest = host.lab.guest("blue")
        fields = {"user_data": _USER_DATA, "hostname": _PLAIN}
        record = instance("web", "blue", fields=fields)
        operator.ask("POST", "/v1/networks", {"id": "blue", "listener": {"bridge": "blue"}})
        added = operator.ask("POST", "/v1/instances", {**record, "hosts": ["a"]})
        assert added["applied"], added
        assert guest.ask("/latest/user-data").text == _USER_DATA
        token = take_token(guest)
        assert guest.ask("/latest/user-data", headers=with_token(token)).status == 200
        assert guest.ask("/latest/user-data", headers=with_token(f"{token}x")).status == 401
        invited, joined = _join(operator, tmp_path)
        rotated = operator.ask("POST", "/v1/token-keys/rotate")
        # Wrong in every way that has the secret at hand.
        wrong: list[dict[str, object]] = [
            {**record, "hosts": ["a"]},
            {**record, "id": "web2", "hosts": ["a"]},
            {**record, "id": "web3", "hosts": ["a"], "wrong": _USER_DATA},
            {**record, "id": "web4", "hosts": ["nobody"]},
            {**record, "id": "web5", "hosts": ["a"], "user_data_base64": _USER_DATA},
            {**record, "id": "web6", "hosts": ["a"], "user_data": [_USER_DATA]},
            {**record, "id": "web7", "hosts": ["a"], "user_data": _USER_DATA * 40_000},
        ]
        seen += [
            _refused(lambda: operator.ask("POST", "/v1/instances", one))  # noqa: B023
            for one in wrong
        ]
        path = "/v1/instances/web/documents"
        seen.append(_refused(lambda: reader.ask("GET", path)))
        seen.append(repr(reader.ask("GET", "/v1/instances/web")))
        seen.append(_refused(lambda: reader.ask("POST", "/v1/token-keys/rotate")))
        shown = [
            reader.run(*command)
            for command in (
                ("fleet", "status", "--json"),
                ("fleet", "hosts", "--json"),
                ("instance", "list", "--json"),
                ("instance", "show", "web", "--json"),
                ("explain", "web", "--json"),
            )
        ]
        assert [one.status for one in shown] == [0] * len(shown), shown
        assert rotated["applied"], rotated
        # Hubs read etcd again, hosts their streams, with all of it.
        for hub in world.hubs:
            hub.end()
            hub.start()
        until(lambda: host.source["in_sync"], within_s=30, what="being in sync")
        host.daemon.kill_controller()
        host.daemon.start()
        assert guest.ask("/latest/user-data").text == _USER_DATA
    sealed = world.ask(lambda etcd: etcd.read(PLACE)).kvs[0].value
    keys = open_keys(sealed, world.files.load_envelope())
    own = keys.item_of(InstanceId("web"))
    secrets = {
        "the user data": _USER_DATA.encode(),
        "a session token": token.encode(),
        "an invitation": invited.encode(),
        "an invitation's token": parse_invitation(invited).token.encode(),
        **{f"token key {one.kid}": base64.b64decode(one.text) for one in (keys.current, *keys.old)},
        **{f"web's token key {kid}": base64.b64decode(text) for kid, text in own["keys"].items()},
        **{f"envelope key {n}": key for n, key in world.files.load_envelope().keys.items()},
        **_keys_in(world.directory),
        **_keys_in(host.daemon.directory),
        **_keys_in(tmp_path),
    }
    # Of the CA, etcd's two, two hubs, two operators, the host and the one that joined.
    assert len(secrets) >= 18, sorted(secrets)
    logs = [*world.directory.glob("*.log"), *host.daemon.directory.rglob("*.log")]
    places = {
        **{f"the log {path.name}": path.read_bytes() for path in logs},
        "the errors": "\n".join(seen).encode(),
        "the command line": "".join(f"{one.out}{one.err}" for one in (*shown, joined)).encode(),
        "the host's status": json.dumps(host.daemon.status()).encode(),
        "the host's metrics": ask_operator(host.lab, "/metrics").body,
        "etcd": b"\n".join(
            path.read_bytes() for path in world.directory.rglob("*.etcd/**/*") if path.is_file()
        ),
        "the wire": wire.text(),
    }
    assert all(places.values()), {place: len(content) for place, content in places.items()}
    # What is no secret is found by the same search, wherever it is in plain.
    plain = _found({_PLAIN: _PLAIN.encode()}, places)
    assert {f"{_PLAIN} in etcd", f"{_PLAIN} in the wire"} <= set(plain)
    assert _found(secrets, places) == []


def _join(operator: Operator, tmp_path: Path) -> tuple[str, Ran]:
    """The invitation of a host that joins, and what the command printed there, the second time too."""
    config = tmp_path / "late.yaml"
    config.write_text(f"paths:\n  state_dir: {tmp_path / 'late'}\n")
    invited, words = operator.invite("late"), ("--config", str(config), "fleet", "join")
    with operator.world.etcd.entered():
        first, again = (run_main(*words, stdin=invited) for _ in range(2))
    assert (first.status, again.status != 0) == (0, True), (first, again)
    return invited, Ran(0, first.out + again.out, first.err + again.err)
