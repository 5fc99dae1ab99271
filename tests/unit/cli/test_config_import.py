from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from imdsproxy.cli.main import main
from imdsproxy.config.load import load_settings
from support.demonstration import REPOSITORY

_GOLDEN = REPOSITORY / "tests/golden/neutron"
_ML2 = ("neutron.conf", "metadata_agent.ini", "l3_agent.ini", "dhcp_agent.ini", "nova.conf")
_OVN = ("neutron_ovn_metadata_agent.ini",)
_INI = "[DEFAULT]\nnova_metadata_host = nova\nmetadata_proxy_shared_secret = hush\n"


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.fixture
def ini(tmp_path: Path) -> str:
    path = tmp_path / "metadata_agent.ini"
    path.write_text(_INI)
    return str(path)


@pytest.mark.parametrize(("name", "files"), [("ml2", _ML2), ("ovn", _OVN)])
def test_the_files_of_a_real_host_come_out_as_expected(
    name: str,
    files: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(_GOLDEN)

    assert main(["config", "import", "--neutron", *files]) == 0

    told = capsys.readouterr()
    assert told.out == (_GOLDEN / f"{name}.yaml").read_text()
    assert told.err == (_GOLDEN / f"{name}.txt").read_text()
    settings = load_settings(_GOLDEN / f"{name}.yaml", {}).settings
    assert settings.unix_listener.enabled
    assert set(settings.nova.endpoint_sets) == {"default"}


def test_no_secret_of_any_file_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(_GOLDEN)

    for extra in ([], ["--json"]):
        assert main(["config", "import", "--neutron", *extra, *_ML2]) == 0
        told = capsys.readouterr()
        for word in ("Zei9", "iePhoh4", "notthesecret", "nova's password"):
            assert word not in told.out + told.err


def test_settings_and_secret_are_written_for_their_readers_only(
    ini: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "etc" / "imdsproxy.yaml"
    output.parent.mkdir()
    before = os.umask(0)
    try:
        assert main(["config", "import", "--neutron", ini, "--output", str(output)]) == 0
    finally:
        os.umask(before)

    secret = output.parent / "nova.secret"
    assert (_mode(output), _mode(secret)) == (0o640, 0o600)
    assert secret.read_text() == "hush"
    settings = load_settings(output, {}).settings
    assert settings.nova.endpoint_sets["default"].secret_file == secret
    told = capsys.readouterr()
    assert told.err == ""
    assert f"written: {output}" in told.out
    assert "hush" not in told.out + output.read_text()
    assert {path.name for path in output.parent.iterdir()} == {"imdsproxy.yaml", "nova.secret"}


def test_nothing_that_is_there_is_replaced_unasked(
    ini: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, secret = tmp_path / "c.yaml", tmp_path / "nova.secret"
    secret.write_text("another")
    command = ["config", "import", "--neutron", ini, "-o", str(output)]

    assert main(command) == 73
    assert "nova.secret would be replaced" in capsys.readouterr().err
    assert secret.read_text() == "another"
    assert not output.exists()

    assert main([*command, "--force"]) == 0
    assert secret.read_text() == "hush"
    assert _mode(secret) == 0o600

    assert main(command) == 0, "the same once more is no change"
    assert main([*command, "--agent-user", "stack"]) == 73
    assert "user: neutron" in output.read_text()


def test_a_secret_file_can_be_written_alone(
    ini: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "s"

    assert main(["config", "import", "--neutron", ini, "--secret-file", str(secret)]) == 0

    told = capsys.readouterr()
    assert f"secret_file: {secret}" in told.out
    assert f"written: {secret}" in told.err
    assert secret.read_text() == "hush"


def test_without_a_file_to_write_to_the_secret_is_an_instruction(
    ini: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "import", "--neutron", ini]) == 0

    told = capsys.readouterr()
    assert (
        f"/etc/imdsproxy/nova.secret: put the value of metadata_proxy_shared_secret ({ini}:3)"
        in told.err
    )


def test_json_has_each_option_with_what_becomes_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ini = tmp_path / "a.ini"
    ini.write_text(f"{_INI}metadata_workers = 2\nother = 1\n")

    assert main(["config", "import", "--neutron", str(ini), "--json"]) == 0

    shape = json.loads(capsys.readouterr().out)
    assert shape["settings"]["unix_listener"]["enabled"] is True
    assert shape["written"] == []
    assert shape["others"] == 1
    fates = {one["option"]: (one["fate"], one["line"], one["setting"]) for one in shape["options"]}
    assert fates["metadata_workers"] == ("no equivalent", 4, None)
    assert fates["metadata_proxy_shared_secret"] == (
        "taken over",
        3,
        "nova.endpoint_sets.default.secret_file",
    )
    assert shape["yaml"].startswith("# Made by")


def test_nonsense_is_78_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ini, other = tmp_path / "a.ini", tmp_path / "b.ini"
    output = tmp_path / "c.yaml"
    ini.write_text(f"{_INI}nova_metadata_port = 70000\n")
    command = ["config", "import", "--neutron", str(ini), "-o", str(output)]

    assert main(command) == 78
    assert f"{ini}:4: [DEFAULT] nova_metadata_port" in capsys.readouterr().err

    other.write_bytes(b"[DEFAULT]\n\xff\n")
    ini.write_text("[DEFAULT]\nnonsense\n")
    assert main([*command, str(other), str(tmp_path / "none.ini")]) == 78
    told = capsys.readouterr().err
    assert f"{ini}:2" in told
    assert f"{other}:2 is not UTF-8" in told
    assert "none.ini: No such file" in told
    assert not output.exists()


def test_a_directory_that_is_not_there_is_71(ini: str, tmp_path: Path) -> None:
    output = tmp_path / "none" / "c.yaml"

    assert main(["config", "import", "--neutron", ini, "-o", str(output)]) == 71


def test_it_has_to_be_said_whose_files_they_are(
    ini: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "import", ini]) == 64
    assert "--neutron" in capsys.readouterr().err
    assert main(["config", "import", "--neutron"]) == 64
