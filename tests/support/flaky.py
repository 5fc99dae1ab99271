"""A pytest plugin: with `--last-failed`, name the tests that pass only the second time, and bear few of them."""

from typing import Final

import pytest

_LIMIT: Final = "flaky_limit"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--flaky-limit",
        dest=_LIMIT,
        type=int,
        metavar="N",
        help="what passes in this run is flaky, since it failed in the last: fail when N tests do",
    )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    limit = session.config.getoption(_LIMIT)
    if (
        exitstatus == pytest.ExitCode.OK
        and limit is not None
        and len(_flaky(session.config)) >= limit
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    limit = config.getoption(_LIMIT)
    if limit is not None and (flaky := _flaky(config)):
        terminalreporter.section(f"{len(flaky)} flaky; {limit} fail the run")
        for name in flaky:
            terminalreporter.line(f"FLAKY {name}")


def _flaky(config: pytest.Config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    assert isinstance(reporter, pytest.TerminalReporter)
    spoilt = {one.nodeid for kind in ("failed", "error") for one in reporter.stats.get(kind, ())}
    passed = {one.nodeid for one in reporter.stats.get("passed", ())}
    return sorted(passed - spoilt)
