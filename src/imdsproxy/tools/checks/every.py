"""All checks of a host, in display order."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from imdsproxy.api.client import AdminClient
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.errors import AdminUnavailable, ConfigError, HostRefused, ImdsproxyError
from imdsproxy.tools.checks import (
    Finding,
    Subject,
    found,
    guests,
    host,
    identity,
    openstack,
    refused,
)

_ADMIN_TIMEOUT_S: Final = 5

CHECKS: Final[tuple[tuple[str, tuple[Callable[[Subject], list[Finding]], ...]], ...]] = (
    ("settings", (host.check_settings, host.check_accounts)),
    ("haproxy", (host.check_haproxy,)),
    ("privileges", (host.check_privileges,)),
    ("namespaces", (host.check_namespaces, guests.check_networks)),
    ("daemon", (guests.check_daemon,)),
    ("macs", (guests.check_macs,)),
    ("paths", (guests.check_paths,)),
    ("directories", (host.check_directories, host.check_readers)),
    ("records", (guests.check_records,)),
    ("tokens", (guests.check_token_keys, guests.check_overrides, guests.check_trees)),
    ("tokens", (guests.check_path_rules, guests.check_hop_limits)),
    ("records", (guests.check_store,)),
    ("tokens", (guests.check_instances,)),
    ("identity", (identity.check_signing_key,)),
    ("nova", (openstack.check_secrets, openstack.check_certificates)),
    ("neutron", (openstack.check_clouds,)),
    ("nova", (openstack.check_endpoints,)),
    ("unix listener", (openstack.check_unix_listener,)),
    ("audit", (host.check_audit,)),
    ("ports", (host.check_ports,)),
)
"""Checks by area."""


def run_checks(load: Callable[[], Loaded], socket: Path | None) -> list[tuple[str, Finding]]:
    """Run all checks; return the findings with their areas. A check that the host refuses is a finding too.

    `socket`: the daemon's admin socket; `None` for that of the settings.
    """
    subject = _subject(load, socket)
    findings: list[tuple[str, Finding]] = []
    for area, check in ((area, check) for area, checks in CHECKS for check in checks):
        try:
            findings += [(area, one) for one in check(subject)]
        except HostRefused as error:
            findings += [("host", one) for one in refused(error)]
        except PermissionError as error:
            findings.append((area, found("path-closed", path=error.filename)))
    return findings


def _subject(load: Callable[[], Loaded], socket: Path | None) -> Subject:
    loaded: Loaded | ConfigError
    try:
        loaded = load()
        settings = loaded.settings
    except ConfigError as error:
        # The other checks use the defaults, so that one run shows as many problems as possible.
        loaded, settings = error, Settings()
    daemon = AdminClient(socket or settings.admin_socket, timeout_s=_ADMIN_TIMEOUT_S)
    try:
        return Subject(settings, loaded, daemon, daemon.get("/v1/status"))
    except AdminUnavailable:
        return Subject(settings, loaded)
    except ImdsproxyError as error:
        return Subject(settings, loaded, status=error)
