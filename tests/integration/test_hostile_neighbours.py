"""An address that goes from one instance to another: nothing that the one has or had is worth anything to the other."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

import pytest

from support.daemon import Daemon, user_data_of
from support.guest import Asker, Background, Guest, Reply, take_token, with_token
from support.lab import Lab, RecordMapping, ip, until

pytestmark = pytest.mark.root

_NUMBERS: Final = range(100, 110)
_USER_DATA: Final = "/latest/user-data"


def _record(name: str, *numbers: int) -> RecordMapping:
    """An instance that has these addresses in `red`; by address alone, as all of them are one guest."""
    return {
        "id": name,
        "name": name,
        "ports": [{"network": "red", "addresses": [f"10.0.0.{one}"]} for one in numbers],
        "user_data": user_data_of(name).decode(),
    }


@dataclass
class _Moving(Background):
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
    tokens: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self._run)

    def owner(self, move: int) -> str:
        return f"{'ab'[move % 2]}-{self.number}"

    def records(self, move: int) -> list[RecordMapping]:
        """The two of which one has the address from a move on."""
        owner, other = self.owner(move), self.owner(move + 1)
        return [_record(other), _record(owner, self.number)]

    def asker(self) -> Asker:
        return Asker(lambda: self.guest.connect(source=f"10.0.0.{self.number}"))

    def _run(self) -> None:
        asker = self.asker()
        # Tokens of both, by turns: at each time one of them is worth something.
        for token in itertools.cycle(self.tokens):
            if self._stop.wait(0.01):
                break
            before = self.done
            got = asker.ask(_USER_DATA, headers=with_token(self.tokens[token]))
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


class _Reloads(Background):
    """HAProxy reloads again and again, as a network comes and goes; how often it did."""

    def __init__(self, daemon: Daemon, spare: RecordMapping) -> None:
        super().__init__(self._run)
        self._daemon, self._spare = daemon, spare
        self.done = 0

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            self._daemon.put([self._spare])
            self._daemon.remove_network(str(self._spare["id"]))
            self.done += 2


_MOVES: Final = 1_000


@pytest.mark.slow
def test_nothing_of_the_one_reaches_the_other_in_a_thousand_moves_of_addresses() -> None:
    """Over connections that are kept, in reloads too; each has a token, which is worth nothing after a move."""
    with ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.close)
        daemon = Daemon(lab, {"policy": {"host": {"tokens": "required"}}})
        stack.callback(daemon.close)
        network, red = lab.namespace_network("red"), lab.guest("red")
        for number in _NUMBERS:
            ip("-n", red.namespace, "address", "add", f"10.0.0.{number}/24", "dev", "eth0")
        daemon.start()
        moving = [_Moving(number, red) for number in _NUMBERS]
        daemon.put([network], [record for one in moving for record in one.records(0)])
        until(lambda: daemon.status()["serving"] == 1, what="the network's service")
        kept = {one.number: one.asker() for one in moving}
        for asker in kept.values():
            stack.callback(asker.close)
        for move in (1, 0):
            daemon.put(instances=[record for one in moving for record in one.records(move)])
            for one in moving:
                one.tokens[one.owner(move)] = take_token(kept[one.number])
        _move_all(daemon, moving, kept, lab.namespace_network("spare"))
    assert sum(asker.kept for asker in kept.values()) > _MOVES


def _move_all(
    daemon: Daemon, moving: Sequence[_Moving], kept: Mapping[int, Asker], spare: RecordMapping
) -> None:
    rounds = -(-_MOVES // len(moving))
    wrong = []
    with ExitStack() as stack, _Reloads(daemon, spare) as reloads:
        for one in moving:
            stack.enter_context(one)
        move = 0
        while move < rounds or reloads.done < 4:
            move += 1
            for one in moving:
                one.begun = move
            daemon.put(instances=[record for one in moving for record in one.records(move)])
            for one in moving:
                one.done = move
            for one in moving:
                owner = one.owner(move)
                for token, value in one.tokens.items():
                    got = kept[one.number].ask(_USER_DATA, headers=with_token(value))
                    right = (200, user_data_of(owner)) if token == owner else (401, b"")
                    if (got.status, got.body) != right:
                        wrong.append(f"move {move}: {token}'s token got {got} of {owner}'s")
    assert not wrong + [one for each in moving for one in each.wrong]
    assert all(one.read > rounds for one in moving)
