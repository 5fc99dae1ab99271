"""What a dashboard of Grafana asks Prometheus, and how its panels lie."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from support.lab import until
from support.prometheus import Prometheus


def queries_of(of: Any) -> Iterator[str]:
    """Every query of a dashboard, wherever it is."""
    if isinstance(of, dict):
        yield from (value for key, value in of.items() if key == "expr")
        of = list(of.values())
    if isinstance(of, list):
        for each in of:
            yield from queries_of(each)


def filled_in(query: str) -> str:
    """With its variables as Grafana has them for all hosts and fleets."""
    everything = query.replace("$instance", ".*").replace("$job", ".*")
    filled = everything.replace("$__rate_interval", "10s")
    assert "$" not in filled
    return filled


def without_data(board: Any, prometheus: Prometheus, *, within_s: float) -> set[str]:
    """Queries of a dashboard that have no series, though they were waited for."""
    queries = {filled_in(one) for one in queries_of(board["panels"])}
    assert len(queries) > 20
    empty: set[str] = set()

    def filled() -> bool:
        empty.clear()
        empty.update(one for one in queries if not prometheus.query(one))
        return not empty

    with contextlib.suppress(AssertionError):
        until(filled, within_s=within_s, pause_s=0.5)
    return empty


def layout_faults(board: Any) -> list[str]:
    """Ids that panels share, and places that they cover twice."""
    places = [one["gridPos"] for one in board["panels"]]
    taken = Counter(
        f"{one['x'] + right},{one['y'] + down}"
        for one in places
        for right in range(one["w"])
        for down in range(one["h"])
    )
    ids = Counter(f"id {one['id']}" for one in board["panels"])
    return [what for what, count in (taken + ids).items() if count > 1]
