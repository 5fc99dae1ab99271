from __future__ import annotations

from collections.abc import Mapping

import pytest

from imdsproxy.config.change import Change
from imdsproxy.config.changes import Changed, diff_settings, needed
from imdsproxy.config.describe import Setting, iterate_inner_settings, iterate_settings
from imdsproxy.config.schema import Settings

SETTINGS = {setting.path: setting for setting in iterate_settings()}
INNER = {setting.path: setting for setting in iterate_inner_settings()}

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

# What another setting must say first, for some to be allowed.
BEFORE: dict[str, dict[str, object]] = {
    "sources.sqlite.enabled": {"sources.file.enabled": True},
    "sources.neutron.enabled": {"nova.endpoint_sets": SETS, "sources.neutron.cloud": "x"},
    "sources.neutron.clouds_file": {"sources.neutron.cloud": "x"},
}

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
    "documents.enabled": False,
    "documents.workers": 3,
    "documents.user": None,
    "documents.group": None,
    "documents.supervisor": "systemd",
    "documents.unit": "other.service",
    "documents.region": "other",
    "resolver.hold_s": 1.0,
    "resolver.max_held_per_network": 31,
    "resolver.max_held": 255,
    "resolver.learned_ttl_s": 29,
    "sources.file.enabled": True,
    "sources.file.directory": "/x",
    "sources.sqlite.enabled": False,
    "sources.sqlite.path": "/x/y.sqlite",
    "sources.neutron.enabled": True,
    "sources.neutron.cloud": "other",
    "sources.neutron.clouds_file": "/x/clouds.yaml",
    "sources.neutron.endpoint": "http://192.0.2.1:9696",
    "sources.neutron.timeout_s": 6.0,
    "sources.neutron.max_queries": 9,
    "sources.neutron.negative_ttl_s": 4.0,
    "sources.neutron.refresh_s": 11.0,
    "sources.neutron.lifetime_s": 3601.0,
    "sources.neutron.list_every_s": 60.0,
    "sources.neutron.list_host": "compute-1",
    "sources.neutron.page_size": 501,
    "sources.libvirt.enabled": True,
    "sources.libvirt.uri": "test:///default",
    "sources.libvirt.networks": ["default"],
    "sources.libvirt.domains": "marked",
    "sources.libvirt.reread_s": 60.0,
    "nova.endpoint_sets": SETS,
    "nova.connect_timeout_s": 3.0,
    "nova.response_timeout_s": 31.0,
    "nova.health_check": "tcp",
    "nova.health_check_interval_s": 3.0,
    "unix_listener.enabled": True,
    "unix_listener.path": "/x.sock",
    "unix_listener.take_over": True,
    "unix_listener.mode": "group",
    "unix_listener.user": "other",
    "unix_listener.group": "other",
    "unix_listener.directory_mode": "0750",
    "unix_listener.proxy_user": "1000",
    "unix_listener.proxy_group": "other",
    "unix_listener.maxconn": 1025,
    "namespace_proxy.state_path": "/x",
    "namespace_proxy.metadata_port": 80,
    "namespace_proxy.metadata_proxy_socket": "/x.sock",
    "namespace_proxy.metadata_proxy_user": "1000",
    "namespace_proxy.metadata_proxy_group": "other",
    "namespace_proxy.debug": True,
    "namespace_proxy.use_syslog": True,
    "namespace_proxy.syslog_log_facility": "LOG_USER",
    "policy.host.endpoint": False,
    "policy.host.tokens": "required",
    "policy.host.openstack_tokens": "required",
    "policy.host.nocloud_tokens": "off",
    "policy.host.boot_grace_s": 60,
    "policy.host.seal_user_data": True,
    "policy.host.refuse_forwarded": True,
    "policy.host.hop_limit": 1,
    "policy.host.requests_per_s": 1,
    "policy.host.burst": 1,
    "policy.host.connections": 1,
    "policy.host.paths": {"/latest/user-data": "deny"},
    "audit.mode": "all",
    "audit.sample": 7,
    "audit.destination": "/x.log",
    "limits.enabled": False,
    "limits.requests_per_s": 1,
    "limits.burst": 1,
    "limits.connections": 1,
    "limits.body_kib": 1,
    "policy.networks": {"red": RULES},
    "policy.projects": {"acme": RULES},
    "policy.instances": {"web": RULES},
    "tokens.count_reads": "all",
    "tokens.key_file": "/x.keys",
    "admin.socket": "/x.sock",
    "admin.mode": "0600",
    "admin.user": "other",
    "admin.group": "other",
    "metrics.listen": None,
    "metrics.haproxy_listen": None,
    "metrics.degraded": "not-ready",
    "metrics.network_series": 7,
    "host.name_prefix": "other",
    "host.audit_per_second": 0,
    "log.level": "debug",
    "log.format": "json",
}

