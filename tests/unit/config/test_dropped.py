from __future__ import annotations

from pathlib import Path

import pytest

from imdsproxy.config.changes import refuse_dropped
from imdsproxy.config.load import Loaded, load_settings
from imdsproxy.errors import SettingsDropped

_FULL = "policy: {host: {tokens: required, paths: {/latest/a: deny}}, networks: {n: {burst: 9}}}\n"


def _load(path: Path, text: str) -> Loaded:
    path.write_text(text)
    return load_settings(path, {})


@pytest.mark.parametrize(
    ("text", "empty", "blank"),
    [
        ("", True, True),
        (" \n\n", True, True),
        ("# a comment\n", True, False),
        ("---\n", True, False),
        ("null\n", True, False),
        ("{}\n", False, False),
        ("haproxy: {}\n", False, False),
    ],
)
def test_a_file_without_settings_is_known_from_one_that_says_so(
    tmp_path: Path, text: str, *, empty: bool, blank: bool
) -> None:
    config = tmp_path / "c.yaml"
    loaded = _load(config, text)
    assert (config in loaded.empty, config in loaded.blank) == (empty, blank)


def test_a_start_is_refused_for_a_blank_file_only(tmp_path: Path) -> None:
    refuse_dropped(None, load_settings(Path("/dev/null"), {}))
    refuse_dropped(None, _load(tmp_path / "c.yaml", "# a comment\n"))
    with pytest.raises(SettingsDropped, match="is blank"):
        refuse_dropped(None, _load(tmp_path / "c.yaml", "\n"))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("{}\n", "every policy"),
        ("policy: {host: {paths: {}}}\n", "every policy"),
        ("policy: {host: {tokens: required}}\n", "every `deny`"),
        ("policy: {networks: {n: {burst: 9}}}\n", "every `deny`"),
        ("# a comment\n", "holds no settings any more"),
    ],
)
def test_what_is_missing_is_named_and_refused_unless_it_is_allowed(
    tmp_path: Path, text: str, missing: str
) -> None:
    before = _load(tmp_path / "c.yaml", _FULL)
    after = _load(tmp_path / "c.yaml", text)
    with pytest.raises(SettingsDropped, match=missing):
        refuse_dropped(before, after)
    refuse_dropped(before, after, allowed=True)


@pytest.mark.parametrize(
    "text",
    [
        "policy: {host: {paths: {/latest/a: allow}}}\n",
        "policy: {networks: {n: {paths: {/latest/b: deny}}}}\n",
        "policy: {host: {paths: {/latest/a: deny}}}\n",
    ],
)
def test_a_policy_that_is_changed_or_moved_is_not_missing(tmp_path: Path, text: str) -> None:
    before = _load(tmp_path / "c.yaml", _FULL)
    refuse_dropped(before, _load(tmp_path / "c.yaml", text))


def test_a_blank_file_is_refused_even_where_dropping_is_allowed(tmp_path: Path) -> None:
    before = _load(tmp_path / "c.yaml", _FULL)
    with pytest.raises(SettingsDropped, match="is blank"):
        refuse_dropped(before, _load(tmp_path / "c.yaml", ""), allowed=True)
