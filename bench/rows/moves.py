"""Addresses that move from one instance to another, and stale answers afterwards."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import dataclass, field

from bench.context import Bench
from bench.daemon import AdminConnection, Daemon
from bench.figures import Bar, Row, judge, median, percentile
from bench.guest import Guest
from bench.lab import guest, network_name
from bench.place import BenchError
from bench.records import instance
from bench.rows.changes import reloading

__all__ = ["is_stale", "measure_moves"]

_BAR = Bar("0", at_most=0.0)
_PATH = "/latest/meta-data/tags/instance/role"
_ADDRESSES = 10
_OWNERS = 25
_ADDRESS = 900
_RELOAD_EVERY_S = 1.0
_LIMIT_S = 150.0
_OK = 200


def is_stale(owner: int, acknowledged: int, begun: int, owners: int) -> bool:
    """Return whether an answer names an owner that had lost the address before the request.

    Args:
        owner: The owner that the answer names.
        acknowledged: Number of the last move that was acknowledged before the request.
        begun: Number of the last move that had begun when the answer was there.
        owners: Number of owners; after move `n` owner `n % owners` has the address.
    """
    return owner not in {number % owners for number in range(acknowledged, begun + 1)}


@dataclass(slots=True)
class _Moving:
    """One address of one network, and the answers to its guest."""

    network: str
    acknowledged: int = 0
    begun: int = 0
    answers: int = 0
    stale: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    took_ms: list[float] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def owner(self, number: int) -> str:
        return f"owner-{self.network}-{number % _OWNERS}"

    def record(self, number: int, *, has_it: bool) -> dict[str, object]:
        identity = self.owner(number)
        addresses = [guest(_ADDRESS)] if has_it else []
        return instance(
            identity, {self.network: addresses}, with_user_data=False, tag=str(number % _OWNERS)
        )


def measure_moves(bench: Bench, daemon: Daemon) -> Row:
    """Measure the row `stale`."""
    moving = [_Moving(network_name(number)) for number in range(_ADDRESSES)]
    daemon.put(
        instances=[
            one.record(number, has_it=number == 0) for one in moving for number in range(_OWNERS)
        ]
    )
    each = bench.scale.moves // _ADDRESSES
    watchers = [threading.Thread(target=_watch, args=(bench, one), daemon=True) for one in moving]
    began = time.monotonic()
    with reloading(bench.lab, daemon, _RELOAD_EVERY_S) as reloads:
        for thread in watchers:
            thread.start()
        movers = [
            threading.Thread(target=_move, args=(daemon, one, each, began + _LIMIT_S), daemon=True)
            for one in moving
        ]
        for thread in movers:
            thread.start()
        for thread in movers:
            thread.join()
        for one in moving:
            one.stop.set()
        for thread in watchers:
            thread.join()
    if reloads.failed:
        raise BenchError(f"reloads meanwhile: {reloads.failed[0]}")
    return _row(bench, moving, reloads.count)


def _move(daemon: Daemon, one: _Moving, count: int, deadline: float) -> None:
    with closing(daemon.admin()) as admin:
        for number in range(1, count + 1):
            if time.monotonic() > deadline:
                return
            one.begun = number
            began = time.perf_counter()
            try:
                _send(admin, one, number)
            except (BenchError, OSError) as error:
                one.other.append(f"move {number}: {error}")
                return
            one.took_ms.append((time.perf_counter() - began) * 1000)
            one.acknowledged = number
            answers = one.answers
            while one.answers < answers + 2 and time.monotonic() < deadline:
                time.sleep(0.0005)


def _send(admin: AdminConnection, one: _Moving, number: int) -> None:
    body = {"instances": [one.record(number - 1, has_it=False), one.record(number, has_it=True)]}
    answer = admin.ask("POST", "/v1/records", body)
    if answer["applied"] is not True:
        raise BenchError(f"not applied: {answer['pending']}")


def _watch(bench: Bench, one: _Moving) -> None:
    asking = Guest(bench.lab, one.network, guest(_ADDRESS))
    while not one.stop.is_set():
        acknowledged = one.acknowledged
        answer = asking.try_get(_PATH)
        begun = one.begun
        one.answers += 1
        if answer is None:
            one.other.append("no answer")
        elif answer.status != _OK:
            one.other.append(f"status {answer.status}")
        elif is_stale(int(answer.body), acknowledged, begun, _OWNERS):
            one.stale.append(f"{answer.body!r} after move {acknowledged}, before {begun + 1}")
    asking.close()


def _row(bench: Bench, moving: list[_Moving], reloads: int) -> Row:
    moves = sum(one.acknowledged for one in moving)
    answers = sum(one.answers for one in moving)
    stale = [text for one in moving for text in one.stale]
    other = [text for one in moving for text in one.other]
    took = [sample for one in moving for sample in one.took_ms]
    planned = _ADDRESSES * (bench.scale.moves // _ADDRESSES)
    if moves < planned or not reloads:
        raise BenchError(f"only {moves} of {planned} moves, {reloads} reloads; {other[:1]}")
    return Row(
        key="stale",
        what=f"stale answers over {moves:,} moves of an address, {reloads} reloads meanwhile",
        figure=(
            f"{len(stale)} of {answers:,} answers; {len(other)} were not 200; "
            f"a move p50 {median(took):.0f} ms, p99 {percentile(took, 99):.0f} ms"
        ),
        verdict=judge(len(stale), _BAR),
        bar=_BAR.text,
        value=len(stale),
        how=(
            f"{_ADDRESSES} addresses at once, a guest with a kept connection each; an answer is stale when its owner "
            "had lost the address by a move that was acknowledged before the request was sent"
        ),
        data={
            "moves": moves,
            "reloads": reloads,
            "answers": answers,
            "stale": stale[:20],
            "not_200": len(other),
            "not_200_first": other[:20],
            "move_ms": {"p50": median(took), "p99": percentile(took, 99)},
        },
    )
