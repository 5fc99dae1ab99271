"""HAProxy's alerts in the journal before it ended."""

from __future__ import annotations

import pytest

from imdsproxy.dataplane.launch import find_alerts

_UNIT = "imdsproxy-haproxy.service"
_STARTING = f"Starting {_UNIT} - imdsproxy: HAProxy, answering every guest..."


def _journal(*lines: str) -> str:
    return "\n".join(lines)


def test_the_last_starts_alerts_are_told_without_pids_and_once() -> None:
    journal = _journal(
        _STARTING,
        "[ALERT]    (10) : config : an older reason",
        _STARTING,
        "[NOTICE]   (20) : New worker (21) forked",
        "[ALERT]    (21) : Binding for frontend exporter: cannot bind",
        "[ALERT]    (20) : Binding for frontend exporter: cannot bind",
        "[ALERT]    (20) : [haproxy.main()] Some protocols failed to start",
    )

    assert find_alerts(journal, _UNIT) == (
        "Binding for frontend exporter: cannot bind; "
        "[haproxy.main()] Some protocols failed to start"
    )


def test_a_start_that_has_said_nothing_yet_leaves_the_word_to_the_one_before() -> None:
    journal = _journal(_STARTING, "[ALERT]    (10) : the reason", _STARTING)

    assert find_alerts(journal, _UNIT) == "the reason"


def test_the_word_starting_in_an_alert_parts_nothing() -> None:
    journal = _journal(_STARTING, "[ALERT]    (10) : Starting frontend guests: cannot bind")

    assert find_alerts(journal, _UNIT) == "Starting frontend guests: cannot bind"


@pytest.mark.parametrize(
    "journal", ["", "-- No entries --", _journal(_STARTING, "[NOTICE] (1) : x")]
)
def test_a_journal_without_alerts_gives_nothing(journal: str) -> None:
    assert find_alerts(journal, _UNIT) == ""
