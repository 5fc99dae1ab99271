from __future__ import annotations

import pytest

from imdsproxy.core.haproxy.runtime import (
    Load,
    Processes,
    ReloadOutcome,
    Version,
    parse_failure,
    parse_features,
    parse_load,
    parse_processes,
    parse_reload,
    parse_stat,
    parse_version,
)

# As HAProxy 3.0.11 prints it, with an old worker that still drains.
_SHOW_PROC = """\
#<PID>          <type>          <reloads>       <uptime>        <version>
4031            master          2 [failed: 1]   0d00h03m12s     3.0.11-1+deb13u5
# workers
4077            worker          0               0d00h00m02s     3.0.11-1+deb13u5
# old workers
4050            worker          1               0d00h01m02s     3.0.11-1+deb13u5
# programs

"""


def test_the_accepting_worker_is_told_from_those_that_drain() -> None:
    found = parse_processes(_SHOW_PROC)
    assert found == Processes(master=4031, worker=4077, draining=(4050,), reloads=2)
    assert found.workers == (4077, 4050)


def test_a_master_without_a_worker_has_none() -> None:
    found = parse_processes("#<PID> ...\n12 master 0 [failed: 0] 0d 3.0\n# workers\n# programs\n")
    assert found == Processes(master=12, worker=None)
    assert found.workers == ()


@pytest.mark.parametrize("text", ["", "Unknown command\n", "# workers\n4077 worker 0 0d 3.0\n"])
def test_without_a_master_there_is_nothing(text: str) -> None:
    assert parse_processes(text) is None


def test_the_load_of_a_worker_is_read_from_its_information() -> None:
    text = (
        "Name: HAProxy\nMaxconn: 8\nHard_maxconn: 8\nCurrConns: 7\nMaxconnReached: 3\nnode: a: b\n"
    )
    assert parse_load(text) == Load(connections=7, most=8, reached=3)
    assert parse_load(text.replace("CurrConns", "Other")) is None
    assert parse_load("Unknown command") is None


def test_a_reload_tells_success_and_its_log() -> None:
    assert parse_reload("Success=1\n--\n[NOTICE] up\n\n") == ReloadOutcome(True, "[NOTICE] up")
    assert parse_reload("Success=0\n--\n[ALERT] no\n") == ReloadOutcome(False, "[ALERT] no")


def test_an_answer_that_is_no_reload_counts_as_failed() -> None:
    assert not parse_reload("Permission denied\n").success


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HAProxy version 3.0.11-1+deb13u5 2026/11/18 - https://haproxy.org/", (3, 0)),
        ("HAProxy version 2.6.12-1 2023/12/16", (2, 6)),
        ("HAProxy version 3.3-dev2-abc 2026/01/01", (3, 3)),
    ],
)
def test_versions_compare_by_number(text: str, expected: tuple[int, int]) -> None:
    version = parse_version(text)
    assert version is not None
    assert (version.major, version.minor) == expected
    assert (version >= Version(3, 0)) == (expected >= (3, 0))


def test_something_else_has_no_version() -> None:
    assert parse_version("nginx version: nginx/1.26") is None


def test_features_are_those_with_a_plus() -> None:
    assert parse_features("x\nFeature list : -51DEGREES +NS +PROMEX -WURFL\ny") == {"NS", "PROMEX"}
    assert parse_features("") == frozenset()


def test_stat_rows_are_by_name() -> None:
    rows = parse_stat("# pxname,svname,stot,\nguests,red,5,\nguests,FRONTEND,6,\n\n")
    assert rows == [
        {"pxname": "guests", "svname": "red", "stot": "5"},
        {"pxname": "guests", "svname": "FRONTEND", "stot": "6"},
    ]
    assert parse_stat("Permission denied\n") == []


def test_of_statistics_only_the_columns_that_are_wanted_and_there_are_taken() -> None:
    text = "# pxname,svname,stot,dreq,\nguests,red,5,1,\nguests,cut\n"
    assert parse_stat(text, {"svname", "dreq", "nonsense"}) == [
        {"svname": "red", "dreq": "1"},
        {"svname": "cut"},
    ]


def test_a_failure_is_the_alerts_each_once_and_without_pids() -> None:
    output = (
        "[NOTICE]   (12) : haproxy version is 3.0.11\n"
        "[WARNING]  (12) : config : nothing of weight\n"
        "[ALERT]    (12) : Binding [a.conf:15] for proxy metadata: cannot bind socket\n"
        "[ALERT]    (12) : Binding [a.conf:15] for proxy metadata: cannot bind socket\n"
        "[ALERT]    (12) : [haproxy.main()] Exiting.\n"
    )
    assert parse_failure(output) == (
        "Binding [a.conf:15] for proxy metadata: cannot bind socket; [haproxy.main()] Exiting."
    )


def test_a_failure_without_alerts_is_all_of_the_output() -> None:
    assert parse_failure("haproxy: cannot run\n\n  because\n") == "haproxy: cannot run; because"
    assert parse_failure("") == ""
    assert parse_failure("[NOTICE] x\n[ALERT] unknown keyword") == "unknown keyword"
