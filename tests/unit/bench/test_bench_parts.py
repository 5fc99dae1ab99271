from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bench.__main__ import ROWS, exit_status, parse_options
from bench.bare import Limits, answering, forwarding, render_bare, worker_limits
from bench.daemon import render_settings
from bench.figures import Row, Verdict
from bench.guest import Broken, parse_head
from bench.lab import guest
from bench.place import BenchError, mounts_below, prepare
from bench.records import USER_DATA_BYTES, first_guest, instance, network, user_data
from bench.rows.moves import is_stale
from imdsproxy.config.schema import Settings
from imdsproxy.core.haproxy.config import render_config
from imdsproxy.core.haproxy.model import Limits as OurLimits
from imdsproxy.core.records import Refused, parse_instance, parse_network
from support.haproxy_config import SPEC


def _rows(*verdicts: Verdict) -> list[Row]:
    return [Row(key, "", "", verdict) for key, verdict in zip(("a", "b"), verdicts, strict=False)]


_BOTH = frozenset({"a", "b"})


def test_a_missed_bar_is_an_error_only_when_asked_to_be_strict() -> None:
    rows = _rows(Verdict.PASS, Verdict.SHORT)
    assert exit_status(rows, _BOTH, strict=False) == 0
    assert exit_status(rows, _BOTH, strict=True) == 1


def test_a_row_that_could_not_be_measured_is_always_an_error() -> None:
    assert exit_status(_rows(Verdict.PASS, Verdict.MISSING), _BOTH, strict=False) == 2
    assert exit_status(_rows(Verdict.PASS), _BOTH, strict=False) == 2


def test_a_ratio_that_says_nothing_is_told_and_no_error() -> None:
    assert exit_status(_rows(Verdict.PASS, Verdict.INVALID), _BOTH, strict=True) == 0


def test_only_the_rows_that_were_asked_for_are_wanted() -> None:
    assert parse_options(["--only", "stale, memory"]).only == {"stale", "memory"}
    assert parse_options(["--peer", "/x"]).only == frozenset(ROWS)


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(["--only", "nonsense"])
    assert ended.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_the_baseline_takes_its_limits_from_a_configuration_of_ours() -> None:
    limits = OurLimits(nbthread=3, maxconn=5000, maxconn_per_network=77)
    spec = replace(SPEC, limits=limits, exporter="127.0.0.1:9466")
    assert worker_limits(render_config(spec)) == Limits(3, 5000, 77)


def test_a_configuration_without_limits_is_no_baseline() -> None:
    with pytest.raises(BenchError):
        worker_limits("global\n  nbthread 1\n")


def test_the_baseline_answers_with_a_body_of_the_same_size() -> None:
    config = render_bare(Limits(1, 4096, 200), ["169.254.169.254:80 namespace n"], answering(19))
    assert "  bind 169.254.169.254:80 namespace n proto h1 maxconn 200\n" in config
    assert f"string {'x' * 19}\n" in config
    assert "  nbthread 1\n  maxconn 4096\n" in config


def test_the_forwarding_baseline_sets_headers_and_reuses_connections() -> None:
    assert forwarding("127.0.0.1:1", [("a", "b")]) == (
        "http-request set-header a b",
        "http-reuse always",
        "server upstream 127.0.0.1:1",
    )


def test_the_settings_of_the_daemon_are_valid_and_its_own() -> None:
    text = render_settings(Path("/srv/.bench/x"), {"haproxy": {"cache_mb": 8}})
    settings = Settings.model_validate(yaml.safe_load(text), strict=False)
    assert settings.paths.runtime_dir == Path("/srv/.bench/x/run")
    assert settings.haproxy.cache_mb == 8
    assert settings.haproxy.supervisor == "spawn"
    assert settings.host.name_prefix == "imdsb"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 19", (200, 19, False)),
        (b"HTTP/1.1 503 Service Unavailable\r\nConnection: close", (503, 0, True)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: keep-alive", (200, 4, False)),
    ],
)
def test_the_head_of_an_answer_is_read(head: bytes, expected: tuple[int, int, bool]) -> None:
    assert parse_head(head) == expected


def test_what_is_no_answer_is_broken() -> None:
    with pytest.raises(Broken):
        parse_head(b"SSH-2.0-x")


def test_an_answer_from_before_an_acknowledged_move_is_stale() -> None:
    assert is_stale(3, acknowledged=4, begun=4, owners=25)
    assert not is_stale(4, acknowledged=4, begun=4, owners=25)


def test_while_a_move_is_under_way_both_owners_are_right() -> None:
    assert not is_stale(4, acknowledged=4, begun=5, owners=25)
    assert not is_stale(5, acknowledged=4, begun=5, owners=25)
    assert is_stale(6, acknowledged=4, begun=5, owners=25)


def test_owners_take_turns() -> None:
    assert not is_stale(0, acknowledged=24, begun=25, owners=25)
    assert is_stale(1, acknowledged=24, begun=25, owners=25)


def test_user_data_has_the_size_that_is_promised() -> None:
    assert len(user_data().encode()) == USER_DATA_BYTES
    assert user_data().startswith("#!/bin/sh\n")


def test_all_records_are_acceptable() -> None:
    assert not isinstance(parse_network(network("imdsb-1")), Refused)
    assert not isinstance(parse_instance(first_guest("imdsb-1")), Refused)
    many = instance("many", {"imdsb-1": [guest(one) for one in range(20)]}, with_user_data=False)
    assert not isinstance(parse_instance(many), Refused)


def test_only_mounts_of_the_directory_are_swept_the_innermost_first() -> None:
    mountinfo = "\n".join(
        f"36 35 98:0 / {point} rw,noatime - tmpfs x rw"
        for point in ("/", "/b/.bench/x/run", "/b/.bench/x/run/jail", "/b/.bench2", "/b")
    )
    assert mounts_below(Path("/b/.bench"), mountinfo) == [
        Path("/b/.bench/x/run/jail"),
        Path("/b/.bench/x/run"),
    ]


def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(BenchError, match="not empty"):
        prepare(tmp_path)
    assert (tmp_path / "thesis").read_text() == "mine"


def test_what_an_earlier_run_left_is_emptied(tmp_path: Path) -> None:
    directory = tmp_path / "bench"
    prepare(directory)
    (directory / "old").touch()
    prepare(directory)
    assert not (directory / "old").exists()
