"""Pauses between attempts to connect to a database, as python-ovs makes them."""

from itertools import pairwise

import pytest

from imdsproxy.host.python_ovs import import_library, plan_pauses

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")


def pauses(random: float) -> list[int]:
    """Of six attempts that fail, in milliseconds."""
    reconnect = import_library().reconnect.Reconnect(0)
    reconnect.set_backoff(*plan_pauses(random))
    reconnect.enable(0)
    now, found = 0, []
    for _ in range(7):
        while reconnect.run(now) != "connect":
            now += 1
        found.append(now)
        reconnect.connecting(now)
        reconnect.connect_failed(now, 111)
    return [after - before for before, after in pairwise(found)]


def test_pauses_double_up_to_some_seconds() -> None:
    assert pauses(0.0) == [1000, 2000, 4000, 8000, 8000, 8000]


def test_hosts_that_lost_a_server_at_one_moment_do_not_come_back_at_one_moment() -> None:
    several = [pauses(random) for random in (0.0, 0.25, 0.5, 0.999)]
    for attempts in zip(*several, strict=True):
        assert len(set(attempts)) == len(several)
