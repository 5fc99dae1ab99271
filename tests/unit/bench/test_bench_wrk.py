from __future__ import annotations

import pytest

from bench.wrk import parse_wrk

_REPORT = """Running 2s test @ http://169.254.169.254/latest/meta-data/instance-id
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.10ms    0.95ms  20.01ms   92.10%
    Req/Sec    59.31k     3.07k   64.02k    75.00%
  Latency Distribution
     50%    0.94ms
     75%    1.20ms
     90%    1.70ms
     99%  271.00us
  117897 requests in 2.00s, 17.54MB read
"""
_TROUBLE = """  Socket errors: connect 1, read 2, write 3, timeout 4
  Non-2xx or 3xx responses: 5
Requests/sec:  58934.36
"""


def test_a_report_without_trouble_is_read() -> None:
    report = parse_wrk(_REPORT)
    assert report is not None
    assert (report.requests, report.seconds, report.errors) == (117897, 2.0, 0)
    assert report.rate == pytest.approx(58948.5)
    assert report.p50_s == pytest.approx(0.00094)
    assert report.p99_s == pytest.approx(0.000271)


def test_every_kind_of_trouble_counts_as_an_error() -> None:
    report = parse_wrk(_REPORT + _TROUBLE)
    assert report is not None
    assert report.errors == 1 + 2 + 3 + 4 + 5


def test_a_run_of_more_than_a_minute_is_read_in_seconds() -> None:
    report = parse_wrk("  600 requests in 1.50m, 1.00MB read\n")
    assert report is not None
    assert report.seconds == pytest.approx(90)


def test_what_is_no_report_is_none() -> None:
    assert parse_wrk("unable to connect to 169.254.169.254:80 Connection refused\n") is None
