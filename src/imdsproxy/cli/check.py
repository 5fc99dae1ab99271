"""`imdsproxy check`: everything that is wrong before it runs, at once."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from imdsproxy.cli import options
from imdsproxy.cli.output import Column, Output, clean

if TYPE_CHECKING:
    from imdsproxy.cli.checks.finding import Finding


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
    if run.output.as_json:
        run.output.json(
            {
                "ok": all(finding.ok for finding in findings),
                "findings": [
                    {name: getattr(one, name) for name in ("area", "ok", "warning", "text", "hint")}
                    for one in findings
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
