from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from imdsproxy.config.load import load_settings
from support.cli import Ran, run_main
from support.demonstration import REPOSITORY
from support.umask import umask

_GOLDEN = REPOSITORY / "tests/golden/neutron"
_ML2 = ("neutron.conf", "metadata_agent.ini", "l3_agent.ini", "dhcp_agent.ini", "nova.conf")
_OVN = ("neutron_ovn_metadata_agent.ini",)
_INI = "[DEFAULT]\nnova_metadata_host = nova\nmetadata_proxy_shared_secret = hush\n"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return lambda *arguments: run_main(capsys, "config", "import", *map(str, arguments))


@pytest.fixture
def ini(tmp_path: Path) -> Path:
    path = tmp_path / "metadata_agent.ini"
    path.write_text(_INI)
    return path


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize(("name", "files"), [("ml2", _ML2), ("ovn", _OVN)])
def test_the_files_of_a_real_host_come_out_as_expected_and_no_secret_is_shown(
    name: str, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.chdir(_GOLDEN)
    ran = run("--neutron", *files)
    expected = ((_GOLDEN / f"{name}.{kind}").read_text() for kind in ("yaml", "txt"))
    assert ran == Ran(0, *expected)
    settings = load_settings(_GOLDEN / f"{name}.yaml", {}).settings
    assert settings.unix_listener.enabled
    assert set(settings.nova.endpoint_sets) == {"default"}
    shown = run("--neutron", "--json", *files).out + ran.out + ran.err
    for secret in ("Zei9", "iePhoh4", "notthesecret", "nova's password"):
        assert secret not in shown


def test_settings_and_secret_are_written_for_their_readers_only(
    ini: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    output = tmp_path / "etc" / "imdsproxy.yaml"
    assert run("--neutron", ini, "--output", output).status == 71, "there is no such directory"
    output.parent.mkdir()
    with umask(0):
        ran = run("--neutron", ini, "--output", output)
    secret = output.parent / "nova.secret"
    assert (ran.status, ran.err) == (0, "")
    assert (_mode(output), _mode(secret)) == (0o640, 0o600)
    assert secret.read_text() == "hush"
    settings = load_settings(output, {}).settings
    assert settings.nova.endpoint_sets["default"].secret_file == secret
    assert f"written: {output}" in ran.out
    assert "hush" not in ran.out + output.read_text()
    assert {path.name for path in output.parent.iterdir()} == {"imdsproxy.yaml", "nova.secret"}


def test_nothing_that_is_there_is_replaced_unasked(
    ini: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    output, secret = tmp_path / "c.yaml", tmp_path / "nova.secret"
    secret.write_text("another")
    command = ("--neutron", ini, "-o", output)
    refused = run(*command)
    assert (refused.status, "nova.secret would be replaced" in refused.err) == (73, True)
    assert (secret.read_text(), output.exists()) == ("another", False)
    assert run(*command, "--force").status == 0
    assert (secret.read_text(), _mode(secret)) == ("hush", 0o600)
    assert run(*command).status == 0, "the same once more is no change"
    assert run(*command, "--agent-user", "stack").status == 73
    assert "user: neutron" in output.read_text()


def test_a_secret_file_can_be_written_alone_and_is_an_instruction_otherwise(
    ini: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    at = f"put the value of metadata_proxy_shared_secret ({ini}:3)"
    assert f"/etc/imdsproxy/nova.secret: {at}" in run("--neutron", ini).err
    secret = tmp_path / "s"
    ran = run("--neutron", ini, "--secret-file", secret)
    assert ran.status == 0
    assert f"secret_file: {secret}" in ran.out
    assert f"written: {secret}" in ran.err
    assert secret.read_text() == "hush"


def test_json_has_each_option_with_what_becomes_of_it(ini: Path, run: Callable[..., Ran]) -> None:
    ini.write_text(f"{_INI}metadata_workers = 2\nother = 1\n")
    shape = run("--neutron", ini, "--json").json
    assert shape["settings"]["unix_listener"]["enabled"] is True
    assert (shape["written"], shape["others"]) == ([], 1)
    fates = {one["option"]: (one["fate"], one["line"], one["setting"]) for one in shape["options"]}
    assert fates["metadata_workers"] == ("no equivalent", 4, None)
    secret_file = "nova.endpoint_sets.default.secret_file"
    assert fates["metadata_proxy_shared_secret"] == ("taken over", 3, secret_file)
    assert shape["yaml"].startswith("# Made by")


def test_nonsense_is_78_with_file_and_line(
    ini: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    other, output = tmp_path / "b.ini", tmp_path / "c.yaml"
    other.write_bytes(b"[DEFAULT]\n\xff\n")
    ini.write_text("[DEFAULT]\nnonsense\n")
    ran = run("--neutron", ini, other, tmp_path / "none.ini", "-o", output)
    assert ran.status == 78
    for problem in (f"{ini}:2", f"{other}:2 is not UTF-8", "none.ini: No such file"):
        assert problem in ran.err
    ini.write_text(f"{_INI}nova_metadata_port = 70000\n")
    assert f"{ini}:4: [DEFAULT] nova_metadata_port" in run("--neutron", ini, "-o", output).err
    assert not output.exists()


def test_the_owner_of_the_files_has_to_be_named(ini: Path, run: Callable[..., Ran]) -> None:
    refused = run(ini)
    assert (refused.status, "--neutron" in refused.err) == (64, True)
    assert run("--neutron").status == 64
