"""`imdsproxy check`: everything that is wrong before it runs, at once."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import typer

from imdsproxy.cli import options
from imdsproxy.cli.output import clean

if TYPE_CHECKING:
    from imdsproxy.cli.checks import Finding


@options.command
def check(
    run: options.Invocation,
) -> None:
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
