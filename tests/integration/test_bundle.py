"""`imdsproxy bundle` on a host full of secrets: none of them is in the file, in any spelling, and the rest is."""

import base64
import contextlib
import gzip
import json
import signal
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from support.daemon import Daemon, instance
from support.guest import IPV4
from support.lab import until
from support.spelled import spellings_of
from support.world import World, open_world

pytestmark = [pytest.mark.root, pytest.mark.slow]

_NOVA: Final = 'n0va\'s "shared" secret/ü'
_NEXT: Final = "the-next-Secret+1"
_LOGIN: Final = "l0gin&pass/wörd"
_API_KEY: Final = "AKIA0123456789ZZ"
_VENDOR: Final = "v3ndor-Secret"
_PACKED: Final = gzip.compress(b"#cloud-config\npassword: in-gzip\n", mtime=0)
_SSH_KEY: Final = f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA{'Q7' * 24} operator@example"
_POSTED: Final = "UG9zdGVkIGJ5IHRoZSBndWVzdA=="
_REFUSED: Final = "r3fused-Pass"
_USER_DATA: Final = f"""#cloud-config
password: {_LOGIN}
runcmd:
- [curl, -u, "admin:{_API_KEY}", http://example/]
"""
_BROKEN: Final = f"id: web-9\nuser_data: |\n  password: {_REFUSED}\n bad\n"
_MARK: Final = "a line that stays"


@dataclass(slots=True)
class Host:
    """A daemon whose secrets are known to the test.

    Attributes:
        secrets: By where each is kept.
    """

    world: World
    secrets: Mapping[str, bytes]

    def bundle(self, name: str) -> dict[str, str]:
        """Its files, by their names below the directory that all are in."""
        path = self.world.daemon.directory / f"{name}.tar.gz"
        done = self.world.daemon.command("bundle", "--output", str(path))
        assert done.status == 0, done.err
        assert path.stat().st_mode & 0o777 == 0o600
        with tarfile.open(path) as archive:
            files = {one.name: archive.extractfile(one) for one in archive}
            return {
                name.partition("/")[2]: file.read().decode()
                for name, file in files.items()
                if file is not None
            }

    def leaks(self, files: Mapping[str, str]) -> list[tuple[str, str, str]]:
        """Each secret that is in a file, as it is spelled there."""
        return [
            (where, name, spelling)
            for where, secret in self.secrets.items()
            for spelling in spellings_of(secret)
            for name, text in files.items()
            if spelling in text
        ]


def _prepare(daemon: Daemon) -> None:
    for name, text in (("nova.secret", _NOVA), ("next.secret", _NEXT)):
        daemon.write_secret(name, text)
    (daemon.directory / "records").mkdir()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    endpoints = {
        "endpoints": [{"url": "http://127.0.0.1:9"}],
        "secret_file": "{directory}/nova.secret",
        "next_secret_file": "{directory}/next.secret",
    }
    settings: Mapping[str, Mapping[str, object]] = {
        "sources": {"file": {"enabled": True, "directory": "{directory}/records"}},
    }
    with open_world(settings, prepare=_prepare) as world:
        # Later: nothing answers there, which keeps a start from being ready.
        world.daemon.reconfigure({**settings, "nova": {"endpoint_sets": {"default": endpoints}}})
        payloads = {
            "user_data": _USER_DATA,
            "vendor_data": f"key: {_VENDOR}",
            "ssh_keys": [_SSH_KEY],
        }
        packed = {"base64": base64.b64encode(_PACKED).decode()}
        world.daemon.put(
            instances=[
                instance("red-5", "red", fields=payloads),
                instance("green-5", "green", fields={"user_data": packed}),
                instance(
                    "blue-5",
                    "blue",
                    fields={"upstream": "nova", "project": "p1", "user_data": None},
                ),
            ]
        )
        guest = world.red
        lifetime = ("X-aws-ec2-metadata-token-ttl-seconds: 600",)
        token = guest.ask("/latest/api/token", method="PUT", headers=lifetime).body
        assert (
            guest.ask("/openstack/latest/password", method="POST", body=_POSTED.encode()).status
            == 200
        )
        (world.daemon.directory / "records" / "broken.yaml").write_text(_BROKEN)
        until(lambda: "broken.yaml" in str(world.daemon.status()["sources"]), what="its refusal")
        yield Host(
            world,
            {
                "Nova's secret": _NOVA.encode(),
                "Nova's next secret": _NEXT.encode(),
                "user-data": _USER_DATA.encode(),
                "a password in user-data": _LOGIN.encode(),
                "a key in user-data": _API_KEY.encode(),
                "packed user-data": _PACKED,
                "vendor-data": _VENDOR.encode(),
                "an SSH key": _SSH_KEY.encode(),
                "a posted password": _POSTED.encode(),
                "user-data of a refused file": _REFUSED.encode(),
                "a session token": token,
                "the tokens' key": (world.daemon.state / "token-keys").read_bytes().split()[-1],
            },
        )


