from __future__ import annotations

from collections.abc import Mapping

import pytest

from imdsproxy.config.changes import SettingChange, diff_settings
from imdsproxy.config.describe import Setting, iterate_settings
from imdsproxy.config.schema import Settings
from imdsproxy.config.section import Change

SETTINGS = {setting.path: setting for setting in iterate_settings()}

SETS = {
    "default": {
        "endpoints": [{"url": "http://192.0.2.10:8775", "secret": "current"}],
        "secret_file": "/x.secret",
        "next_secret_file": None,
        "networks": [],
        "projects": [],
        "ca_file": None,
        "verify": True,
        "server_name": None,
        "client_cert_file": None,
        "client_key_file": None,
        "host": None,
    }
}

RULES: dict[str, object] = {
    "endpoint": None,
    "tokens": "off",
    "openstack_tokens": None,
    "nocloud_tokens": None,
    "boot_grace_s": None,
    "seal_user_data": None,
    "refuse_forwarded": None,
    "hop_limit": None,
    "requests_per_s": None,
    "burst": None,
    "connections": None,
    "paths": {},
}


def _with(values: Mapping[str, object]) -> Settings:
    tree = Settings().model_dump(mode="json")
    for path, value in values.items():
        *sections, name = path.split(".")
        inner = tree
        for section in sections:
            inner = inner[section]
        inner[name] = value
    return Settings.model_validate(tree)


@pytest.mark.parametrize(
    ("path", "value", "change"),
    [
        ("namespace_proxy.debug", True, Change.NOTHING),
        ("log.level", "debug", Change.LIVE),
        ("policy.host.paths", {"/latest/user-data": "deny"}, Change.LIVE),
        ("sources.libvirt.networks", ["default"], Change.RESTART),
        ("metrics.haproxy_listen", None, Change.RELOAD),
        ("paths.runtime_dir", "/x", Change.RESTART),
    ],
)
def test_a_changed_setting_says_what_its_change_takes(
    path: str, value: object, change: Change
) -> None:
    changed = diff_settings(Settings(), _with({path: value}))
    assert changed == (SettingChange(path, SETTINGS[path].default, value, change),)


def test_an_endpoint_set_that_comes_or_goes_is_one_change() -> None:
    none, one = Settings(), _with({"nova.endpoint_sets": SETS})
    path, value = "nova.endpoint_sets.default", SETS["default"]

    assert diff_settings(none, one) == (SettingChange(path, None, value, Change.RELOAD),)
    assert diff_settings(one, none) == (SettingChange(path, value, None, Change.RELOAD),)


@pytest.mark.parametrize("path", ["policy.networks", "policy.projects", "policy.instances"])
def test_rules_for_one_id_that_come_or_go_are_one_change(path: str) -> None:
    none, one = Settings(), _with({path: {"x": RULES}})
    assert diff_settings(none, one) == (SettingChange(f"{path}.x", None, RULES, Change.LIVE),)
    assert diff_settings(one, none) == (SettingChange(f"{path}.x", RULES, None, Change.LIVE),)


def test_a_change_within_an_endpoint_set_is_told_by_its_settings() -> None:
    before = _with({"nova.endpoint_sets": SETS})
    endpoints = [{"url": "https://nova:1", "secret": "current"}]
    other = {**SETS["default"], "verify": False, "endpoints": endpoints}

    changes = diff_settings(before, _with({"nova.endpoint_sets": {"default": other}}))

    assert changes == (
        SettingChange(
            "nova.endpoint_sets.default.endpoints",
            SETS["default"]["endpoints"],
            endpoints,
            Change.RELOAD,
        ),
        SettingChange("nova.endpoint_sets.default.verify", True, False, Change.RELOAD),
    )


def test_equal_settings_take_nothing() -> None:
    assert diff_settings(Settings(), Settings()) == ()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_each_setting_is_documented(setting: Setting) -> None:
    assert len(setting.description) > 15
    assert setting.description.endswith(".")
    assert setting.takes
    assert "^" not in setting.takes, "a pattern says nothing to most people"
