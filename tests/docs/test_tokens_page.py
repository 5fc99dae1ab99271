"""Settings and commands of docs/explanation/tokens.md are good ones."""

import subprocess
import textwrap
from pathlib import Path
from typing import Final

from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.model.tokens import parse_token_keys
from support.demonstration import REPOSITORY
from support.document_blocks import blocks_of

_PAGE: Final = REPOSITORY / "docs/explanation/tokens.md"
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
    assert len(_SETTINGS) == 7
    for text in _SETTINGS:
        Settings.model_validate(parse_yaml(text, "page").value)


def test_the_command_that_makes_a_key_makes_one(tmp_path: Path) -> None:
    (script,) = (one for one in _SCRIPTS if "urandom" in one)
    keys = tmp_path / "keys"
    script = script.replace(str(_settings("key_file").tokens.key_file), str(keys))
    subprocess.run(script, shell=True, check=True, timeout=60)  # noqa: S602 - the page's own words, which a shell reads
    assert len(parse_token_keys(keys.read_text())) == 1
    assert keys.stat().st_mode & 0o777 == 0o600
