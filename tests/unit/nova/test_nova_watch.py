from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from structlog.testing import capture_logs

from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.nova.upstream import NovaEndpointReport, NovaWatch

_ONE = "192.0.2.1:8775"
_TWO = "192.0.2.2:8775"


def _row(
    proxy: str,
    server: str = _ONE,
    status: str = "UP",
    *,
    good: int = 0,
    requests: int = 0,
    failed: int = 0,
    kind: str = "2",
) -> dict[str, str]:
    return {
        "pxname": proxy,
        "svname": server,
        "type": kind,
        "status": status,
        "check_status": "L4CON",
        "last_chk": "Connection refused",
        "stot": str(requests),
        "hrsp_2xx": str(good),
        "econ": str(failed),
        "eresp": "",
    }


def _watch(names: Iterable[str] = ("default",)) -> NovaWatch:
    return NovaWatch(cast("Haproxy", None), lambda: names)


def _look(
    watch: NovaWatch,
    rows: Iterable[Mapping[str, str]],
    *,
    refused: int = 0,
    worker: int = 7,
) -> list[str]:
    with capture_logs() as logs:
        watch.take(worker, ["default"], list(rows), {"default": refused})
    return [entry["event"] for entry in logs]


def test_each_endpoint_is_listed_once_with_all_its_backends_added_up() -> None:
    watch = _watch()
    _look(
        watch,
        [
            _row("documents", "documents-0"),
            _row("documents.checked", "documents-0"),
            _row("documents.sampled", "documents-0"),
            _row("nova.default", "BACKEND", kind="1"),
            _row("nova.default", requests=5),
            _row("nova.default", _TWO, "DOWN", failed=2),
            _row("nova.default.once", requests=3),
            _row("nova.default.checked", requests=4),
            _row("nova.default.once.checked", requests=1),
            _row("nova.default.sampled", requests=2, failed=1),
            _row("nova.default.once", _TWO, "DOWN"),
            _row("nova.default.hop.192.0.2.1:8775"),
        ],
    )
    assert watch.endpoints == (
        NovaEndpointReport("default", _ONE, True, "", 15, 1),
        NovaEndpointReport("default", _TWO, False, "L4CON Connection refused", 0, 2),
    )
    assert watch.problems == ()


def test_no_endpoint_that_answers_is_a_problem() -> None:
    watch = _watch()
    _look(watch, [_row("nova.default", status="DOWN"), _row("nova.default", _TWO, "DOWN 1/2")])
    assert [problem.field for problem in watch.problems] == ["nova.endpoint_sets.default.endpoints"]
    for status in ("UP", "UP 1/2", "no check"):
        _look(watch, [_row("nova.default", status=status)])
        assert watch.endpoints[0].up


def test_a_refused_signature_is_told_once_and_not_for_each_request() -> None:
    watch = _watch()
    rows = [_row("nova.default")]
    assert _look(watch, rows) == []
    assert _look(watch, rows, refused=3) == ["nova refuses our signature"]
    assert _look(watch, rows, refused=500) == []
    assert _look(watch, rows, refused=500) == []
    (problem,) = watch.problems
    assert problem.field == "nova.endpoint_sets.default.secret_file"
    assert watch.refused.totals == {"default": 500}


def test_it_is_over_when_nova_has_answered_well_and_may_come_again() -> None:
    watch = _watch()
    _look(watch, [_row("nova.default")], refused=3)
    assert _look(watch, [_row("nova.default", good=4)], refused=3) == [
        "nova takes our signature again"
    ]
    assert watch.problems == ()
    assert _look(watch, [_row("nova.default", good=4)], refused=4) == ["nova refuses our signature"]
    # Of two, one that refuses is enough.
    assert _look(watch, [_row("nova.default", good=8)], refused=5) == []
    assert watch.problems


def test_counters_that_begin_again_with_a_new_worker_are_added_up() -> None:
    watch = _watch()
    rows = [_row("nova.default")]
    _look(watch, rows, refused=3)
    _look(watch, rows, refused=1, worker=8)
    _look(watch, rows, refused=2, worker=8)
    assert watch.refused.totals == {"default": 5}
