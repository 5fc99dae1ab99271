"""What a tired operator does at night, and what he is told."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.daemon import alive
from support.lab import until, within
from support.nova_world import SECRET, NovaWorld, open_nova_world

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def world() -> Iterator[NovaWorld]:
    with open_nova_world() as one:
        yield one


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"one\ntwo\n", "more than one line"),
        (b"metadata_proxy_shared_secret = abc\n", "only the secret"),
        (b"\xef\xbb\xbfabc\n", "byte order mark"),
        (b"a\0bc\n", "control character"),
    ],
)
def test_what_can_be_no_secret_of_novas_is_refused_and_the_one_before_stays(
    world: NovaWorld, data: bytes, words: str
) -> None:
    file = world.daemon.directory / "secret"
    try:
        file.write_bytes(data)
        for command in ("reload", "check"):
            done = world.daemon.command(command)
            assert done.status == 78
            assert words in done.out + done.err
            assert "abc" not in done.out + done.err
        assert world.red.ask("/openstack").status == 200
    finally:
        world.secret_file("secret", SECRET)


def test_who_writes_a_new_secret_is_told_that_it_was_read_and_not_what_it_is(
    world: NovaWorld,
) -> None:
    try:
        world.secret_file("secret", "a new secret")
        world.nova.secret = "a new secret"
        done = world.daemon.command("reload")
        assert "nova.endpoint_sets.default.secret_file" in done.out
        assert "a new secret" not in done.out + done.err
        assert world.red.ask("/openstack").status == 200
        assert "no setting has changed" in world.daemon.command("reload").out
    finally:
        world.secret_file("secret", SECRET)
        world.nova.secret = SECRET
        assert world.daemon.command("reload").status == 0


def test_a_second_controller_with_the_same_state_is_refused_whatever_else_is_its_own(
    world: NovaWorld, tmp_path: Path
) -> None:
    settings = yaml.safe_load(world.daemon.config.read_text())
    settings["paths"]["runtime_dir"] = str(tmp_path / "run")
    config = tmp_path / "second.yaml"
    config.write_text(yaml.safe_dump(settings))
    program = (*within(world.lab.host), *world.daemon.program, "--config", str(config), "run")
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 71
    assert f"another controller keeps its state in {world.daemon.state}" in done.stderr
    assert world.red.ask("/openstack").status == 200


def test_who_empties_the_runtime_directory_is_told_of_it_and_a_start_mends_all(
    world: NovaWorld,
) -> None:
    daemon = world.daemon
    assert daemon.process is not None
    documents = daemon.pids().documents
    for entry in daemon.runtime.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    process = daemon.process
    until(lambda: process.poll() is not None, within_s=15, what="the controller's end")
    assert process.returncode == 71
    assert f"the files were removed in {daemon.runtime}" in daemon.log.read_text()
    until(lambda: not alive(documents), what="the end of the document server of before")
    daemon.start()
    assert world.red.ask("/openstack").status == 200
