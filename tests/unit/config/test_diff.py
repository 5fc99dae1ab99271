from __future__ import annotations

import pytest

from imdsproxy.config.change import Change
from imdsproxy.config.diff import Changed, diff_settings, needed
from imdsproxy.config.schema import Settings
from imdsproxy.config.words import Setting, iterate_settings

SETTINGS = {setting.path: setting for setting in iterate_settings()}

# One other value for each setting; a new setting without one fails the test below.
OTHER: dict[str, object] = {
    "paths.runtime_dir": "/x",
    "paths.state_dir": "/x",
    "paths.netns_dir": "/x",
    "haproxy.binary": "/usr/local/sbin/haproxy",
    "haproxy.user": "other",
    "haproxy.group": "other",
    "haproxy.nbthread": 2,
    "haproxy.maxconn_per_network": 201,
    "haproxy.maxconn": 5000,
    "haproxy.hard_stop_after_s": 31,
    "haproxy.chroot": False,
    "haproxy.supervisor": "spawn",
    "haproxy.unit": "other.service",
    "haproxy.cache_mb": 65,
    "haproxy.max_object_kib": 512,
    "documents.workers": 3,
    "documents.user": None,
    "documents.group": None,
    "documents.supervisor": "systemd",
    "documents.unit": "other.service",
    "resolver.hold_s": 1.0,
    "resolver.max_held_per_network": 31,
    "resolver.max_held": 255,
    "resolver.learned_ttl_s": 29,
    "sources.file.enabled": True,
    "sources.file.directory": "/x",
    "sources.sqlite.enabled": False,
    "sources.sqlite.path": "/x/y.sqlite",
    "admin.socket": "/x.sock",
    "admin.mode": "0600",
    "admin.user": "other",
    "admin.group": "other",
    "metrics.listen": None,
    "metrics.haproxy_listen": None,
    "metrics.network_series": 7,
    "host.name_prefix": "other",
    "host.audit_per_second": 0,
    "log.level": "debug",
    "log.format": "json",
}

# The contract with operators: changing this table changes what SIGHUP does.
TAKES: dict[Change, set[str]] = {
    Change.LIVE: {
        "resolver.max_held_per_network",
        "resolver.max_held",
        "resolver.learned_ttl_s",
        "metrics.network_series",
        "host.audit_per_second",
        "log.level",
        "log.format",
    },
    Change.RELOAD: {
        "resolver.hold_s",
        "haproxy.user",
        "haproxy.group",
        "haproxy.nbthread",
        "haproxy.maxconn_per_network",
        "haproxy.hard_stop_after_s",
        "haproxy.chroot",
        "haproxy.cache_mb",
        "haproxy.max_object_kib",
        "metrics.haproxy_listen",
    },
}


def _with(path: str, value: object) -> Settings:
    tree = Settings().model_dump(mode="json")
    if path == "sources.sqlite.enabled":
        tree["sources"]["file"]["enabled"] = True
    *sections, name = path.split(".")
    inner = tree
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return Settings.model_validate(tree)


@pytest.mark.parametrize("path", SETTINGS)
def test_each_setting_says_what_its_change_takes(path: str) -> None:
    base = _with("sources.file.enabled", True) if path == "sources.sqlite.enabled" else Settings()

    (changed,) = diff_settings(base, _with(path, OTHER[path]))

    expected = next((change for change, paths in TAKES.items() if path in paths), Change.RESTART)
    assert changed == Changed(path, SETTINGS[path].default, OTHER[path], expected)


def test_the_table_names_only_settings_there_are() -> None:
    assert set().union(*TAKES.values()) <= SETTINGS.keys()
    assert OTHER.keys() == SETTINGS.keys()


def test_equal_settings_take_nothing() -> None:
    assert diff_settings(Settings(), Settings()) == ()
    assert needed(()) is Change.NOTHING


def test_the_most_that_any_change_takes_counts() -> None:
    live = Changed("a", 1, 2, Change.LIVE)
    reload = Changed("b", 1, 2, Change.RELOAD)

    assert needed([live]) is Change.LIVE
    assert needed([live, reload, live]) is Change.RELOAD
    assert needed([reload, Changed("c", 1, 2, Change.RESTART)]) is Change.RESTART


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_each_setting_is_documented(setting: Setting) -> None:
    assert len(setting.description) > 15
    assert setting.description.endswith(".")
    assert setting.takes