# The contract with operators: changing this table changes what SIGHUP does.
TAKES: dict[Change, set[str]] = {
    Change.NOTHING: {path for path in OTHER if path.startswith("namespace_proxy.")},
    Change.LIVE: {
        "resolver.max_held_per_network",
        "resolver.max_held",
        "resolver.learned_ttl_s",
        "metrics.degraded",
        "metrics.network_series",
        "documents.region",
        "host.audit_per_second",
        "log.level",
        "log.format",
        "tokens.key_file",
        "audit.destination",
        *(path for path in OTHER if path.startswith("policy.")),
    },
    Change.RELOAD: {
        "resolver.hold_s",
        "haproxy.user",
        "haproxy.group",
        "haproxy.nbthread",
        "haproxy.maxconn_per_network",
        "haproxy.hard_stop_after_s",
        "audit.mode",
        "audit.sample",
        "limits.enabled",
        "limits.requests_per_s",
        "limits.burst",
        "limits.connections",
        "limits.body_kib",
        "haproxy.chroot",
        "haproxy.cache_mb",
        "haproxy.max_object_kib",
        "metrics.haproxy_listen",
        "tokens.count_reads",
        *(path for path in OTHER if path.startswith(("nova.", "unix_listener."))),
    },
}


# What is told by the name of each section that comes or goes.
BY_NAME = {"nova.endpoint_sets", "policy.networks", "policy.projects", "policy.instances"}


def _with(values: Mapping[str, object]) -> Settings:
    tree = Settings().model_dump(mode="json")
    for path, value in values.items():
        *sections, name = path.split(".")
        inner = tree
        for section in sections:
            inner = inner[section]
        inner[name] = value
    return Settings.model_validate(tree)


@pytest.mark.parametrize("path", [path for path in SETTINGS if path not in BY_NAME])
def test_each_setting_says_what_its_change_takes(path: str) -> None:
    before = BEFORE.get(path, {})

    (changed,) = diff_settings(_with(before), _with({**before, path: OTHER[path]}))

    expected = next((change for change, paths in TAKES.items() if path in paths), Change.RESTART)
    assert changed == Changed(path, SETTINGS[path].default, OTHER[path], expected)


def test_an_endpoint_set_that_comes_or_goes_is_one_change() -> None:
    none, one = Settings(), _with({"nova.endpoint_sets": SETS})
    path, value = "nova.endpoint_sets.default", SETS["default"]

    assert diff_settings(none, one) == (Changed(path, None, value, Change.RELOAD),)
    assert diff_settings(one, none) == (Changed(path, value, None, Change.RELOAD),)


@pytest.mark.parametrize("path", sorted(BY_NAME - {"nova.endpoint_sets"}))
def test_rules_for_one_id_that_come_or_go_are_one_change(path: str) -> None:
    none, one = Settings(), _with({path: {"x": RULES}})
    assert diff_settings(none, one) == (Changed(f"{path}.x", None, RULES, Change.LIVE),)
    assert diff_settings(one, none) == (Changed(f"{path}.x", RULES, None, Change.LIVE),)


def test_a_change_within_an_endpoint_set_is_told_by_its_settings() -> None:
    before = _with({"nova.endpoint_sets": SETS})
    endpoints = [{"url": "https://nova:1", "secret": "current"}]
    other = {**SETS["default"], "verify": False, "endpoints": endpoints}

    changes = diff_settings(before, _with({"nova.endpoint_sets": {"default": other}}))

    assert changes == (
        Changed(
            "nova.endpoint_sets.default.endpoints",
            SETS["default"]["endpoints"],
            endpoints,
            Change.RELOAD,
        ),
        Changed("nova.endpoint_sets.default.verify", True, False, Change.RELOAD),
    )


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


@pytest.mark.parametrize("setting", [*SETTINGS.values(), *INNER.values()], ids=[*SETTINGS, *INNER])
def test_each_setting_is_documented(setting: Setting) -> None:
    assert len(setting.description) > 15
    assert setting.description.endswith(".")
    assert setting.takes
    assert "^" not in setting.takes, "a pattern says nothing to most people"
