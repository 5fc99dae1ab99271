"""`imdsproxy check`: all that is wrong before it runs."""

from __future__ import annotations

import signal

import typer

from imdsproxy.cli import options
from imdsproxy.cli.output import Output, Shape, clean


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
    rows = [
        {"area": area, "ok": one.ok, "warning": one.warning, "text": one.text, "hint": one.hint}
        for area, one in findings
    ]
    run.output.answer({"ok": not wrong, "findings": rows}, _show)
    if wrong:
        raise typer.Exit(wrong[0])


def _show(output: Output, shape: Shape) -> None:
    rows, wrong = [], 0
    for one in shape["findings"]:
        status = "[yellow]warning[/]" if one["warning"] else "[green]ok[/]"
        if not one["ok"]:
            status, wrong = "[red]wrong[/]", wrong + 1
        hint = f"\n[dim]{clean(one['hint'])}[/]" if one["hint"] else ""
        rows.append({"AREA": one["area"], "": status, "FINDING": clean(one["text"]) + hint})
    output.table(rows, keep=("AREA", ""))
    if wrong:
        output.styled(f"[bold red]{wrong} problem{'s' if wrong > 1 else ''}[/]")
