"""Every option of Neutron's metadata path, and what becomes of it: data for the import and for its reference page.

Names, types and defaults are those of neutron/conf/agent/metadata/config.py, neutron/conf/agent/common.py,
neutron/conf/agent/l3/config.py, neutron/conf/agent/dhcp.py, neutron/conf/agent/ovn/metadata/config.py,
neutron/conf/plugins/ml2/drivers/{ovs_conf,ovn/ovn_conf}.py and nova/conf/{api,neutron}.py. It is long because it is
one table: nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from imdsproxy.config.neutron_option import (
    ANY,
    COUNT,
    FLAG,
    IP_VERSIONS,
    LIST,
    NUMBER,
    PORT,
    TEXT,
    Fate,
    Kind,
    NeutronOption,
    integer,
    one_of,
)

__all__ = ["NEUTRON_OPTIONS", "NOVA"]

_AGENT: Final = "metadata agent"
_FRONT: Final = "agents' proxies"
_L3: Final = "L3 agent"
_DHCP: Final = "DHCP agent"
_OVS: Final = "OVS agent"
_OVN: Final = "OVN agents"
NOVA: Final = "Nova"
_HISTORIC: Final = "removed"

_SET: Final = "nova.endpoint_sets.default"
_URL: Final = f"{_SET}.endpoints[0].url"


def _taken(  # noqa: PLR0917 - one row of the table
    section: str,
    name: str,
    default: str,
    kind: Kind,
    becomes: str,
    why: str,
    *,
    whose: str = _AGENT,
    deprecated: tuple[tuple[str, str], ...] = (),
    secret: bool = False,
) -> NeutronOption:
    return NeutronOption(
        whose, section, name, default, kind, Fate.TAKEN, becomes, why, deprecated, secret
    )


def _none(  # noqa: PLR0917 - one row of the table
    whose: str, section: str, name: str, default: str, kind: Kind, why: str, *, secret: bool = False
) -> NeutronOption:
    return NeutronOption(whose, section, name, default, kind, Fate.NONE, "", why, secret=secret)


def _by_hand(  # noqa: PLR0917 - one row of the table
    whose: str, section: str, name: str, default: str, kind: Kind, becomes: str, why: str
) -> NeutronOption:
    return NeutronOption(whose, section, name, default, kind, Fate.BY_HAND, becomes, why)


_UPSTREAM: Final = (
    _taken(
        "DEFAULT",
        "nova_metadata_host",
        "127.0.0.1",
        TEXT,
        _URL,
        "Its host. Several APIs, which Neutron does not have, are further `endpoints`.",
        deprecated=(("DEFAULT", "nova_metadata_ip"),),
    ),
    _taken("DEFAULT", "nova_metadata_port", "8775", PORT, _URL, "Its port."),
    _taken(
        "DEFAULT", "nova_metadata_protocol", "http", one_of("http", "https"), _URL, "Its scheme."
    ),
    _taken(
        "DEFAULT",
        "nova_metadata_insecure",
        "false",
        FLAG,
        f"{_SET}.verify",
        "The other way round: true becomes `verify: false`.",
    ),
    _taken("DEFAULT", "auth_ca_cert", "", TEXT, f"{_SET}.ca_file", "The same file."),
    _taken(
        "DEFAULT",
        "nova_client_cert",
        "",
        TEXT,
        f"{_SET}.client_cert_file",
        "The same file; only together with `nova_client_priv_key`, as in Neutron.",
    ),
    _taken(
        "DEFAULT",
        "nova_client_priv_key",
        "",
        TEXT,
        f"{_SET}.client_key_file",
        "The same file; only together with `nova_client_cert`, as in Neutron.",
    ),
    _taken(
        "DEFAULT",
        "metadata_proxy_shared_secret",
        "",
        TEXT,
        f"{_SET}.secret_file",
        "Its value goes into a file of its own, never into the YAML. An empty one is refused: every guest could "
        "forge it.",
        secret=True,
    ),
)

_SOCKET: Final = (
    _taken(
        "DEFAULT",
        "metadata_proxy_socket",
        "$state_path/metadata_proxy",
        TEXT,
        "unix_listener.path",
        "The same path: the agents' proxies go on connecting to it.",
    ),
    _taken(
        "DEFAULT",
        "metadata_proxy_socket_mode",
        "deduce",
        one_of("deduce", "user", "group", "all"),
        "unix_listener.mode",
        "The same word. It has an effect again: Neutron has ignored it since 2025.1.",
    ),
    _taken(
        "DEFAULT",
        "metadata_proxy_user",
        "",
        TEXT,
        "unix_listener.proxy_user",
        "The same account; empty is the agents' own, which `unix_listener.user` then is.",
    ),
    _taken(
        "DEFAULT",
        "metadata_proxy_group",
        "",
        TEXT,
        "unix_listener.proxy_group",
        "The same group; empty is the agents' own, which `unix_listener.group` then is.",
    ),
    _taken(
        "DEFAULT",
        "state_path",
        "/var/lib/neutron",
        TEXT,
        "unix_listener.path",
        "Where `metadata_proxy_socket` refers to it.",
    ),
    _taken(
        "metadata_haproxy",
        "timeout_server",
        "32",
        COUNT,
        "nova.response_timeout_s",
        "Two seconds less, so that a guest gets imdsproxy's 503 with Retry-After before its proxy gives up; only "
        "where it is set.",
        whose=_FRONT,
    ),
)

_IN_FRONT: Final = (
    "How long the proxy of a network waits for its guests and for the socket is the agent's affair; imdsproxy's own "
    "listeners have fixed times."
)
_LIMITS: Final = (
    "The agents' proxies go on limiting by address, since it is they who read this. Beside that `limits` bounds what "
    "an instance may ask for, and `haproxy.maxconn_per_network` what a network can take."
)
_CACHE: Final = (
    "Neutron has not read it since 2025.1. What a guest's address stands for is kept in HAProxy's maps, and asked for "
    "again by `sources.neutron.refresh_s`."
)
_HEARTBEAT: Final = (
    "imdsproxy is no agent and reports to nobody: `/livez`, `/readyz` and `/metrics` say how it is."
)
_PROCESSES: Final = (
    "imdsproxy starts nothing for each network. The agents that do go on reading it; HAProxy itself is kept up by "
    "systemd or the controller."
)
_DISTRIBUTED: Final = "The OVS agent's distributed path leads guests to Nova past every agent, and past imdsproxy too."
_SOUTHBOUND: Final = (
    "Ports are learned from Neutron's API (`sources.neutron`), not from OVN's Southbound database."
)
_REDIRECT: Final = (
    "The L3 agent goes on reading it: it redirects guests to its own proxy, in front."
)
_ISOLATED: Final = (
    "The DHCP agent goes on reading it: it decides which networks get a proxy in front."
)

_WITHOUT: Final = (
    _none(
        _AGENT,
        "DEFAULT",
        "metadata_workers",
        "half of the CPUs; 0 with OVN",
        integer(0),
        "Requests are answered by HAProxy, which one thread is enough for; `haproxy.nbthread` are its threads.",
    ),
    _none(
        _AGENT,
        "DEFAULT",
        "metadata_backlog",
        "4096",
        COUNT,
        "HAProxy's queue is as long as `unix_listener.maxconn`. Neutron has not heeded this since 2025.1.",
    ),
    _none(_FRONT, "DEFAULT", "external_pids", "$state_path/external/pids", TEXT, _PROCESSES),
    _by_hand(
        _AGENT,
        "DEFAULT",
        "host",
        "the host's name",
        TEXT,
        "sources.neutron.list_host",
        "The name to list ports by, where `sources.neutron.list_every_s` is set; imdsproxy reports under none.",
    ),
    _none(
        _AGENT,
        "DEFAULT",
        "rpc_response_max_timeout",
        "600",
        COUNT,
        "There is no RPC: Neutron's API is asked, for `sources.neutron.timeout_s` at most.",
    ),
    _none(_AGENT, "DEFAULT", "agent_down_time", "75", integer(0), _HEARTBEAT),
    _none(_FRONT, "metadata_rate_limiting", "rate_limit_enabled", "false", FLAG, _LIMITS),
    _none(
        _FRONT,
        "metadata_rate_limiting",
        "ip_versions",
        "4",
        IP_VERSIONS,
        _LIMITS,
    ),
    *(
        _none(_FRONT, "metadata_rate_limiting", name, "10", COUNT, _LIMITS)
        for name in (
            "base_window_duration",
            "base_query_rate_limit",
            "burst_window_duration",
            "burst_query_rate_limit",
        )
    ),
    _none(
        _FRONT,
        "metadata_haproxy",
        "timeout_connect",
        "30",
        COUNT,
        "It is the proxy's wait for the socket. imdsproxy's wait for Nova is `nova.connect_timeout_s`.",
    ),
    *(
        _none(_FRONT, "metadata_haproxy", name, default, COUNT, _IN_FRONT)
        for name, default in (
            ("timeout_client", "32"),
            ("timeout_http_request", "30"),
            ("timeout_http_keep_alive", "30"),
        )
    ),
    _none(_AGENT, "cache", "enabled", "false", FLAG, _CACHE),
    _none(_AGENT, "cache", "backend", "dogpile.cache.null", TEXT, _CACHE),
    _none(_AGENT, "cache", "expiration_time", "600", integer(0), _CACHE),
    _none(
        _AGENT,
        "AGENT",
        "report_interval",
        "30",
        NUMBER,
        _HEARTBEAT,
    ),
    _none(_AGENT, "AGENT", "log_agent_heartbeats", "false", FLAG, _HEARTBEAT),
    _none(_FRONT, "AGENT", "check_child_processes_interval", "60", integer(0), _PROCESSES),
    _none(
        _FRONT,
        "AGENT",
        "check_child_processes_action",
        "respawn",
        one_of("respawn", "exit"),
        _PROCESSES,
    ),
    _none(_FRONT, "AGENT", "kill_scripts_path", "/etc/neutron/kill_scripts/", TEXT, _PROCESSES),
    _none(_FRONT, "AGENT", "root_helper", "sudo", TEXT, _PROCESSES),
    _none(_FRONT, "AGENT", "root_helper_daemon", "", TEXT, _PROCESSES),
    _none(_FRONT, "AGENT", "use_helper_for_ns_read", "true", FLAG, _PROCESSES),
    _none(_L3, "DEFAULT", "enable_metadata_proxy", "true", FLAG, _REDIRECT),
    _none(_L3, "DEFAULT", "metadata_port", "9697", PORT, _REDIRECT),
    _none(_L3, "DEFAULT", "metadata_access_mark", "0x1", TEXT, _REDIRECT),
    _none(_DHCP, "DEFAULT", "enable_isolated_metadata", "false", FLAG, _ISOLATED),
    _none(_DHCP, "DEFAULT", "force_metadata", "false", FLAG, _ISOLATED),
    _none(_DHCP, "DEFAULT", "enable_metadata_network", "false", FLAG, _ISOLATED),
    _none(_OVS, "METADATA", "provider_cidr", "240.0.0.0/16", TEXT, _DISTRIBUTED),
    _none(_OVS, "METADATA", "provider_vlan_id", "1", integer(1, 4094), _DISTRIBUTED),
    _none(_OVS, "METADATA", "provider_base_mac", "fa:16:ee:00:00:00", TEXT, _DISTRIBUTED),
    _none(_OVS, "METADATA", "host_proxy_listen_port", "80", PORT, _DISTRIBUTED),
)

_AGAIN: Final = tuple(
    replace(
        one,
        whose=_OVS,
        section="METADATA",
        fate=Fate.NONE,
        becomes="",
        why=_DISTRIBUTED,
        deprecated=(),
    )
    for one in _UPSTREAM
)
"""The same options once more, for that path."""

_OF_OVN: Final = (
    _none(
        "Neutron's server",
        "ovn",
        "ovn_metadata_enabled",
        "false",
        FLAG,
        "Neutron's server goes on reading it: it makes the ports by which guests reach the host.",
    ),
    _none(
        _OVN,
        "ovn",
        "ovn_sb_connection",
        "tcp:127.0.0.1:6642",
        LIST,
        f"{_SOUTHBOUND} One of `ovn_sb_…`, or a file with `ovn` in its name, says that the agent is OVN's, which has "
        "to run on: `unix_listener.take_over` becomes true.",
    ),
    _none(_OVN, "ovn", "ovn_sb_private_key", "", TEXT, _SOUTHBOUND),
    _none(_OVN, "ovn", "ovn_sb_certificate", "", TEXT, _SOUTHBOUND),
    _none(_OVN, "ovn", "ovn_sb_ca_cert", "", TEXT, _SOUTHBOUND),
    _none(_OVN, "ovn", "ovsdb_connection_timeout", "180", integer(0), _SOUTHBOUND),
    _none(_OVN, "ovn", "ovsdb_retry_max_interval", "180", integer(0), _SOUTHBOUND),
    _none(_OVN, "ovn", "ovsdb_probe_interval", "60000", integer(0), _SOUTHBOUND),
    _none(
        _OVN,
        "ovn",
        "ovsdb_log_level",
        "INFO",
        one_of("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG"),
        _SOUTHBOUND,
    ),
    _none(
        _OVN,
        "ovs",
        "ovsdb_connection",
        "unix:/usr/local/var/run/openvswitch/db.sock",
        TEXT,
        "imdsproxy puts no ports into Open vSwitch: the agent that does goes on reading it.",
    ),
    _none(
        _OVN,
        "ovs",
        "ovsdb_connection_timeout",
        "180",
        integer(0),
        "imdsproxy puts no ports into Open vSwitch: the agent that does goes on reading it.",
    ),
    _none(
        _OVN,
        "agent",
        "extensions",
        "",
        LIST,
        "Which parts the agent has is its own affair. With `metadata` among them it opens the socket itself.",
    ),
)

_OF_NOVA: Final = (
    _by_hand(
        NOVA,
        "neutron",
        "service_metadata_proxy",
        "false",
        FLAG,
        "",
        "It stays in Nova, and has to be true where Nova's metadata API runs: it makes Nova take signed requests.",
    ),
    NeutronOption(
        NOVA,
        "neutron",
        "metadata_proxy_shared_secret",
        "",
        TEXT,
        Fate.TAKEN,
        f"{_SET}.secret_file",
        "Where Neutron's files have none; one that differs from Neutron's is refused.",
        secret=True,
    ),
    _none(
        NOVA,
        "api",
        "metadata_cache_expiration",
        "15",
        integer(0),
        "It stays in Nova. imdsproxy keeps no answer of Nova's.",
    ),
    _by_hand(
        NOVA,
        "api",
        "local_metadata_per_cell",
        "false",
        FLAG,
        "nova.endpoint_sets",
        "It stays in Nova. Where true, each cell's APIs are an endpoint set, with `networks` or `projects`.",
    ),
    _none(
        NOVA,
        "api",
        "dhcp_domain",
        "novalocal",
        TEXT,
        "It stays in Nova, which makes hostnames of it.",
    ),
)

_RPC: Final = (
    "Of the agent before it asked Neutron by RPC: not read since Liberty. How Neutron's API is reached is in "
    "clouds.yaml."
)
_OF_OLD: Final = (
    _none(
        _HISTORIC,
        "DEFAULT",
        "cache_url",
        "memory://?default_ttl=5",
        ANY,
        "Removed in Newton for `[cache]`. What a guest's address stands for is kept in HAProxy's maps.",
    ),
    _none(
        _HISTORIC,
        "DEFAULT",
        "metadata_proxy_watch_log",
        "true",
        ANY,
        "Removed with the proxy written in Python. HAProxy has no log file that would have to be watched.",
    ),
    _none(
        _HISTORIC,
        "DEFAULT",
        "metadata_proxy_num_threads",
        "1000",
        ANY,
        "Removed with the proxy written in Python. HAProxy needs no thread for each request.",
    ),
    *(
        _none(_HISTORIC, "DEFAULT", name, default, ANY, _RPC, secret=name == "admin_password")
        for name, default in (
            ("auth_url", ""),
            ("auth_region", ""),
            ("auth_insecure", "false"),
            ("admin_user", ""),
            ("admin_password", ""),
            ("admin_tenant_name", ""),
            ("endpoint_type", "adminURL"),
            ("endpoint_url", ""),
        )
    ),
)


def _all() -> Iterator[NeutronOption]:
    yield from _UPSTREAM
    yield from _SOCKET
    yield from _WITHOUT
    yield from _AGAIN
    yield from _OF_OVN
    yield from _OF_NOVA
    yield from _OF_OLD


NEUTRON_OPTIONS: Final = tuple(_all())
"""Each option once."""