def _seed_logs(host: Host) -> None:
    """Every secret in every spelling, as a careless program might have logged it."""
    lines = [
        f"careless: {spelling} at the end"
        for where, secret in host.secrets.items()
        # A token is known by its look alone: no process keeps one.
        for spelling in (spellings_of(secret) if where != "a session token" else [secret.decode()])
    ]
    for name in ("haproxy.log", "documents.log", "haproxy.cfg.rejected"):
        with (host.world.daemon.runtime / name).open("a") as log:
            log.write("\n".join([_MARK, *lines, _MARK, ""]))


@pytest.mark.always
def test_no_secret_is_in_a_bundle_and_what_explains_the_host_is(host: Host) -> None:
    _seed_logs(host)
    files = host.bundle("running")

    assert host.leaks(files) == []
    assert files["logs/haproxy.log"].count(_MARK) >= 2
    assert files["logs/documents.log"].count(_MARK) >= 2
    assert files["haproxy/haproxy.cfg.rejected"].count(_MARK) >= 2
    assert next(iter(files)) == "README.txt"
    instances = json.loads(files["daemon/instances.json"])
    assert {one["record"]["id"] for one in instances} >= {"red-5", "green-5", "blue-5", "grey-5"}
    assert json.loads(files["settings.json"])["paths"]["runtime_dir"]
    assert {one["id"] for one in map(_record, json.loads(files["daemon/networks.json"]))} >= {"red"}
    assert "refused" in files["daemon/status.json"] or "broken.yaml" in files["daemon/status.json"]
    assert "|signed|blue-5|p1" in files["haproxy/overlay.map"] + files["haproxy/base.map"]
    assert f"netns: {host.world.lab.name('red')}" in files["host/nftables-in-namespaces.txt"]
    assert "lo " in files["host/addresses-in-namespaces.txt"]
    for name in ("show-info", "show-stat", "show-servers-state", "show-map", "show-table"):
        assert files[f"haproxy/{name}.txt"].strip()


def _record(shape: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    return shape["record"]


def test_a_file_that_exists_is_not_overwritten(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    done = host.world.daemon.command("bundle", "--output", str(path))
    assert done.status != 0
    assert "exists" in done.err
    assert path.read_text() == "mine"


def test_with_broken_settings_whose_secrets_are_not_known_logs_are_lacking(host: Host) -> None:
    daemon = host.world.daemon
    good = daemon.config.read_text()
    daemon.config.write_text(f"{good}\nnonsense: 1\n")
    try:
        files = host.bundle("broken")
    finally:
        daemon.config.write_text(good)
    assert host.leaks(files) == []
    assert not [name for name in files if name.startswith(("logs/", "daemon/", "settings"))]
    assert "settings.json: " in files["README.txt"]


@contextlib.contextmanager
def _damaged(store: Path) -> Iterator[None]:
    """A store that is no database, as long as this goes on."""
    files = list(store.parent.glob(f"{store.name}*"))
    aside = store.with_name("aside")
    aside.mkdir()
    for file in files:
        file.rename(aside / file.name)
    store.write_bytes(b"no database" * 100)
    try:
        yield
    finally:
        for file in files:
            (aside / file.name).rename(file)


def test_without_a_daemon_a_bundle_says_what_is_lacking_and_has_no_secret_either(
    host: Host,
) -> None:
    host.world.daemon.kill_controller(signal.SIGKILL)
    store = host.world.daemon.state / "store.sqlite"
    try:
        _seed_logs(host)
        files = host.bundle("down")
        with _damaged(store):
            in_doubt = host.bundle("in-doubt")
    finally:
        # The refused file keeps it from being ready.
        host.world.daemon.start(ready=False)
    assert host.leaks(files) == []
    lacking = files["README.txt"].partition("Missing parts")[2].partition("Removed data")[0]
    assert "daemon/status.json: no daemon answers" in lacking
    assert "daemon/status.json" not in files
    assert files["haproxy/show-info.txt"].startswith("Name: HAProxy")
    assert files["logs/haproxy.log"].count(_MARK) >= 2
    assert host.world.red.ask("/latest/meta-data/", to=IPV4).status == 200
    # Of a store that cannot be read no secret is known.
    assert not [name for name in in_doubt if name.startswith(("logs/", "daemon/"))]
    assert "logs/haproxy.log: a file with secrets could not be read" in in_doubt["README.txt"]
    assert in_doubt["haproxy/show-info.txt"].startswith("Name: HAProxy")
