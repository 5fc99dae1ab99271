"""What docs/tokens.md has operators write and run does what the page says."""

from __future__ import annotations

import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.core.policy import BOOT_GRACE_S, Policy, PolicyPlace, TokenMode
from imdsproxy.core.tokens import TTL_LIMIT_S, parse_token_keys
from support.daemon import instance
from support.demonstration import REPOSITORY
from support.document_blocks import Block, blocks_of
from support.guest import Guest, Reply, take_token, with_token
from support.lab import within
from support.world import World, open_world

_PAGE: Final = REPOSITORY / "docs/tokens.md"
_TITLE: Final = "# Session tokens, and what a guest may read"
_USER_DATA: Final = "/latest/user-data"
_META: Final = "/openstack/latest/meta_data.json"
_NOCLOUD: Final = "/nocloud/user-data"


def _blocks() -> list[Block]:
    return blocks_of(_PAGE, _TITLE)


def _is_settings(block: Block) -> bool:
    return block.script.lstrip().startswith(("policy:", "tokens:"))


def _settings(holds: str) -> Settings:
    """The settings of the one block that holds these words."""
    (block,) = (one for one in _blocks() if _is_settings(one) and holds in one.script)
    read = parse_yaml(textwrap.dedent(block.script), "page")
    return Settings.model_validate(read.value)


def _policy(
    settings: Settings, *, network: str = "red", project: str | None = None, name: str = "web-9"
) -> Policy:
    return settings.policy.book().fold(PolicyPlace(network, project, name)).policy


def test_all_settings_of_the_page_are_good_ones() -> None:
    found = [one for one in _blocks() if _is_settings(one)]
    assert len(found) == 8
    for one in found:
        read = parse_yaml(textwrap.dedent(one.script), "page")
        Settings.model_validate(read.value)


def test_the_first_example_says_what_the_page_says_of_it() -> None:
    settings = _settings("legacy:")
    assert _policy(settings).tokens is TokenMode.OPTIONAL
    assert _policy(settings, network="blue").tokens is TokenMode.REQUIRED
    assert _policy(settings, network="blue", project="legacy").tokens is TokenMode.OPTIONAL
    web = _policy(settings, network="blue", project="legacy", name="web-1")
    assert web.tokens is TokenMode.OFF


def test_the_other_examples_say_what_the_page_says_of_them() -> None:
    assert _policy(_settings("refuse_forwarded")) == Policy(
        tokens=TokenMode.REQUIRED, refuse_forwarded=True
    )
    assert not _policy(_settings("quarantine"), project="quarantine").endpoint
    settings = _settings("boot_grace_s")
    assert _policy(settings) == Policy(boot_grace_s=1800, seal_user_data=True)
    locked = _policy(settings, project="payments")
    assert {locked.openstack_tokens, locked.nocloud_tokens} == {TokenMode.REQUIRED}
    assert locked.boot_grace_s == 1800
    paths = _settings("web-2")
    denied = _policy(paths, project="payments", name="web-2").paths
    assert [(path, word.value) for path, word in denied] == [
        ("/", "deny"),
        ("/latest/meta-data", "allow"),
        ("/latest/meta-data/tags", "optional"),
    ]
    (step,) = (one for one in _blocks() if one.script.startswith("   policy:"))
    read = parse_yaml(textwrap.dedent(step.script), "page")
    one = Settings.model_validate(read.value)
    assert _policy(one, name="web-1").tokens is TokenMode.REQUIRED
    assert _policy(one).tokens is TokenMode.OPTIONAL


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    text = _PAGE.read_text()
    assert f"1 to {TTL_LIMIT_S:,}" in text
    assert f"creation, {BOOT_GRACE_S} by default" in text


