from __future__ import annotations

from imdsproxy.admin.figures import TrafficCounter
from imdsproxy.admin.snapshot import NetworkTraffic


def _row(network: str, requests: int, denied: int = 0, errors: int = 0) -> dict[str, str]:
    return {
        "pxname": "guests",
        "svname": network,
        "type": "3",
        "stot": str(requests),
        "dreq": str(denied),
        "ereq": str(errors),
    }


def test_both_families_of_a_network_are_one_sum() -> None:
    counter = TrafficCounter()
    counter.add(1, [_row("red", 5, 1), _row("red", 2, 0, 3), _row("blue", 1)])
    assert counter.totals == {"red": NetworkTraffic(7, 1, 3), "blue": NetworkTraffic(1)}


def test_the_same_worker_again_is_counted_once() -> None:
    counter = TrafficCounter()
    counter.add(1, [_row("red", 5)])
    counter.add(1, [_row("red", 8)])
    assert counter.totals["red"] == NetworkTraffic(8)


def test_a_new_worker_begins_at_zero_and_the_sum_never_falls() -> None:
    counter = TrafficCounter()
    counter.add(1, [_row("red", 5), _row("blue", 4)])
    counter.add(2, [_row("red", 1)])
    counter.add(2, [_row("red", 3)])
    assert counter.totals == {"red": NetworkTraffic(8), "blue": NetworkTraffic(4)}


def test_other_proxies_and_lines_are_left_alone() -> None:
    counter = TrafficCounter()
    frontend = {**_row("FRONTEND", 9), "type": "0"}
    counter.add(1, [frontend, {**_row("x", 9), "pxname": "probe"}, {**_row("red", 0), "stot": ""}])
    assert counter.totals == {"red": NetworkTraffic(0)}


def test_neutrons_proxies_are_counted_apart_from_a_network_of_that_name() -> None:
    rows = [_row("agents", 5), {**_row("agents", 7, 2, 1), "pxname": "agents"}]
    guests, agents = TrafficCounter(), TrafficCounter(("agents",))
    for counter in (guests, agents):
        counter.add(1, rows)
    assert guests.totals == {"agents": NetworkTraffic(5)}
    assert agents.totals == {"agents": NetworkTraffic(7, 2, 1)}
