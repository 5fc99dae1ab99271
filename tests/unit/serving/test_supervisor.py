from __future__ import annotations

from imdsproxy.serving.supervisor import restart_delay


def test_the_first_death_costs_no_time() -> None:
    assert restart_delay(0) == 0
    assert restart_delay(1) == 0


def test_further_deaths_cost_ever_more_up_to_a_bound() -> None:
    delays = [restart_delay(failures) for failures in range(2, 12)]
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays == sorted(delays)
    assert delays[-1] == restart_delay(10_000) == 5.0
