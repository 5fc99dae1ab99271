"""Nova as HAProxy sees it: which endpoints answer, and whether Nova accepts our signature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from imdsproxy.core.haproxy.nova import refused_counter, set_of_backend
from imdsproxy.core.haproxy.runtime import WorkerTotals
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.dataplane.master import WorkerEnded
from imdsproxy.errors import DataplaneError, Problem

_COLUMNS: Final = frozenset(
    [
        "pxname",
        "svname",
        "type",
        "status",
        "last_chk",
        "check_status",
        "stot",
        "hrsp_2xx",
        "econ",
        "eresp",
        "hrsp_5xx",
    ]
)
_SERVER: Final = "2"


@dataclass(frozen=True, slots=True)
class NovaEndpointReport:
    """One address of one of Nova's metadata APIs, as HAProxy sees it.

    Attributes:
        endpoint: `ADDRESS:PORT`.
        reason: Why it is not up.
        requests: Sent there by the worker that runs now.
        failures: Of these, without an answer.
    """

    endpoint_set: str
    endpoint: str
    up: bool
    reason: str = ""
    requests: int = 0
    failures: int = 0


@dataclass(slots=True)
class NovaWatch:
    """Reads HAProxy's counters from time to time.

    A Nova that refuses our signature answers 403 to every request of its guests: that is logged once, and
    again only after it was well in between.

    Args:
        sets: The names of the endpoint sets in force.

    Attributes:
        endpoints: As of the last look.
        refused: Answers 403 of each endpoint set, since the controller knows it.
    """

    haproxy: Haproxy
    sets: Callable[[], Iterable[str]]
    endpoints: tuple[NovaEndpointReport, ...] = ()
    refused: WorkerTotals[str] = field(default_factory=WorkerTotals)
    _good: WorkerTotals[str] = field(default_factory=WorkerTotals)
    _refusing: set[str] = field(default_factory=set)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The sets whose Nova refuses our signature now, and those of which no endpoint answers."""
        return (
            *(_refused(name) for name in sorted(self._refusing)),
            *(_silent(name) for name in sorted(self._silent())),
        )

    async def refresh(self) -> None:
        """Look once; while HAProxy does not answer, what was seen last stays."""
        names = sorted(self.sets())
        processes = self.haproxy.processes
        if not names or processes is None or processes.worker is None:
            self.endpoints = ()
            return
        worker, master = processes.worker, self.haproxy.master
        try:
            rows = await master.read_stat(worker, _COLUMNS)
            refused = {
                name: await master.read_number(worker, refused_counter(name)) for name in names
            }
        except (DataplaneError, WorkerEnded):
            return
        self.take(worker, names, rows, refused)

    def take(
        self,
        worker: int,
        names: Iterable[str],
        rows: Iterable[Mapping[str, str]],
        refused: Mapping[str, int | None],
    ) -> None:
        """Take in one worker's rows of `show stat` and its counts of 403."""
        before, well = Counter(self.refused.totals), Counter(self._good.totals)
        self.refused.add(
            worker, {one: count for one, count in refused.items() if count is not None}
        )
        found: dict[tuple[str, str], NovaEndpointReport] = {}
        good: Counter[str] = Counter()
        for row in rows:
            name = set_of_backend(row["pxname"])
            if name is None or row["type"] != _SERVER:
                continue
            good[name] += _number(row, "hrsp_2xx")
            # A set has a backend for each way in which its requests are looked at and sent again.
            report = _endpoint(name, row)
            before_it = found.get((name, report.endpoint))
            found[name, report.endpoint] = report if before_it is None else _sum(before_it, report)
        self.endpoints = tuple(found.values())
        self._good.add(worker, good)
        for name in names:
            more = self.refused.totals[name] - before[name]
            self._note(name, refuses=more > 0, well=self._good.totals[name] > well[name])

    def _note(self, name: str, *, refuses: bool, well: bool) -> None:
        log = structlog.get_logger()
        if refuses and name not in self._refusing:
            self._refusing.add(name)
            problem = _refused(name)
            log.warning("nova refuses our signature", endpoint_set=name, hint=problem.hint)
        elif well and not refuses and name in self._refusing:
            self._refusing.discard(name)
            log.info("nova takes our signature again", endpoint_set=name)

    def _silent(self) -> set[str]:
        answering = {one.endpoint_set for one in self.endpoints if one.up}
        return {one.endpoint_set for one in self.endpoints} - answering


def _endpoint(name: str, row: Mapping[str, str]) -> NovaEndpointReport:
    status = row["status"]
    reason = " ".join(word for word in (row["check_status"].lstrip("* "), row["last_chk"]) if word)
    return NovaEndpointReport(
        endpoint_set=name,
        endpoint=row["svname"],
        up=status.startswith(("UP", "no check")),
        reason="" if status.startswith("UP") else reason,
        requests=_number(row, "stot"),
        failures=_number(row, "econ") + _number(row, "eresp"),
    )


def _sum(one: NovaEndpointReport, other: NovaEndpointReport) -> NovaEndpointReport:
    requests, failures = one.requests + other.requests, one.failures + other.failures
    return replace(one, requests=requests, failures=failures)


def _refused(name: str) -> Problem:
    return Problem(
        f"nova.endpoint_sets.{name}.secret_file",
        "Nova refuses our signature (403): its guests get no metadata",
        "put the secret of Nova's `[neutron] metadata_proxy_shared_secret` into the file, then run `imdsproxy reload`",
    )


def _silent(name: str) -> Problem:
    return Problem(
        f"nova.endpoint_sets.{name}.endpoints",
        "no endpoint answers: its guests get 503",
        "start nova-api-metadata, or correct the URLs",
    )


def _number(row: Mapping[str, str], name: str) -> int:
    text = row.get(name, "")
    return int(text) if text.isdigit() else 0
