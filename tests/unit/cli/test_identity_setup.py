"""`identity setup`: recipes with the values of a site, and the script of one part."""

import subprocess
from pathlib import Path
from typing import Final

import pytest
import yaml

from imdsproxy.config.load import load_settings
from support.commands import Command, run_command

_ISSUER: Final = "https://id.cloud.example"
_PROJECT: Final = "11111111111111111111111111111111"
_VERIFIERS: Final = ("keystone", "openbao", "vault", "kubernetes", "rgw", "haproxy")


def _setup(directory: Path, *words: str, **settings: object) -> Command:
    config = directory / "imdsproxy.yaml"
    config.write_text(yaml.safe_dump({"identity": {"issuer": _ISSUER}, **settings}))
    arguments = ("--config", str(config), "identity", "setup", *words)
    return run_command(arguments, environment={"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"})


@pytest.mark.parametrize("verifier", _VERIFIERS)
def test_a_recipe_is_a_script_with_the_values_of_the_site(tmp_path: Path, verifier: str) -> None:
    url = "https://verifier.example:8443"
    done = _setup(tmp_path, verifier, "--project", _PROJECT, "--url", url)
    assert done.status == 0, done
    for value in ("id.cloud.example", _PROJECT, url):
        assert value in done.out, value
    assert "0123456789abcdef" not in done.out
    subprocess.run(["/bin/bash", "-n"], input=done.out, text=True, check=True)


@pytest.mark.parametrize("verifier", _VERIFIERS)
def test_each_part_is_printed_alone(tmp_path: Path, verifier: str) -> None:
    whole = _setup(tmp_path, verifier).out
    parts = [line.split()[1].rstrip(":") for line in whole.splitlines() if line.startswith("## ")]
    assert {"host", "guest"} < set(parts) <= {"server", "admin", "host", "guest"}
    for part in parts:
        script = _setup(tmp_path, verifier, "--part", part).out
        assert (script in whole, script.startswith("##")) == (True, False)


def test_the_host_s_part_keeps_the_audiences_that_the_project_has(tmp_path: Path) -> None:
    own = {"audiences": ["*", "vault"]}
    policy = {"projects": {_PROJECT: own}, "host": {"audiences": ["rgw"]}}
    words = ("openbao", "--project", _PROJECT, "--part", "host")
    text = _setup(tmp_path, *words, policy=policy).out.partition("END'\n")[2].partition("END\n")[0]
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/own.yaml").write_text(text)
    read = load_settings(tmp_path / "imdsproxy.yaml", {}).settings.policy
    assert set(read.projects[_PROJECT].rules().audiences or ()) == {"*", "vault", "openbao"}
    other = _setup(tmp_path, "openbao", "--part", "host", policy={"host": {"audiences": ["rgw"]}})
    assert '["rgw", "openbao"]' in other.out


def test_in_a_fleet_the_host_s_part_sets_the_fleet_s_policy(tmp_path: Path) -> None:
    hub = {"etcd": {"endpoints": ["http://127.0.0.1:2379"]}}
    done = _setup(tmp_path, "openbao", "--project", _PROJECT, "--part", "host", hub=hub)
    assert f"imdsproxy policy set project/{_PROJECT} --audience openbao" in done.out
    assert "conf.d" not in done.out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("dex",), "keystone"),
        (("openbao", "--part", "server"), "admin, host, guest"),
        (("openbao", "--project", "$(id)"), "wrong form"),
        (("openbao", "--url", "https://x/;id"), "wrong form"),
    ],
)
def test_wrong_words_are_refused_with_the_right_ones(
    tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    done = _setup(tmp_path, *words)
    assert (done.status != 0, done.out) == (True, "")
    assert reason in done.err
