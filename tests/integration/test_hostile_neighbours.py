"""What one guest has or had is worth nothing to another: tokens, and addresses that go from one to the other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Self

import pytest

from support.daemon import Daemon, user_data_of
from support.guest import Guest, Reply
from support.lab import Lab, RecordMapping, ip, until
from support.reloading import Reloads
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
    lab: Lab
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
        yield _Neighbours(daemon, lab, guests, askers)
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


# An address that goes from one instance to the other and back


@dataclass(slots=True)
class _Moving:
    """An address of red's, whose it is by turns, and one who reads from it all the time.

    Attributes:
        begun: How many moves have begun.
        done: How many have been acknowledged.
        wrong: What was read that nobody could be told at that time.
    """

    number: int
    guest: Guest
    begun: int = 0
    done: int = 0
    read: int = 0
    wrong: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    tokens: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name=f"moving-{self.number}")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()

    def owner(self, move: int) -> str:
        return f"{'ab'[move % 2]}-{self.number}"

    def records(self, move: int) -> list[RecordMapping]:
        """The two of which one has the address from a move on."""
        owner, other = self.owner(move), self.owner(move + 1)
        return [_record(other, []), _record(owner, [_port("red", self.number)])]

    def _run(self) -> None:
        asker = _asker(self.guest, self.number)
        # Tokens of both, by turns: at each time one of them is worth something.
        for token in itertools.cycle(self.tokens):
            if self._stop.wait(0.01):
                break
            before = self.done
            got = asker.ask(_USER_DATA, headers=_with(self.tokens[token]))
            owners = {self.owner(move) for move in range(before, self.begun + 1)}
            if not _is_right(got, token, owners):
                self.wrong.append(f"moves {before}..{self.begun}: {token}'s token got {got}")
            self.read += 1
        asker.close()


def _is_right(got: Reply, token: str, owners: set[str]) -> bool:
    """Whether whose token it is was told what it may be while the address is one of `owners`'."""
    if got.status == 200:
        return token in owners and got.body == user_data_of(token)
    # Between the two it is nobody's.
    return (got.status == 401 and owners != {token}) or (len(owners) > 1 and got.status == 404)


def _reload_twice(daemon: Daemon, spare: RecordMapping) -> None:
    """A network comes, and goes."""
    daemon.put([spare])
    daemon.remove_network(str(spare["id"]))


def _move_back(daemon: Daemon, moving: Sequence[_Moving]) -> None:
    for one in moving:
        for move in (0, 1):
            daemon.remove_instance(one.owner(move))
    numbers = [one.number for one in moving]
    daemon.put(instances=[_record(_name("red", one), [_port("red", one)]) for one in numbers])


_MOVES: Final = 1_000


def test_nothing_of_the_one_reaches_the_other_in_a_thousand_moves_of_addresses(
    neighbours: _Neighbours,
) -> None:
    """Over connections that are kept, in reloads too; each has a token, which is worth nothing after a move."""
    daemon, red = neighbours.daemon, neighbours.guests["red"]
    daemon.put(instances=[_record(_name("red", number), []) for number in _NUMBERS])
    moving = [_Moving(number, red) for number in _NUMBERS]
    kept = {one.number: neighbours.askers[_name("red", one.number)] for one in moving}
    before = sum(one.kept for one in kept.values())
    for move in (1, 0):
        daemon.put(instances=[record for one in moving for record in one.records(move)])
        for one in moving:
            one.tokens[one.owner(move)] = _token(kept[one.number])
    rounds = -(-_MOVES // len(moving))
    wrong = []
    with ExitStack() as stack:
        stack.callback(_move_back, daemon, moving)
        for one in moving:
            stack.enter_context(one)
        spare = neighbours.lab.namespace_network("spare")
        reloads = stack.enter_context(
            Reloads(partial(_reload_twice, daemon, spare), pause_s=0.5, each=2)
        )
        move = 0
        while move < rounds or reloads.number < 4:
            move += 1
            for one in moving:
                one.begun = move
            daemon.put(instances=[record for one in moving for record in one.records(move)])
            for one in moving:
                one.done = move
            for one in moving:
                owner = one.owner(move)
                for token, value in one.tokens.items():
                    got = kept[one.number].ask(_USER_DATA, headers=_with(value))
                    right = (200, user_data_of(owner)) if token == owner else (401, b"")
                    if (got.status, got.body) != right:
                        wrong.append(f"move {move}: {token}'s token got {got} of {owner}'s")
    assert not wrong + [one for each in moving for one in each.wrong]
    assert all(one.read > rounds for one in moving)
    assert sum(one.kept for one in kept.values()) - before > _MOVES
