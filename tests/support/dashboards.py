"""What a dashboard of Grafana asks Prometheus, and how its panels lie."""

from collections import Counter
from collections.abc import Iterator
from typing import Any


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
