"""`imdsproxy check|doctor`: all that is wrong before it runs, and for which clients answers would be wrong."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from imdsproxy.cli import options
from imdsproxy.cli.output import clean

if TYPE_CHECKING:
    from imdsproxy.cli.checks import Finding


Url: TypeAlias = Annotated[
    str | None,
    options.argument("[URL]", "A server, as http://169.254.169.254 inside a guest, or Nova's."),
]
Headers: TypeAlias = Annotated[
    list[str] | None,
    options.flag(
        "--header",
        "NAME: VALUE",
        "With URL: sent with every question, as Nova needs them; may be repeated.",
        short="-H",
    ),
]


@options.command
def check(run: options.Invocation) -> None:
    """Settings, HAProxy, privileges, namespaces, directories, ports, records, tokens, Nova: all problems at once.

    The exit status is that of the first problem; a warning is none.
    """
    from imdsproxy.cli.checks.every import run_checks  # noqa: PLC0415 - `--help` need not load it

    # Ended by SIGTERM it takes with it what it has started, as it does after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
    findings = run_checks(run)
    wrong = [one.exit_status for _, one in findings if not one.ok]
    if run.output.as_json:
        names = ("ok", "warning", "text", "hint")
        rows = [
            {"area": area, **{one: getattr(found, one) for one in names}}
            for area, found in findings
        ]
        run.output.json({"ok": not wrong, "findings": rows})
    else:
        shown = ({"AREA": area, "": _status(one), "FINDING": _text(one)} for area, one in findings)
        run.output.table(shown, keep=("AREA", ""))
        if wrong:
            run.output.styled(f"[bold red]{len(wrong)} problem{'s' if len(wrong) > 1 else ''}[/]")
    if wrong:
        raise typer.Exit(wrong[0])


def _text(finding: Finding) -> str:
    hint = f"\n[dim]{clean(finding.hint)}[/]" if finding.hint else ""
    return clean(finding.text) + hint


def _status(finding: Finding) -> str:
    if not finding.ok:
        return "[red]wrong[/]"
    return "[yellow]warning[/]" if finding.warning else "[green]ok[/]"


@options.command
def doctor(
    run: options.Invocation,
    url: Url = None,
    *,
    network: options.MaybeNetwork = None,
    address: options.MaybeAddress = None,
    header: Headers = None,
) -> None:
    """Ask as the known clients do, and report which would fail, why, and what to change; exit 1 on errors.

    With --network and --from the daemon computes what it would answer that guest. With URL a server is asked.
    """
    from imdsproxy.cli.doctor_run import run_doctor  # noqa: PLC0415 - `--help` need not load it

    if run_doctor(run, url, network, address, header or []):
        raise typer.Exit(options.NO)
