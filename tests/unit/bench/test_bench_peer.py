from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from bench.__main__ import WITH_PEER, parse_options
from bench.peer import (
    AGENT,
    OVN,
    parse_burst,
    parse_load,
    parse_scale,
    parse_slow,
    parse_southbound,
    peer_at,
    running,
)
from bench.place import BenchError

_WHOLE = {"whole_restart_to_all_200_s": 16.9, "spawn_to_all_200_s": 14.5}
_FOUND: dict[str, object] = {
    "load": {"cells": {AGENT: {"keepalive_c64": {"ok_rps": 707.0}}}},
    "slow_nova": {"cells": {OVN: {"keepalive_c64": {"ok_rps": 40.7}}}},
    "ovn_real_ports": {"1000": {"ok_rps": 69.5}},
    "burst": {
        one: {"n256": {"ok_share": share}}
        for one, share in (("ovs_w1", 0.675), ("ovn_default", 0.107), (AGENT, 1), (OVN, 1.0))
    },
    "scale": {
        "500": {
            "memory": {"pss_kb_sum": 2000},
            "agent_mem": {"pss_kb": 100},
            "raw_spawn_width1": _WHOLE,
            "raw_spawn_width2": {"whole_restart_to_all_200_s": 11.0, "spawn_to_all_200_s": 7.7},
            "neutron_driver": {"restart_to_all_200_s": 19.5},
            "agent_only_restart_to_200_s": 1.5,
        }
    },
}


def _harness(directory: Path, script: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "run.sh").write_text(script)
    return directory


def test_what_the_peer_found_is_read() -> None:
    assert parse_load(_FOUND, AGENT) == 707.0
    assert parse_slow(_FOUND, OVN) == 40.7
    assert parse_southbound(_FOUND) == 69.5
    assert parse_burst(_FOUND).shares["ovn_default"] == 0.107


def test_the_peer_is_taken_at_its_best_and_with_its_agent() -> None:
    scale = parse_scale(_FOUND, 500)
    assert scale.pss == 2100 * 1024
    assert (scale.whole_s, scale.proxies_s) == (11.0, 7.7)
    assert scale.whole_by_driver_s == 21.0


@pytest.mark.parametrize("found", [{}, [], {"load": {"cells": {AGENT: None}}}])
def test_a_result_without_the_figure_says_which_is_missing(found: object) -> None:
    with pytest.raises(BenchError, match=r"load\.cells"):
        parse_load(found, AGENT)


def test_the_harness_gets_its_options_and_its_json_is_the_result(tmp_path: Path) -> None:
    script = 'while [ $# -gt 1 ]; do shift; done\nprintf "%s" "{\\"a\\": 1}" > "$1"\n'
    peer = peer_at(_harness(tmp_path / "peer", script), tmp_path, print)
    assert peer.run(["--skip", "load"]) == {"a": 1}


def test_a_harness_that_fails_says_why_in_its_own_words(tmp_path: Path) -> None:
    peer = peer_at(
        _harness(tmp_path / "peer", "echo no neutron here >&2\nexit 3\n"), tmp_path, print
    )
    with pytest.raises(BenchError, match=r"\(3\): no neutron here"):
        peer.run([])


def test_a_result_of_an_earlier_run_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "peer.json").write_text(json.dumps(_FOUND))
    peer = peer_at(_harness(tmp_path / "peer", "exit 0\n"), tmp_path, print)
    with pytest.raises(BenchError):
        peer.run([])


class _StoppedError(Exception):
    pass


def test_a_run_that_is_stopped_stops_the_harness_and_lets_it_clean_up(tmp_path: Path) -> None:
    script = f"""trap 'touch {tmp_path}/cleaned; exit 0' TERM
echo $$ > {tmp_path}/pid.part && mv {tmp_path}/pid.part {tmp_path}/pid
while :; do sleep 0.05; done
"""
    directory = _harness(tmp_path / "peer", script)

    argv = ["bash", str(directory / "run.sh")]
    with pytest.raises(_StoppedError):
        _stop_when_it_runs(argv, tmp_path / "pid")
    assert (tmp_path / "cleaned").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def _stop_when_it_runs(argv: list[str], pid_file: Path) -> None:
    with running(argv, output=2):
        deadline = time.monotonic() + 20
        while not pid_file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise _StoppedError


def test_a_directory_without_a_harness_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"run\.sh"):
        peer_at(tmp_path, tmp_path, print)


def test_rows_beside_the_peer_are_left_out_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert not set(WITH_PEER) & parse_options([]).only
    assert set(WITH_PEER) <= parse_options(["--peer", "/x"]).only
    with pytest.raises(SystemExit):
        parse_options(["--only", "peer-agent"])
    assert "--peer DIR is needed for peer-agent" in capsys.readouterr().err
