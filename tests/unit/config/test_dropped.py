from __future__ import annotations

from contextlib import nullcontext
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
        *((text, True, True) for text in ("", " \n\n")),
        *((text, True, False) for text in ("# a comment\n", "---\n", "null\n")),
        *((text, False, False) for text in ("{}\n", "haproxy: {}\n")),
    ],
)
def test_only_a_blank_file_is_refused_at_a_start_and_always(
    tmp_path: Path, text: str, *, empty: bool, blank: bool
) -> None:
    config = tmp_path / "c.yaml"
    before, loaded = _load(config, _FULL), _load(config, text)
    assert (config in loaded.empty, config in loaded.blank) == (empty, blank)
    for known in (None, before):
        with pytest.raises(SettingsDropped, match="is blank") if blank else nullcontext():
            refuse_dropped(known, loaded, allowed=known is not None)
    refuse_dropped(None, load_settings(Path("/dev/null"), {}))


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
