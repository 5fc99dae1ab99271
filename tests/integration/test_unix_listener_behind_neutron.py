"""Behind the HAProxies that Neutron's own code configures: whose guest it is, whatever the guest says."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from support.agent_socket import AgentWorld, open_agents, say_whose
from support.guest import IPV4, IPV6, Guest, Load, Reply
from support.lab import RecordMapping, record, within
from support.namespace_proxy import PROGRAM
from support.openstack.front import FrontKind, open_fronts

pytestmark = pytest.mark.root

_ROUTER_PORT: Final = 9697
_KINDS: Final[Mapping[str, FrontKind]] = {
    "isolated": "network",
    "isolated-too": "network",
    "routed": "router",
    "ovn": "ovn",
}
"""By the network's or router's id; the addresses in all of them are the same."""

_OTHER_WAYS: Final = ("own", "namespace-proxy")
"""A listener in the network's namespace, and imdsproxy's own proxy of a network in front of the socket."""

_IDS: Final = {
    name: f"{number:08d}-0000-4000-8000-000000000000"
    for number, name in enumerate((*_KINDS, *_OTHER_WAYS))
}


@dataclass(frozen=True, slots=True)
class _Fronts:
    agents: AgentWorld
    guests: Mapping[str, Guest]


@pytest.fixture(scope="module")
def shared() -> Iterator[_Fronts]:
    """Guests behind proxies of all kinds, whose accounts are not that of the socket."""
    with ExitStack() as stack:
        agents = stack.enter_context(open_agents(proxy_user="nobody", proxy_group="nogroup"))
        lab = agents.lab
        fronts = stack.enter_context(open_fronts(lab, agents.daemon.directory, agents.path))
        networks, guests = [], {}
        for name, kind in _KINDS.items():
            networks.append(record(name, {"namespace": lab.name("nowhere-" + name)}))
            options: dict[str, object] = {"bind_address": "::", "port": _ROUTER_PORT}
            if kind != "router":
                options = {"bind_address_v6": IPV6, "bind_interface": "br0"}
            fronts.start(kind, name, user="nobody", group="nogroup", **options)
            guests[name] = lab.guest(name)
        guests["routed"] = replace(guests["routed"], port=_ROUTER_PORT)
        networks.append(lab.namespace_network("own"))
        lab.furnish("namespace-proxy")
        uuid = _IDS["namespace-proxy"]
        networks.append(record(uuid, {"namespace": lab.name("nowhere-proxy")}))
        _start_namespace_proxy(lab.name("namespace-proxy"), uuid, agents.path, fronts.state)
        guests |= {name: lab.guest(name) for name in _OTHER_WAYS}
        agents.daemon.put(
            networks,
            [
                *(_instance(name, name) for name in (*_KINDS, "own")),
                _instance("namespace-proxy", uuid),
            ],
        )
        yield _Fronts(agents, guests)


@pytest.fixture
def fronts(shared: _Fronts) -> _Fronts:
    shared.agents.heal()
    shared.agents.nova.default = say_whose
    return shared


def _start_namespace_proxy(namespace: str, uuid: str, socket: Path, state: Path) -> None:
    words = (
        f"--network-id={uuid}",
        "--metadata-port=80",
        f"--metadata-proxy-socket={socket}",
        "--metadata-proxy-user=nobody",
        "--metadata-proxy-group=nogroup",
        f"--state-path={state}",
    )
    done = subprocess.run((*within(namespace), PROGRAM, *words), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def _instance(name: str, network: str) -> RecordMapping:
    addresses = ["10.0.0.5", "2001:db8::5"]
    port = {"network": network, "mac": "fa:16:3e:00:00:05", "addresses": addresses}
    return {
        "id": _IDS[name],
        "name": name,
        "project": "blue",
        "upstream": "nova",
        "ports": [port],
    }


def _own(guest: Guest, answer: Reply) -> str | None:
    if (answer.status, answer.text) == (200, _IDS[guest.network]):
        return None
    return f"{guest.name} got {answer.status} {answer.body[:80]!r}"


@pytest.mark.parametrize("name", [*_KINDS, "namespace-proxy"])
@pytest.mark.parametrize("to", [IPV4, IPV6])
def test_each_guest_is_known_by_its_network_or_router(fronts: _Fronts, name: str, to: str) -> None:
    guest = fronts.guests[name]
    for source in (None,) if to == IPV4 else ("2001:db8::5", guest.link_local):
        fronts.agents.nova.forget()
        fronts.agents.nova.default = say_whose
        assert _own(guest, guest.ask("/openstack", to=to, source=source)) is None
        seen = fronts.agents.nova.only()
        assert seen.values("x-forwarded-for") == ((source or guest.addresses[0]).encode(),)


_NETWORK: Final = ("X-Neutron-Network-ID: isolated-too",)
_ROUTER: Final = ("X-Neutron-Router-ID: routed",)
_OVN: Final = ("X-OVN-Network-ID: ovn",)
_PEER: Final = ("X-Forwarded-For: 10.0.0.6",)
_REPLACED: Final = frozenset(
    (name, forged) for name in ("isolated", "routed") for forged in (_NETWORK, _ROUTER)
)
"""Neutron's proxies replace or delete what is theirs; whatever else a guest forges comes beside their own word."""