def test_the_command_that_makes_a_key_makes_one(tmp_path: Path) -> None:
    (block,) = (one for one in _blocks() if "urandom" in one.script)
    file = _settings("key_file").tokens.key_file
    assert file is not None
    script = block.script.replace(str(file), str(tmp_path / "keys"))
    assert script != block.script
    subprocess.run(script, shell=True, check=True, timeout=60)  # noqa: S602 - the page's own words, which a shell reads
    assert len(parse_token_keys((tmp_path / "keys").read_text())) == 1
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world() as made:
        made.daemon.put(instances=[instance("red-5", "red", fields={"created_at": 1_700_000_000})])
        yield made


def _say(world: World, holds: str, **renamed: str) -> None:
    """Put the page's settings in force, for this world's names."""
    (block,) = (one for one in _blocks() if _is_settings(one) and holds in one.script)
    text = textwrap.dedent(block.script)
    for old, new in renamed.items():
        assert old in text
        text = text.replace(old, new)
    read = parse_yaml(text, "page")
    assert isinstance(read.value, dict)
    world.daemon.reconfigure(read.value)


def _command(world: World, begins: str) -> str:
    """Run the page's command about the page's instance."""
    (line,) = (one.script for one in _blocks() if one.script.startswith(begins))
    words = line.replace("web-1", "red-5").split()
    done = world.daemon.command(*words[1:])
    assert done.status == 0, done
    return done.out


def _ask(guest: Guest, target: str, token: str | None = None) -> Reply:
    return guest.ask(target, headers=() if token is None else with_token(token))


@pytest.mark.root
def test_the_guests_two_lines_work_where_tokens_are_required(world: World) -> None:
    (block,) = (one for one in _blocks() if one.script.startswith("token="))
    _say(world, "refuse_forwarded")
    assert _ask(world.red, "/latest/meta-data/instance-id").status == 401
    done = subprocess.run(
        (*within(world.red.namespace), "/bin/sh", "-euc", block.script),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert re.fullmatch("i-[0-9a-f]{17}", done.stdout)


@pytest.mark.root
def test_what_is_locked_after_the_boot_is_opened_again_by_the_pages_command(world: World) -> None:
    _say(world, "boot_grace_s", payments="nobodys")
    token = take_token(world.red)
    sealed = (_USER_DATA, "/openstack/latest/user_data", _NOCLOUD)
    assert {_ask(world.red, path, token).status for path in sealed} == {403}
    assert _ask(world.red, _META).status == 200
    _command(world, "imdsproxy instance reopen")
    assert {_ask(world.red, path).status for path in sealed} == {200}


@pytest.mark.root
def test_tokens_end_by_the_pages_command_and_not_by_the_one_for_keys(world: World) -> None:
    world.daemon.reconfigure({})
    token = take_token(world.red)
    assert "signs tokens" in _command(world, "imdsproxy token rotate")
    assert _ask(world.red, _USER_DATA, token).status == 200
    _command(world, "imdsproxy token revoke")
    assert _ask(world.red, _USER_DATA, token).status == 401
    assert _ask(world.red, _USER_DATA, take_token(world.red)).status == 200


@pytest.mark.root
def test_a_second_key_in_the_file_is_believed_before_it_signs(world: World) -> None:
    world.daemon.configure({})
    keys = world.daemon.state / "token-keys"
    before = keys.read_text().splitlines()
    fresh = "A" * 43 + "="
    try:
        first, *rest = (line for line in before if not line.startswith("#"))
        keys.write_text("\n".join([first, fresh, *rest]) + "\n")
        assert world.daemon.command("reload", "--allow-dropped").status == 0
        old = take_token(world.red)
        keys.write_text("\n".join([fresh, first, *rest]) + "\n")
        assert world.daemon.command("reload", "--allow-dropped").status == 0
        new = take_token(world.red)
        assert old.split(".")[0] != new.split(".")[0]
        assert {_ask(world.red, _USER_DATA, token).status for token in (old, new)} == {200}
        keys.write_text(f"{fresh}\n")
        assert world.daemon.command("reload", "--allow-dropped").status == 0
        assert _ask(world.red, _USER_DATA, old).status == 401
    finally:
        keys.write_text("\n".join(before) + "\n")
        world.daemon.command("reload")
