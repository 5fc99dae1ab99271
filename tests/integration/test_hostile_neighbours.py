"""What one guest has or had is worth nothing to another: tokens, and addresses that go from one to the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import pytest

from support.daemon import Daemon, user_data_of
from support.guest import Guest
from support.lab import Lab, RecordMapping, ip, until
from support.twins import Asker

pytestmark = pytest.mark.root

_NETWORKS: Final = ("red", "green", "blue", "grey", "black")
_NUMBERS: Final = range(100, 110)
_USER_DATA: Final = "/latest/user-data"
_TOKEN: Final = "/latest/api/token"


@dataclass(frozen=True, slots=True)
class _Neighbours:
    """Instances in several networks, the same addresses in each, and who asks for each.

    Attributes:
        askers: By the instance's id.
    """

    daemon: Daemon
    guests: Mapping[str, Guest]
    askers: Mapping[str, Asker]


def _name(network: str, number: int) -> str:
    return f"{network}-{number}"


def _record(name: str, ports: Sequence[Mapping[str, object]]) -> RecordMapping:
    return {
        "id": name,
        "name": name,
        "ports": list(ports),
        "user_data": user_data_of(name).decode(),
    }


def _port(network: str, number: int) -> Mapping[str, object]:
    # By address alone: a network's instances are one guest.
    return {"network": network, "addresses": [f"10.0.0.{number}"]}


@pytest.fixture(scope="module")
def neighbours() -> Iterator[_Neighbours]:
    with ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.close)
        daemon = Daemon(lab, {"policy": {"host": {"tokens": "required"}}})
        stack.callback(daemon.close)
        networks = [lab.namespace_network(name) for name in _NETWORKS]
        guests = {name: lab.guest(name) for name in _NETWORKS}
        for guest in guests.values():
            for number in _NUMBERS:
                ip("-n", guest.namespace, "address", "add", f"10.0.0.{number}/24", "dev", "eth0")
        daemon.start()
        everybody = [(network, number) for network in _NETWORKS for number in _NUMBERS]
        daemon.put(networks, [_record(_name(*one), [_port(*one)]) for one in everybody])
        until(lambda: daemon.status()["serving"] == len(networks), what="all networks' service")
        askers = {_name(*one): _asker(guests[one[0]], one[1]) for one in everybody}
        yield _Neighbours(daemon, guests, askers)
        for asker in askers.values():
            asker.close()


def _asker(guest: Guest, number: int) -> Asker:
    return Asker(lambda: guest.connect(source=f"10.0.0.{number}"))


def _token(asker: Asker) -> str:
    lines = ("X-aws-ec2-metadata-token-ttl-seconds: 600",)
    got = asker.ask(_TOKEN, method="PUT", headers=lines)
    assert got.status == 200, got
    return got.text


def _with(token: str) -> tuple[str, ...]:
    return (f"X-aws-ec2-metadata-token: {token}",)


def test_nobodys_token_is_worth_anything_to_any_other_of_fifty_instances(
    neighbours: _Neighbours,
) -> None:
    tokens = {name: _token(asker) for name, asker in neighbours.askers.items()}
    assert len(set(tokens.values())) == len(_NETWORKS) * len(_NUMBERS)
    wrong = []
    for name, asker in neighbours.askers.items():
        for owner, token in tokens.items():
            got = asker.ask(_USER_DATA, headers=_with(token))
            body = user_data_of(name) if owner == name else b""
            if (got.status, got.body) != (200 if owner == name else 401, body):
                wrong.append(f"{name} with the token of {owner}: {got}")
    assert not wrong
    assert all(asker.kept >= len(tokens) for asker in neighbours.askers.values())


def test_an_instances_own_token_is_worth_nothing_in_another_network(
    neighbours: _Neighbours,
) -> None:
    record = _record("twofold", [_port("red", 100), _port("green", 101)])
    neighbours.daemon.put(
        instances=[_record("red-100", []), _record("green-101", []), record],
    )
    try:
        red, green = neighbours.askers["red-100"], neighbours.askers["green-101"]
        token = _token(red)
        assert red.ask(_USER_DATA, headers=_with(token)).body == user_data_of("twofold")
        assert green.ask(_USER_DATA, headers=_with(token)).status == 401
        assert green.ask(_USER_DATA, headers=_with(_token(green))).status == 200
    finally:
        neighbours.daemon.remove_instance("twofold")
        neighbours.daemon.put(
            instances=[
                _record("red-100", [_port("red", 100)]),
                _record("green-101", [_port("green", 101)]),
            ]
        )
