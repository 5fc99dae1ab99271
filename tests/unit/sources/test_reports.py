from __future__ import annotations

from pathlib import Path

from imdsproxy.core.observation import Observation, RecordSet
from imdsproxy.errors import Problem
from imdsproxy.sources.api import Reports
from imdsproxy.sources.neutron.source import load_cache, open_cache
from support.fake_neutron import neutron_port
from support.record_builders import instance

A = instance("a", "10.0.0.5")
B = instance("b", "10.0.0.6")
ALL = RecordSet(instances={A.id: A, B.id: B})
CHANGED = RecordSet(instances={B.id: B})
GONE = RecordSet(instances_removed=(A.id,))
NOTHING = RecordSet()
PROBLEM = Problem("store", "is gone")


def _next(reports: Reports, changes: RecordSet, *problems: Problem) -> Observation | None:
    return reports.next(changes, lambda: ALL, in_sync=not problems, problems=problems)


def test_the_first_report_has_everything_and_the_next_ones_changes() -> None:
    reports = Reports("x", defers=True)
    first, second = _next(reports, CHANGED), _next(reports, CHANGED)
    assert first == Observation("x", full=True, instances=ALL.instances, defers=True)
    assert second == Observation("x", instances=CHANGED.instances, defers=True)
    assert _next(reports, GONE) == Observation("x", instances_removed=(A.id,), defers=True)


def test_what_was_reported_is_not_reported_again() -> None:
    reports = Reports("x")
    assert _next(reports, ALL) is not None
    assert _next(reports, NOTHING) is None
    assert _next(reports, NOTHING, PROBLEM) is not None
    assert _next(reports, NOTHING, PROBLEM) is None
    assert _next(reports, NOTHING) == Observation("x")


def test_a_report_out_of_sync_is_not_full_though_it_has_everything() -> None:
    reports = Reports("x")
    first = _next(reports, NOTHING, PROBLEM)
    assert first is not None
    assert (first.full, first.in_sync, first.instances) == (False, False, ALL.instances)
    second = _next(reports, NOTHING)
    assert second is not None
    assert (second.full, second.in_sync) == (True, True)


def test_what_a_cache_could_not_write_it_writes_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "there" / "cache.sqlite"
    (tmp_path / "there").write_text("no directory")
    first, second = (neutron_port(f"p-{n}", "n1", f"10.0.0.{n}") for n in (1, 2))
    cache = open_cache(path)
    cache.keep({first.id: first, second.id: first})
    cache.save()
    problem = cache.problem
    assert problem is not None
    assert problem.file == str(path)
    (tmp_path / "there").unlink()
    cache.keep({second.id: second})
    cache.save()
    assert cache.problem is None
    assert set(load_cache(open_cache(path)).ports) == {first, second}
