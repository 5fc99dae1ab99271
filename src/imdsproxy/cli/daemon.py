"""The daemon's processes, others beside it (`hub`, `libvirt-hook`), and `check|bundle|render|reload|stop|version`."""

import gc
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Final, TextIO, cast

import typer

from imdsproxy import __version__
from imdsproxy.cli import options
from imdsproxy.cli.options import argument, flag
from imdsproxy.cli.output import BottomLine, Output, Shape, clean
from imdsproxy.errors import (
    AdminUnavailable,
    HostRefused,
    SettingsDropped,
    optional_library,
    spell_count,
)

_END_DEADLINE_S: Final = 40.0
_POLL_S: Final = 0.02


@options.config_command
def run(
    run: options.Invocation,
    *,
    container: Annotated[
        bool,
        flag(
            "--container",
            "Run as the program of a container: HAProxy and the document server end with the controller, and all "
            "log to standard error.",
        ),
    ] = False,
) -> None:
    """Run the controller in the foreground: apply sources to HAProxy and the documents."""
    # A start creates no garbage, and collecting takes 5 % of its time. The controller enables collection again.
    gc.disable()
    import imdsproxy.host.logs  # noqa: F401 - before all that logs
    from imdsproxy import start

    show = None
    if sys.stderr.isatty() and not container:
        line = BottomLine(sys.stderr)
        sys.stderr, show = cast("TextIO", line), line.show_start
    start.run(
        run.load,
        config=run.config,
        environment=dict(os.environ),
        container=container,
        show=show,
    )


@options.config_command
def documents(run: options.Invocation) -> None:
    """Run the document server in the foreground: answer guests from compiled records."""
    import imdsproxy.host.logs  # noqa: F401 - before all that logs
    from imdsproxy.documents.server import DocumentServer
    from imdsproxy.haproxy.layout import Layout
    from imdsproxy.host.account import find_account
    from imdsproxy.host.clock import Clock
    from imdsproxy.host.logs import open_logging
    from imdsproxy.host.notify import ServiceNotifier, is_journal

    settings = run.settings
    log, journal = settings.log, is_journal(sys.stderr, os.environ)
    open_logging(log.level, log.format, sys.stderr, clock=Clock(), journal=journal)
    layout = Layout.of(settings)
    DocumentServer(
        sockets=layout.documents_sockets,
        records=layout.records,
        passwords=layout.passwords,
        pid_file=layout.documents_pid,
        # NOTIFY_SOCKET is the service manager's variable, not a setting.
        notifier=ServiceNotifier(os.environ.get("NOTIFY_SOCKET", "")),
        log=layout.documents_log,
        account=find_account(settings.documents.user, settings.documents.group),
    ).run()


@options.config_command
def identity_server(run: options.Invocation) -> None:
    """Run the process that gives identity tokens to guests, in the foreground."""
    from imdsproxy.controller.identity import plan_service

    plan_service(run.settings).execute()


@options.config_command
def signer(
    run: options.Invocation,
    *,
    hub: Annotated[
        bool,
        flag("--hub", "Sign for a fleet, beside its hub, which brings the keys from etcd."),
    ] = False,
) -> None:
    """Run the signer of identity tokens in the foreground: the process that has the keys."""
    from imdsproxy.controller.identity import plan_signer

    plan_signer(run.settings, hub=hub).execute()


@options.bare_command
def namespace_proxy(
    run: options.Invocation,
    words: Annotated[
        list[str] | None,
        options.argument(
            "[OPTION]...",
            "Options of `neutron-ns-metadata-proxy`, which this command runs; --help lists them.",
        ),
    ] = None,
) -> int:
    """Run the metadata proxy of one network, as Neutron's agents spawn it in each namespace."""
    from imdsproxy.tools.namespace_proxy import main

    return main(words or [], program="imdsproxy namespace-proxy", config=run.config)


