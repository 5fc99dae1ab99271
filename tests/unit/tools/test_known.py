"""Where a host's secrets are read, so that a bundle can be searched for them."""

import base64
import json
import sqlite3
import typing
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import yaml

from imdsproxy.config.schema import Settings
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.records import write_table
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.tokens import TokenKey, render_key_map
from imdsproxy.tools.bundle.known import read_known

_NO_SECRET: Final = {"ca_file", "certificate_file", "client_cert_file", "clouds_file"}
"""Settings that name a file without secrets, or one that is read for its passwords alone."""


def _settings(place: Path, **sections: object) -> Settings:
    paths = {"runtime_dir": place / "run", "state_dir": place / "state"}
    return Settings.model_validate({"paths": paths, **sections})


def test_the_files_that_settings_name_and_what_clouds_hide_are_secrets(tmp_path: Path) -> None:
    for name in ("current", "next", "client.key", "tokens"):
        (tmp_path / name).write_text(f"secret of {name}\n")
    clouds = {"clouds": {"here": {"auth": {"username": "me", "password": "deep-one"}}}}
    (tmp_path / "clouds.yaml").write_text(yaml.safe_dump(clouds))
    (tmp_path / "secure.yaml").write_text("clouds: {here: {auth: {token: other-one}}}")
    endpoints = {
        "endpoints": [{"url": "https://nova:8775"}],
        "secret_file": tmp_path / "current",
        "next_secret_file": tmp_path / "next",
        "client_cert_file": tmp_path / "client.crt",
        "client_key_file": tmp_path / "client.key",
    }
    neutron = {"enabled": True, "cloud": "here", "clouds_file": tmp_path / "clouds.yaml"}
    settings = _settings(
        tmp_path,
        nova={"endpoint_sets": {"default": endpoints}},
        sources={"neutron": neutron},
        tokens={"key_file": tmp_path / "tokens"},
    )

    known = read_known(settings, Layout.of(settings))

    named = {f"secret of {name}".encode() for name in ("current", "next", "client.key", "tokens")}
    assert set(known.secrets) >= named | {b"deep-one", b"other-one"}
    assert b"me" not in known.secrets
    assert known.unread == []


def test_token_keys_of_a_fleets_instances_are_secrets_and_their_names_are_none(
    tmp_path: Path,
) -> None:
    settings = _settings(tmp_path)
    layout = Layout.of(settings)
    layout.runtime.mkdir()
    own, of_web = TokenKey(b"o" * 32), TokenKey(b"w" * 32)
    entries = render_key_map((own,), {InstanceId("web"): (of_web,)})
    write_table(layout.token_keys_map, entries, secret=True)
    known = read_known(settings, layout)
    assert set(known.secrets) == {own.text.encode(), of_web.text.encode()}


def test_payloads_are_known_from_the_store_and_from_record_files_that_are_not_in_force(
    tmp_path: Path,
) -> None:
    records = tmp_path / "records"
    records.mkdir()
    packed = base64.b64encode(b"\x1f\x8bpacked").decode()
    (records / "a.yaml").write_text(
        yaml.safe_dump({"instances": [{"id": "a", "user_data": {"base64": packed}}]})
    )
    (records / "broken.yaml").write_text("user_data: |\n  one\n bad: [")
    (records / "beside.sh").write_text("echo from a file beside\n")
    store = tmp_path / "own.sqlite"
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("CREATE TABLE instances (id, record, user_data)")
        record = json.dumps(
            {"id": "b", "vendor_data": "from a vendor", "ssh_keys": ["ssh-rsa AAAA"]}
        )
        connection.execute("INSERT INTO instances VALUES ('b', ?, ?)", (record, b"from the store"))
        connection.commit()
    files = {"enabled": True, "directory": records}
    settings = _settings(tmp_path, sources={"sqlite": {"path": store}, "file": files})

    known = read_known(settings, Layout.of(settings))

    assert set(known.data) >= {
        b"\x1f\x8bpacked",
        b"from a vendor",
        b"ssh-rsa AAAA",
        b"from the store",
    }
    assert {b"echo from a file beside\n", (records / "broken.yaml").read_bytes()} <= set(known.data)
    assert known.unread == []


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    layout = Layout.of(settings)
    layout.state.mkdir()
    settings.store_path.write_bytes(b"no database" * 100)
    assert [one.partition(":")[0] for one in read_known(settings, layout).unread] == [
        str(settings.store_path)
    ]


def test_each_setting_that_names_a_file_is_one_whose_secrets_are_known_or_has_none() -> None:
    named = {name for name in _names(Settings) if name.endswith("_file")}
    found = {name for name in named if name.endswith(("secret_file", "key_file", "password_file"))}
    assert named - found == _NO_SECRET


def _names(kind: Any) -> Iterator[str]:
    for name, field in getattr(kind, "model_fields", {}).items():
        yield name
        yield from _names(field.annotation)
    for inner in typing.get_args(kind):
        yield from _names(inner)
