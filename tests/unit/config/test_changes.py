from __future__ import annotations

import copy
from typing import Any

import pytest

from imdsproxy.config.changes import SettingChange, diff_settings
from imdsproxy.config.describe import Setting, iterate_settings
from imdsproxy.config.schema import Settings
from imdsproxy.config.section import Change
from imdsproxy.core.haproxy.counting import ONE_IN

SETTINGS = {setting.path: setting for setting in iterate_settings()}
SET = {"endpoints": [{"url": "http://192.0.2.10:8775"}], "secret_file": "/x.secret"}
OTHER = {"endpoints": [{"url": "https://nova:1"}], "secret_file": "/x.secret", "verify": False}
DENY = {"/latest/user-data": "deny"}


def _settings(values: dict[str, Any]) -> Settings:
    return Settings.model_validate(copy.deepcopy(values), strict=False)


def _dumped(settings: Settings, path: str) -> object:
    found: Any = settings.model_dump(mode="json")
    for step in path.split("."):
        found = found.get(step) if isinstance(found, dict) else None
    return found


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ({}, {}, {}),
        ({}, {"namespace_proxy": {"debug": True}}, {"namespace_proxy.debug": Change.NOTHING}),
        ({}, {"log": {"level": "debug"}}, {"log.level": Change.LIVE}),
        ({}, {"policy": {"host": {"paths": DENY}}}, {"policy.host.paths": Change.LIVE}),
        ({}, {"metrics": {"haproxy_listen": None}}, {"metrics.haproxy_listen": Change.RELOAD}),
        ({}, {"paths": {"runtime_dir": "/x"}}, {"paths.runtime_dir": Change.RESTART}),
        (
            {},
            {"sources": {"libvirt": {"networks": ["default"]}}},
            {"sources.libvirt.networks": Change.RESTART},
        ),
        # What comes or goes by its name is one change, what stays is compared setting by setting.
        *(
            ({}, {"policy": {scope: {"x": {"tokens": "off"}}}}, {f"policy.{scope}.x": Change.LIVE})
            for scope in ("networks", "projects", "instances")
        ),
        (
            {},
            {"nova": {"endpoint_sets": {"default": SET}}},
            {"nova.endpoint_sets.default": Change.RELOAD},
        ),
        (
            {"nova": {"endpoint_sets": {"default": SET}}},
            {"nova": {"endpoint_sets": {"default": OTHER}}},
            {
                "nova.endpoint_sets.default.endpoints": Change.RELOAD,
                "nova.endpoint_sets.default.verify": Change.RELOAD,
            },
        ),
    ],
)
def test_each_setting_that_differs_says_what_its_change_takes(
    before: dict[str, Any], after: dict[str, Any], changes: dict[str, Change]
) -> None:
    old, new = _settings(before), _settings(after)
    for one, other in ((old, new), (new, old)):
        assert diff_settings(one, other) == tuple(
            SettingChange(path, _dumped(one, path), _dumped(other, path), change)
            for path, change in changes.items()
        )


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_each_setting_is_documented(setting: Setting) -> None:
    assert len(setting.description) > 15
    assert setting.description.endswith(".")
    assert setting.takes
    assert "^" not in setting.takes, "a pattern says nothing to most people"


def test_the_share_of_reads_that_are_counted_is_the_one_in_the_description() -> None:
    assert f"one read in {ONE_IN} by chance" in SETTINGS["tokens.count_reads"].description
