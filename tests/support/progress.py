"""Pytest plugin: with `--progress NAME`, print progress, each failure at once, and files over their budgets.

The seconds of each file are kept in the cache of pytest as `durations/NAME.json`, the longest first.
"""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import pytest

_EVERY_S: Final = 15.0
_BUDGETS: Final = {
    # Machines, packages and images are made anew: the tests prove that this works.
    "tests/e2e/": 340.0,
    # Agents of Neutron, daemons of OVN and fleets start and end in each of these.
    "tests/integration/": 200.0,
    "tests/": 60.0,
}
"""Seconds that the tests of one file may take together, on two processors that run four tests at once."""
_LONG: Final = ("tests/e2e/", "tests/integration/")
_LONG_WEIGHT: Final = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress", metavar="NAME", help="print progress instead of dots")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("progress")
    if name and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config, name), "progress-lines")


def over_budget(durations: dict[str, float]) -> list[str]:
    """Return a line for each file whose tests took longer than they may."""
    lines = []
    for file, seconds in durations.items():
        budget = next((most for start, most in _BUDGETS.items() if file.startswith(start)), 0.0)
        if seconds > budget > 0:
            lines.append(f"over its budget: {file}: {seconds:.0f} s of {budget:.0f} s")
    return lines


def share(ended: Sequence[str], expected: Sequence[str]) -> int:
    """Return how far a run is in percent; a test with genuine programs weighs more than others."""
    return 100 * _weight(ended) // max(_weight(expected), 1)


def _weight(names: Sequence[str]) -> int:
    return sum(_LONG_WEIGHT if name.startswith(_LONG) else 1 for name in names)


class Progress:
    """Printer of one run's progress, in the process that reports."""

    def __init__(self, config: pytest.Config, name: str) -> None:
        self._config = config
        self._name = name
        self._began = self._shown = time.monotonic()
        self._ended: list[str] = []
        self._durations = defaultdict[str, float](float)
        self._failed = 0
        self._expected: Sequence[str] = ()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._expected = [item.nodeid for item in session.items]

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._expected = ids

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Print no dot for a test that passed: failures have lines of their own."""
        return ("passed", "", "") if report.passed and report.when == "call" else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._durations[report.nodeid.partition("::")[0]] += report.duration
        if report.failed:
            self._failed += 1
            self._write(f"FAILED {report.nodeid} ({report.when}, {report.duration:.1f} s)")
            self._write(report.longreprtext.rstrip())
        if report.when == "teardown":
            self._ended.append(report.nodeid)
            now = time.monotonic()
            if now - self._shown >= _EVERY_S:
                self._shown = now
                self._write(self._line(now))

    def _line(self, now: float) -> str:
        minutes, seconds = divmod(int(now - self._began), 60)
        percent = share(self._ended, self._expected)
        failed = f", {self._failed} failed" if self._failed else ""
        tests = f"{len(self._ended)} of {len(self._expected)} tests"
        return f"{minutes}:{seconds:02} {percent} %: {tests}{failed}"

    def _write(self, text: str) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        assert isinstance(reporter, pytest.TerminalReporter)
        reporter.ensure_newline()
        reporter.write_line(text)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        longest = sorted(self._durations.items(), key=lambda one: -one[1])
        durations = {file: round(seconds, 1) for file, seconds in longest}
        cache = self._config.cache
        assert cache is not None
        kept = cache.mkdir("durations") / f"{self._name}.json"
        kept.write_text(json.dumps(durations, indent=1) + "\n")
        terminalreporter.write_line(f"seconds of each file: {kept}")
        for line in over_budget(durations):
            terminalreporter.write_line(line)
