"""Settings, numbers and commands of docs/tokens.md are good ones, and its examples say what the page says of them."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.core.path_rules import PathWord
from imdsproxy.core.policy import BOOT_GRACE_S, PolicyPlace, TokenMode
from imdsproxy.core.tokens import TTL_LIMIT_S, parse_token_keys
from support.demonstration import REPOSITORY
from support.document_blocks import blocks_of

_PAGE: Final = REPOSITORY / "docs/tokens.md"
_SCRIPTS: Final = [
    one.script for one in blocks_of(_PAGE, "# Session tokens, and what a guest may read")
]
_SETTINGS: Final = [
    textwrap.dedent(one) for one in _SCRIPTS if one.lstrip().startswith(("policy:", "tokens:"))
]


def _settings(holds: str) -> Settings:
    """The settings of the one block that holds these words."""
    (text,) = (one for one in _SETTINGS if holds in one)
    return Settings.model_validate(parse_yaml(text, "page").value)


def test_all_settings_of_the_page_are_good_ones() -> None:
    assert len(_SETTINGS) == 8
    for text in _SETTINGS:
        Settings.model_validate(parse_yaml(text, "page").value)


@pytest.mark.parametrize(
    ("holds", "place", "rules"),
    [
        ("legacy:", ("red", None, "web-9"), {"tokens": TokenMode.OPTIONAL}),
        ("legacy:", ("blue", None, "web-9"), {"tokens": TokenMode.REQUIRED}),
        ("legacy:", ("blue", "legacy", "web-9"), {"tokens": TokenMode.OPTIONAL}),
        ("legacy:", ("blue", "legacy", "web-1"), {"tokens": TokenMode.OFF}),
        (
            "refuse_forwarded",
            ("red", None, "web-9"),
            {"tokens": TokenMode.REQUIRED, "refuse_forwarded": True},
        ),
        ("quarantine", ("red", "quarantine", "web-9"), {"endpoint": False}),
        ("boot_grace_s", ("red", None, "web-9"), {"boot_grace_s": 1800, "seal_user_data": True}),
        (
            "boot_grace_s",
            ("red", "payments", "web-9"),
            {
                "boot_grace_s": 1800,
                "openstack_tokens": TokenMode.REQUIRED,
                "nocloud_tokens": TokenMode.REQUIRED,
            },
        ),
        (
            "web-2",
            ("red", "payments", "web-2"),
            {
                "paths": (
                    ("/", PathWord.DENY),
                    ("/latest/meta-data", PathWord.ALLOW),
                    ("/latest/meta-data/tags", PathWord.OPTIONAL),
                )
            },
        ),
    ],
)
def test_an_example_says_what_the_page_says_of_it(
    holds: str, place: tuple[str, str | None, str], rules: dict[str, object]
) -> None:
    policy = _settings(holds).policy.book().fold(PolicyPlace(*place)).policy
    assert {name: getattr(policy, name) for name in rules} == rules


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    text = _PAGE.read_text()
    assert f"1 to {TTL_LIMIT_S:,}" in text
    assert f"creation, {BOOT_GRACE_S} by default" in text


def test_the_command_that_makes_a_key_makes_one(tmp_path: Path) -> None:
    (script,) = (one for one in _SCRIPTS if "urandom" in one)
    keys = tmp_path / "keys"
    script = script.replace(str(_settings("key_file").tokens.key_file), str(keys))
    subprocess.run(script, shell=True, check=True, timeout=60)  # noqa: S602 - the page's own words, which a shell reads
    assert len(parse_token_keys(keys.read_text())) == 1
    assert keys.stat().st_mode & 0o777 == 0o600
