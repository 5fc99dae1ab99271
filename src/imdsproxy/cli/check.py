"""`imdsproxy check`: everything that is wrong before it runs, at once."""

from __future__ import annotations

import grp
import os
import pwd
import signal
import socket as sockets
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from imdsproxy.cli import options
from imdsproxy.cli.output import Column, Output, clean
from imdsproxy.errors import (
    AdminUnavailable,
    ConfigError,
    HaproxyMissing,
    HostRefused,
    ImdsproxyError,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping, Sequence

    from imdsproxy.cli.preflight import Finding
    from imdsproxy.config.endpoint import Endpoint
    from imdsproxy.config.nova_url import NovaUrl
    from imdsproxy.config.schema import Settings
    from imdsproxy.dataplane.launch import HaproxyProgram


def check(
    context: typer.Context,
    *,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """Settings, HAProxy, privileges, namespaces, directories, ports, records, tokens, Nova: all problems at once.

    The exit status is that of the first problem; a warning is none.
    """
    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    # Ended by SIGTERM it takes with it what it has started, as it does after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
    findings = _ask(run)
    if run.output.as_json:
        run.output.json(
            {
                "ok": all(finding.ok for finding in findings),
                "findings": [
                    {
                        "area": finding.area,
                        "ok": finding.ok,
                        "warning": finding.warning,
                        "text": finding.text,
                        "hint": finding.hint,
                    }
                    for finding in findings
                ],
            }
        )
    else:
        show_findings(run.output, findings)
    worst = next((finding.exit_status for finding in findings if not finding.ok), 0)
    if worst:
        raise typer.Exit(worst)


def show_findings(output: Output, findings: Sequence[Finding]) -> None:
    """A line each: what is wrong first in colour, and what helps."""
    columns = (Column("AREA", keep=True), Column("", keep=True), Column("FINDING"))
    rows = [
        (
            finding.area,
            _word(finding),
            clean(finding.text) + (f"\n[dim]{clean(finding.hint)}[/]" if finding.hint else ""),
        )
        for finding in findings
    ]
    output.table(columns, rows, empty="")
    wrong = sum(not finding.ok for finding in findings)
    if wrong:
        output.styled(f"[bold red]{wrong} problem{'s' if wrong > 1 else ''}[/]")


def _word(finding: Finding) -> str:
    if not finding.ok:
        return "[red]wrong[/]"
    return "[yellow]warning[/]" if finding.warning else "[green]ok[/]"


def _ask(run: options.Invocation) -> list[Finding]:
    from imdsproxy.cli import preflight  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.config.schema import Settings  # noqa: PLC0415 - as above

    findings: list[Finding] = []
    try:
        loaded = run.load()
        settings = loaded.settings
        files = ", ".join(str(path) for path in loaded.files) or "no file: all defaults"
        findings.append(preflight.Finding("settings", files))
        findings += preflight.check_empty(loaded)
    except ConfigError as error:
        # The rest is asked with the defaults: one run shows as much as can be shown.
        findings += preflight.findings_of("settings", error)
        settings = Settings()
    status, told = _daemon(run, settings)
    findings += preflight.check_accounts(_accounts(settings), _account_exists)
    findings += preflight.check_haproxy(
        _program(settings.haproxy.binary),
        exporter_wanted=settings.metrics.haproxy_listen is not None,
    )
    own = Path("/proc/self/status").read_text(encoding="utf-8")
    findings += preflight.check_privileges(preflight.read_capabilities(own))
    findings += preflight.check_namespaces(settings.paths.netns_dir)
    findings += told
    for look in (_macs, _paths):
        try:
            findings += look(run, settings, reachable=status is not None)
        except HostRefused as error:
            findings += preflight.findings_of("host", error)
    findings += preflight.check_directories(
        {
            "paths.runtime_dir": settings.paths.runtime_dir,
            "paths.state_dir": settings.paths.state_dir,
            **_socket_directory(settings),
        },
        lambda path: os.access(path, os.W_OK | os.X_OK),
    )
    findings += _readers(settings)
    findings += preflight.check_records(settings)
    findings += _tokens(settings)
    findings += _open_records(run, settings, reachable=status is not None)
    findings += _openstack(settings)
    findings += _audit(settings)
    if status is None:
        findings += preflight.check_ports(
            {
                "metrics.listen": settings.metrics.listen,
                "metrics.haproxy_listen": settings.metrics.haproxy_listen,
            },
            _bind_refused,
        )
    return findings


def _macs(run: options.Invocation, settings: Settings, *, reachable: bool) -> list[Finding]:
    if os.geteuid() != 0:
        return []
    from imdsproxy.anti_spoofing.bridge_ports import (  # noqa: PLC0415 - as above
        observe_bridge,
        read_rules,
        try_mac_filter,
    )
    from imdsproxy.cli import preflight_macs  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.cli.admin_client import AdminClient  # noqa: PLC0415 - as above
    from imdsproxy.core.hostnames import Naming  # noqa: PLC0415 - as above

    found = [preflight_macs.check_kernel(try_mac_filter())]
    if not reachable:
        return found
    daemon = AdminClient(run.socket or settings.admin_socket, timeout_s=5)
    networks = cast("Sequence[Mapping[str, Mapping[str, object]]]", daemon.get("/v1/networks"))
    devices = preflight_macs.checked_devices(one["record"] for one in networks)
    if devices:
        rules, naming = read_rules(), Naming(settings.host.name_prefix)
        seen = {device: observe_bridge(device, rules, naming) for device in devices}
        found += preflight_macs.check_bridges(seen)
    return found


def _paths(run: options.Invocation, settings: Settings, *, reachable: bool) -> list[Finding]:
    if os.geteuid() != 0 or not reachable:
        return []
    from imdsproxy.cli import preflight_paths  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.cli.admin_client import AdminClient  # noqa: PLC0415 - as above
    from imdsproxy.cli.records_read import read_networks  # noqa: PLC0415 - as above
    from imdsproxy.host import firewall  # noqa: PLC0415 - as above

    daemon = AdminClient(run.socket or settings.admin_socket, timeout_s=5)
    return preflight_paths.check_paths(
        read_networks(daemon),
        firewall.read_dropping_chains(),
        firewall.leads_by,
        bridged_are_forwarded=firewall.passes_forward_chain(),
    )


def _readers(settings: Settings) -> list[Finding]:
    """Whether the accounts that will read can enter the directories, tried as these accounts."""
    from imdsproxy.cli import preflight  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.dataplane.layout import Layout  # noqa: PLC0415 - as above
    from imdsproxy.serving.account import find_account, find_closed  # noqa: PLC0415 - as above

    layout = Layout(settings.paths.runtime_dir, settings.paths.state_dir)
    documents, haproxy = settings.documents, settings.haproxy
    wanted = {}
    if documents.enabled:
        reader = (documents.user, documents.group)
        wanted["paths.state_dir"] = (layout.records, reader, "documents.user")
    if not haproxy.chroot:
        # Locked in, its worker asks for nothing above its root directory.
        wanted["paths.runtime_dir"] = (layout.jail, (haproxy.user, haproxy.group), "haproxy.user")
    found: list[Finding] = []
    for setting, (path, (user, group), who) in wanted.items():
        try:
            account = find_account(user, group)
        except HostRefused:
            # The accounts have a finding of their own.
            continue
        closed = None if account is None else find_closed(account, path)
        found += preflight.check_reader(setting, f"{who} ({user})", closed)
    return found


def _tokens(settings: Settings) -> list[Finding]:
    from imdsproxy.cli import preflight_tokens  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.dataplane.layout import Layout  # noqa: PLC0415 - as above

    layout = Layout(settings.paths.runtime_dir, settings.paths.state_dir)
    book = settings.policy.book()
    return [
        *preflight_tokens.check_token_keys(settings, layout.token_keys),
        *preflight_tokens.check_guards(layout.guards),
        *preflight_tokens.check_trees(book),
        *preflight_tokens.check_path_rules(book),
        *preflight_tokens.check_hop_limits(book, unix_listener=settings.unix_listener.enabled),
    ]


def _audit(settings: Settings) -> list[Finding]:
    from imdsproxy.cli.preflight_audit import check_audit  # noqa: PLC0415 - `--help` need not load it

    return check_audit(settings.audit)


def _open_records(run: options.Invocation, settings: Settings, *, reachable: bool) -> list[Finding]:
    """Of the daemon's instances where it runs, else of those in record files and in the store."""
    from imdsproxy.cli import preflight, preflight_tokens  # noqa: PLC0415 - `--help` need not load it

    if reachable:
        from imdsproxy.cli.admin_client import AdminClient  # noqa: PLC0415 - as above

        daemon = AdminClient(run.socket or settings.admin_socket, timeout_s=5)
        told = cast("Mapping[str, object]", daemon.get("/v1/token-report"))
        trees = cast("Sequence[Mapping[str, str]]", told["open_trees"])
        named = [(one["instance"], one["network"], one["tree"]) for one in trees]
        return preflight_tokens.check_instances_trees(named, cast("int", told["open_tree_count"]))
    from imdsproxy.core.records.document import Records  # noqa: PLC0415 - as above
    from imdsproxy.sources.sqlite_reading import read_store  # noqa: PLC0415 - as above

    sources, records = settings.sources, list[Records]()
    if sources.file.enabled and sources.file.directory.is_dir():
        files = preflight.read_record_files(sources.file.directory)
        records += [held for _, held in files if isinstance(held, Records)]
    found: list[Finding] = []
    if sources.sqlite.enabled:
        try:
            records.append(read_store(settings.store_path))
        except ImdsproxyError as error:
            found += preflight.findings_of("records", error)
    return found + preflight_tokens.check_records_trees(records, settings.policy.book())


def _openstack(settings: Settings) -> list[Finding]:
    from imdsproxy.cli import preflight_openstack  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.dataplane.layout import Layout  # noqa: PLC0415 - as above
    from imdsproxy.host.unixsockets import find_unix_listener  # noqa: PLC0415 - as above

    layout = Layout(settings.paths.runtime_dir, settings.paths.state_dir)
    return [
        *preflight_openstack.check_secrets(settings),
        *preflight_openstack.check_certificates(settings),
        *preflight_openstack.check_clouds(settings),
        *preflight_openstack.check_endpoints(
            settings,
            lambda url, context, name: _unreachable(
                url, context, name, settings.nova.connect_timeout_s
            ),
        ),
        *preflight_openstack.check_unix_listener(settings, find_unix_listener, layout.config),
    ]


def _unreachable(
    url: NovaUrl, context: ssl.SSLContext | None, name: str, timeout_s: float
) -> str | None:
    """Why there is no connection; for https with all that a request would need."""
    try:
        with sockets.create_connection((url.host, url.port), timeout_s) as plain:
            if context is not None:
                with context.wrap_socket(plain, server_hostname=name):
                    pass
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return getattr(error, "verify_message", "") or error.strerror or str(error)
    return None


def _socket_directory(settings: Settings) -> dict[str, Path]:
    listener = settings.unix_listener
    return {"unix_listener.path": listener.path.parent} if listener.enabled else {}


def _daemon(
    run: options.Invocation, settings: Settings
) -> tuple[Mapping[str, object] | None, list[Finding]]:
    """The running daemon's status, or none, and what that says."""
    from imdsproxy.cli import preflight  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.cli.admin_client import AdminClient  # noqa: PLC0415 - as above

    daemon = AdminClient(run.socket or settings.admin_socket, timeout_s=5)
    try:
        status = cast("Mapping[str, object]", daemon.get("/v1/status"))
    except AdminUnavailable:
        return None, []
    except ImdsproxyError as error:
        return None, preflight.findings_of("daemon", error)
    return status, preflight.check_daemon(status)


def _program(binary: str) -> HaproxyProgram | HaproxyMissing:
    import asyncio  # noqa: PLC0415 - `--help` need not load it

    from imdsproxy.dataplane.launch import read_program  # noqa: PLC0415 - as above

    try:
        return asyncio.run(read_program(binary))
    except HaproxyMissing as error:
        return error


def _accounts(settings: Settings) -> list[tuple[str, str]]:
    wanted = {
        "haproxy.user": settings.haproxy.user,
        "haproxy.group": settings.haproxy.group,
        "documents.user": settings.documents.user,
        "documents.group": settings.documents.group,
        "admin.user": settings.admin.user,
        "admin.group": settings.admin.group,
    }
    if settings.unix_listener.enabled:
        wanted |= {
            f"unix_listener.{name}": getattr(settings.unix_listener, name)
            for name in ("user", "group", "proxy_user", "proxy_group")
        }
    # A number is an id, for which there need be no account.
    return [
        (key, name) for key, name in wanted.items() if name is not None and not name.isdecimal()
    ]


def _account_exists(kind: str, name: str) -> bool:
    try:
        if kind == "user":
            pwd.getpwnam(name)
        else:
            grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _bind_refused(endpoint: Endpoint) -> str | None:
    family = sockets.AF_INET6 if ":" in endpoint.host else sockets.AF_INET
    with sockets.socket(family, sockets.SOCK_STREAM) as listener:
        listener.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        try:
            listener.bind((endpoint.host, endpoint.port))
        except OSError as error:
            return error.strerror or str(error)
    return None