@options.host_command
def check(run: options.Invocation) -> None:
    """Check settings, HAProxy, privileges, namespaces, directories, ports, records, tokens and Nova; show all problems.

    The exit status is that of the first problem; warnings do not count.
    """
    from imdsproxy.tools.checks.every import run_checks

    # SIGTERM also ends the processes that the checks started, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
    findings = run_checks(run.load, run.socket)
    wrong = [one.exit_status for _, one in findings if not one.ok]
    rows = [
        {"area": area, "ok": one.ok, "warning": one.warning, "text": one.text, "hint": one.hint}
        for area, one in findings
    ]
    run.output.answer({"ok": not wrong, "findings": rows}, _show_findings)
    if wrong:
        raise typer.Exit(wrong[0])


def _show_findings(output: Output, shape: Shape) -> None:
    rows, wrong = [], 0
    for one in shape["findings"]:
        status = "[yellow]warning[/]" if one["warning"] else "[green]ok[/]"
        if not one["ok"]:
            status, wrong = "[red]wrong[/]", wrong + 1
        hint = f"\n[dim]{clean(one['hint'])}[/]" if one["hint"] else ""
        rows.append({"AREA": one["area"], "": status, "FINDING": clean(one["text"]) + hint})
    output.table(rows, keep=("AREA", ""))
    if wrong:
        output.styled(f"[bold red]{spell_count(wrong, 'problem')}[/]")


@options.host_command
def render(run: options.Invocation) -> None:
    """Show HAProxy's configuration as the daemon would write it now. Changes nothing."""
    text = str(run.daemon().get("/v1/haproxy-configuration"))
    run.output.answer({"haproxy_configuration": text}, text)


@options.host_command
def reload(
    run: options.Invocation,
    *,
    allow_dropped: Annotated[
        bool,
        flag(
            "--allow-dropped",
            "Accept that settings files were emptied or removed, or that every policy is missing.",
        ),
    ] = False,
) -> None:
    """Reload the settings. An invalid or empty file is refused, with the reason."""
    body = {"allow_dropped": True} if allow_dropped else None
    try:
        done = run.daemon().request("POST", "/v1/reload", body=body)
    except AdminUnavailable as error:
        if run.socket is None and (empty := sorted(run.load().empty)):
            # The empty file may have named the socket.
            raise SettingsDropped(
                f"{empty[0]} contains no settings, and {error.message}",
                hint="restore the file, or name the daemon's socket with --socket",
            ) from error
        raise
    run.output.answer(done, _show_reload)


def _show_reload(output: Output, done: Shape) -> None:
    how = {"reload": "[green]by a reload[/]", "restart": "[yellow]at the next restart[/]"}
    waiting = dict.fromkeys(done["restart_needed"], "restart")
    rows = (
        {
            "SETTING": clean(one["path"]),
            "BEFORE": clean(one["before"]),
            "NOW": clean(one["after"]),
            "APPLIED": how.get(waiting.get(one["path"], one["change"]), "[green]at once[/]"),
        }
        for one in done["changes"]
    )
    output.table(rows, empty="no setting has changed", keep=("SETTING",))
    if done["haproxy_reloaded"]:
        output.styled("HAProxy was reloaded.")
    if done["pending"]:
        pending = (f"  {clean(reason)}" for reason in done["pending"])
        output.styled("[yellow]HAProxy does not use these settings yet:[/]", *pending)


@options.host_command
def stop(
    run: options.Invocation,
    *,
    data_plane: Annotated[
        bool,
        flag("--data-plane", "Stop HAProxy and the document server too: guests get no answer."),
    ] = False,
) -> None:
    """Stop the controller; HAProxy still serves known guests. With --data-plane, stop everything."""
    daemon = run.daemon()
    try:
        answer = daemon.request("POST", "/v1/stop", body={"data_plane": data_plane})
        stopped = list(answer["stopping"])
        _wait_until_gone(daemon.socket, answer["controller"])
    except AdminUnavailable:
        # Without a controller, --data-plane still stops the data plane.
        if not data_plane:
            raise
        _stop_orphaned_data_plane(run, daemon.socket)
        stopped = []
    ended = ", ".join(stopped) or "the data plane (no controller ran)"
    run.output.answer({"stopped": stopped, "data_plane": data_plane}, f"stopped: {ended}")