@pytest.mark.parametrize("name", ["isolated", "routed", "ovn"])
@pytest.mark.parametrize("forged", [_NETWORK, _ROUTER, _OVN, _PEER], ids=str)
def test_what_a_guest_forges_is_replaced_by_the_proxy_or_refused(
    fronts: _Fronts, name: str, forged: tuple[str, ...]
) -> None:
    guest = fronts.guests[name]
    spellings = (
        forged,
        tuple(one.lower() for one in forged),
        tuple(one.upper().replace("ROUTED", "routed") for one in forged),
        (*forged, *forged),
        ("Connection: " + forged[0].partition(":")[0], *forged),
    )
    for lines in spellings:
        answer = guest.ask("/openstack", headers=lines)
        if (name, forged) in _REPLACED:
            assert _own(guest, answer) is None
        else:
            assert answer.status == 400, lines
            assert b"exactly one" in answer.body


@pytest.mark.parametrize("name", ["isolated", "routed", "ovn"])
def test_what_a_guest_says_in_other_words_is_nothing(fronts: _Fronts, name: str) -> None:
    guest = fronts.guests[name]
    lines = [
        "X_Neutron_Network_ID: isolated-too",
        "X_OVN_Network_ID: ovn",
        "X_Forwarded_For: 10.0.0.6",
        f"X-Instance-ID: {_IDS['isolated-too']}",
        "X-Tenant-ID: x",
        "X-Instance-ID-Signature: x",
        "X-Metadata-Provider: x",
        "Forwarded: for=10.0.0.6",
        "X-Real-IP: 10.0.0.6",
    ]
    assert _own(guest, guest.ask("/openstack", headers=lines)) is None
    assert {name.lower() for name, _ in fronts.agents.nova.only().headers} == {
        *(b"host", b"x-forwarded-for", b"x-instance-id", b"x-instance-id-signature"),
        b"x-tenant-id",
    }


_TOKEN: Final = "/latest/api/token"
_TTL: Final = "X-aws-ec2-metadata-token-ttl-seconds: 60"
_FORWARDED_FOR: Final = (
    ("X-Forwarded-For: 1.2.3.4",),
    ("x-forwarded-for:",),
    ("X-FORWARDED-FOR: 10.0.0.5, 10.0.0.5",),
    ("X-Forwarded-For: a", "X-Forwarded-For: b"),
    ("Connection: X-Forwarded-For", "X-Forwarded-For: 1.2.3.4"),
)
_FORWARDED: Final = (
    "Forwarded: for=1.2.3.4",
    "X-Forwarded-Host: a",
    "X-Forwarded-Port: 1",
    "x-forwarded-for-ip4: a",
    "Via: 1.1 a",
    "Origin: http://a",
    "Referer: http://a",
    "Sec-Fetch-Site: same-origin",
)
_NOTHING: Final = ("X_Forwarded_For: 1.2.3.4", "X-Real-IP: 1.2.3.4", "X-Forwarded: a")


def _answers(fronts: _Fronts, target: str, *headers: str, method: str = "GET") -> list[int]:
    """The status by each way: our own listener, Neutron's proxies, our own proxy."""
    ways = (fronts.guests[name] for name in ("own", "isolated", "routed", "ovn", "namespace-proxy"))
    found = [guest.ask(target, method=method, headers=headers) for guest in ways]
    # Some clients take an error's text for a token.
    assert not any(one.body for one in found if one.status == 403)
    return [one.status for one in found]


@pytest.mark.parametrize(
    "target",
    [_TOKEN, f"{_TOKEN}/", "/latest/api/%74oken", "//latest/./api//token", "/2021-01-01/api/token"],
)
def test_a_token_request_that_was_forwarded_is_refused_by_each_way(
    fronts: _Fronts, target: str
) -> None:
    for lines in _FORWARDED_FOR:
        found = _answers(fronts, target, *lines, _TTL, method="PUT")
        assert found == [403] * 5, lines


def test_a_token_is_given_by_each_way_whatever_other_header_comes_with_the_request(
    fronts: _Fronts,
) -> None:
    for lines in ((), *((one,) for one in (*_FORWARDED, *_NOTHING))):
        assert _answers(fronts, _TOKEN, *lines, _TTL, method="PUT") == [200] * 5, lines
        assert _answers(fronts, "/openstack", *lines) == [200] * 5, lines


def test_each_way_refuses_what_was_forwarded_where_the_policy_says_so(fronts: _Fronts) -> None:
    daemon = fronts.agents.daemon
    settings = daemon.settings
    daemon.reconfigure({**settings, "policy": {"host": {"refuse_forwarded": True}}})
    try:
        assert _answers(fronts, "/openstack") == [200] * 5
        for one in _FORWARDED:
            assert _answers(fronts, "/openstack", one) == [403] * 5, one
            assert _answers(fronts, _TOKEN, one, _TTL, method="PUT") == [403] * 5, one
        for lines in _FORWARDED_FOR:
            # Neutron's proxies add their own: whose the request is can't be known from two.
            assert _answers(fronts, "/openstack", *lines) == [403, 400, 400, 400, 403], lines
    finally:
        daemon.reconfigure(settings)


def test_reloads_and_another_controller_lose_no_request(fronts: _Fronts) -> None:
    daemon = fronts.agents.daemon
    spare = fronts.agents.lab.namespace_network("spare")
    with Load([*fronts.guests.values()], "/openstack", _own, pause_s=0.01) as load:
        for _ in range(3):
            load.wait_answers(40)
            daemon.put([spare])
            load.wait_answers(40)
            daemon.remove_network("spare")
        fronts.agents.take_over(maxconn=500)
        load.wait_answers(40)
        daemon.kill_controller()
        load.wait_answers(40)
        daemon.start()
        load.wait_answers(40)
    assert load.report.lost == []