def _stop_orphaned_data_plane(run: options.Invocation, asked: Path) -> None:
    import asyncio

    from imdsproxy.host.socket_file import find_socket_holder
    from imdsproxy.start import stop_data_plane

    settings = run.settings
    if settings.admin_socket != asked:
        # The settings belong to another daemon, whose data plane must keep running.
        raise AdminUnavailable(
            f"no daemon answers on {asked}, and the settings belong to another daemon",
            hint="use --config with the settings of that daemon, to stop its data plane",
        )
    hung = find_socket_holder(asked)
    if hung is not None:
        # A hanging controller would restart the data plane once it continues.
        raise HostRefused(
            f"the controller (pid {hung.pid or 'unknown'}) does not answer, so nothing was stopped",
            hint="stop the controller first (systemctl stop imdsproxy, or kill -KILL PID), then try again",
        )
    asyncio.run(stop_data_plane(settings, os.environ))


def _wait_until_gone(path: Path, pid: int) -> None:
    """Wait until the controller has removed its socket, its last action, or has died."""
    from imdsproxy.host.process import read_stat

    deadline = time.monotonic() + _END_DEADLINE_S
    while path.exists() and read_stat(pid) is not None:
        if time.monotonic() > deadline:
            raise HostRefused(
                f"the controller (pid {pid}) has not ended within {_END_DEADLINE_S:.0f} s",
                hint="the controller's log shows the reason",
            )
        time.sleep(_POLL_S)


@options.json_command
def version(run: options.Invocation) -> None:
    """Show the version of this program."""
    run.output.answer({"version": __version__}, f"imdsproxy {__version__}")


@options.config_command
def hub(run: options.Invocation) -> None:
    """Run a hub of a fleet in the foreground: send each host its records, and answer operators."""
    from imdsproxy.fleet.members import LIBRARY_HINT

    with optional_library("cryptography", LIBRARY_HINT):
        from imdsproxy.hub.hub import run as run_hub
    run_hub(run.settings, dict(os.environ))


@options.config_command
def libvirt_hook(
    run: options.Invocation,
    domain: Annotated[str, argument("DOMAIN", "The domain's name.")],
    operation: Annotated[
        str, argument("OPERATION", "migrate or release; other operations are ignored.")
    ],
    suboperation: Annotated[str, argument("SUBOPERATION", "begin or end.")],
    extra: Annotated[
        str, argument("EXTRA", "With release, the reason why the domain stopped.")
    ] = "-",
) -> None:
    """Handle a call of libvirt's hook, with the domain's XML on standard input: move an instance with its guest.

    Domains that are not instances of the fleet are ignored.
    """
    from imdsproxy.tools.migration import follow

    follow(run.settings, domain, operation, suboperation, extra)


@options.host_command
def bundle(
    run: options.Invocation,
    *,
    output: Annotated[
        Path | None,
        options.flag(
            "--output -o FILE",
            "The file to write, which must not exist (default: imdsproxy-HOST-DATE.tar.gz in this directory).",
        ),
    ] = None,
) -> None:
    """Collect settings, status, logs and HAProxy's state in one file, without secrets and user-data.

    Also works without a daemon; README.txt in the file lists the missing parts.
    """
    from imdsproxy.tools.bundle import make_bundle

    with run.output.waiting("collecting"):
        made = make_bundle(run.load, run.socket, output)
    shape = {
        "file": str(made.path),
        "parts": list(made.parts),
        "lacking": [{"part": one, "reason": reason} for one, reason in made.lacking],
    }
    run.output.answer(shape, _show_bundle)


def _show_bundle(output: Output, shape: Shape) -> None:
    output.styled(f"{clean(shape['file'])}: {spell_count(len(shape['parts']), 'part')}")
    rows = (
        {"LACKING": clean(one["part"]), "REASON": clean(one["reason"])} for one in shape["lacking"]
    )
    output.table(rows, apart=True, keep=("LACKING",))
    output.styled("Review the file before you share it: its README.txt lists what was removed.")
