"""`imdsproxy status`: everything at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final

import typer

from imdsproxy.cli import options
from imdsproxy.cli.options import NO, NOT_IN_FORCE, switch
from imdsproxy.cli.output import MOST_SHOWN, Output, Shape, clean, count_more, first_lines

_DAY_S: Final = 86_400
_HOUR_S: Final = 3600
_MINUTE_S: Final = 60


@options.command
def status(
    run: options.Invocation,
    *,
    check: Annotated[
        bool, switch("--check", "Exit 1 while the daemon is not ready, 75 while it is degraded.")
    ] = False,
) -> None:
    """Networks, instances, sources, HAProxy, and everything that is wrong."""
    report = run.daemon().get("/v1/status")
    run.output.answer(report, _show_status)
    readiness = report["readiness"]
    if check and not readiness["ready"]:
        raise typer.Exit(NO)
    if check and readiness["degraded"]:
        raise typer.Exit(NOT_IN_FORCE)


def _show_status(output: Output, report: Shape) -> None:
    output.facts(_facts(report))
    _show_sources(output, report)
    _show_nova(output, report)
    _show_busiest(output, report)
    _show_left_out(output, report)
    _show_problems(output, report)


def _facts(report: Shape) -> dict[str, str | None]:
    readiness = report["readiness"]
    reasons = [clean(reason) for reason in readiness["reasons"]]
    degraded = [f"[yellow]{clean(one)}[/]" for one in readiness["degraded"]]
    if not readiness["ready"]:
        state = "[red]not ready[/]"
    else:
        state = "[yellow]ready, degraded[/]" if degraded else "[green]ready[/]"
    networks, serving = report["networks"], report["serving"]
    colour = "green" if networks == serving else "red"
    unmatched = ", ".join(map(clean, report["policy_for_nobody"]))
    steps = [
        f"{clean(one['what'])}: {one['done']:,} of {one['of']:,}"
        if one["of"]
        else clean(one["what"])
        for one in report.get("progress", ())
    ]
    return {
        "imdsproxy": f"{clean(report['version'])}, up {_duration(report['uptime_s'])}, "
        f"pid {report['controller']}",
        "state": "\n".join([state, *first_lines(reasons), *first_lines(degraded)]),
        "networks": f"{networks}, [{colour}]{serving} serving[/]",
        "instances": f"{report['instances']} with {report['addresses']} addresses",
        "haproxy": _haproxy(report["haproxy"]),
        "documents": _documents(report["documents"]),
        "unix listener": _unix_listener(report["unix_listener"]),
        "macs": _macs(report["macs"]),
        "policy": f"[yellow]for names that are not known[/]: {unmatched}" if unmatched else None,
        "audit log": _audit(report["audit"]),
        "last plan": _plan(report["last_plan"]),
        "under way": "\n".join(steps) or None,
    }


def _haproxy(haproxy: Shape) -> str:
    if haproxy["master"] is None:
        return f"[red]not running[/] {clean(haproxy['problem'])}".rstrip()
    pids = f"master {haproxy['master']}, worker {haproxy['worker'] or '[red]none[/]'}"
    old = haproxy["old_workers"]
    draining = f", draining {' '.join(str(pid) for pid in old)}" if old else ""
    lines = [f"{clean(haproxy['version'])}, {pids}{draining}"]
    reload = haproxy["last_reload"]
    if reload is not None:
        result = "[green]ok[/]" if reload["ok"] else f"[red]{clean(reload['result'])}[/]"
        how = f"{result}, {reload['took_s'] * 1000:.0f} ms"
        lines.append(f"reload {reload['number']} ({clean(reload['reason'])}): {how}")
    if haproxy["problem"]:
        lines.append(f"[red]{clean(haproxy['problem'])}[/]")
    return "\n".join(lines)


def _documents(documents: Shape) -> str:
    pids = documents["pids"]
    if not documents["needed"]:
        return "off: all documents are Nova's"
    if not pids:
        return f"[red]not running[/] {clean(documents['problem'])}".rstrip()
    workers = " ".join(str(pid) for pid in pids[1:])
    problem = f"\n[red]{clean(documents['problem'])}[/]" if documents["problem"] else ""
    return f"parent {pids[0]}, workers {workers or '[red]none[/]'}{problem}"


def _unix_listener(unix: Shape | None) -> str | None:
    if unix is None:
        return None
    path = clean(unix["path"])
    if not unix["serving"]:
        return f"{path}, [red]left out[/] {clean(unix['problem'])}".rstrip()
    line = f"{path}, mode {clean(unix['mode'])} {unix['user']}:{unix['group']}, [green]serving[/]"
    taken = unix["taken_from"]
    return f"{line}, taken over from {clean(taken)}" if taken else line


def _macs(macs: Shape) -> str | None:
    if not macs["gates"] and not macs["refused"]:
        return None
    lines = [
        f"checked in {macs['gates']} networks, {macs['pairs']} pairs, {macs['learned']} by MAC alone"
    ]
    if macs["refused"]:
        lines.append(f"[red]cannot be checked in {macs['refused']}[/]")
    if macs["mismatches"]:
        counts = macs["mismatches"].items()
        most = ", ".join(f"{clean(network)} {count}" for network, count in counts)
        lines.append(f"[yellow]refused for another MAC[/]: {most}")
    return "\n".join(lines)


def _audit(audit: Shape | None) -> str | None:
    if audit is None:
        return None
    line = f"{clean(audit['mode'])}, to {clean(audit['destination'])}, {audit['written']} lines"
    if audit["left_out"]:
        line += f", [yellow]{audit['left_out']} left out[/]"
    problem = f"\n[red]not written[/] {clean(audit['problem'])}" if audit["problem"] else ""
    return line + problem


def _plan(plan: Shape | None) -> str | None:
    if plan is None:
        return None
    failed = [f"[red]{clean(one)}[/]" for one in plan["failed"]]
    reasons = ", ".join(map(clean, plan["reasons"]))
    head = f"{plan['operations']} operations in {plan['took_s'] * 1000:.0f} ms"
    return "\n".join([f"{head}: {reasons}" if reasons else head, *failed])


def _show_sources(output: Output, report: Shape) -> None:
    output.text("")
    output.table(
        (
            {
                "SOURCE": clean(source["name"]),
                "STATE": _source_state(source),
                "NETWORKS": str(source["networks"]),
                "INSTANCES": str(source["instances"]),
                "REFUSED": _count(len(source["problems"])),
            }
            for source in report["sources"]
        ),
        empty="no sources",
        keep=("SOURCE",),
        right=("NETWORKS", "INSTANCES", "REFUSED"),
    )


def _show_nova(output: Output, report: Shape) -> None:
    rows = [
        {
            "NOVA": clean(one["endpoint"]),
            "SET": clean(one["endpoint_set"]),
            "STATE": "[green]up[/]"
            if one["up"]
            else f"[red]down[/] {clean(one['reason'])}".rstrip(),
            "REQUESTS": str(one["requests"]),
            "FAILED": _count(one["failures"]),
        }
        for one in report["nova"]
    ]
    _show_rows(output, rows, keep=("NOVA",), right=("REQUESTS", "FAILED"))


def _show_busiest(output: Output, report: Shape) -> None:
    rows = [
        {
            "ASKS FOR MOST": clean(one["instance"] or f"unknown guests of {one['network']}"),
            "REQUESTS": str(one["requests"]),
            "CONNECTIONS": str(one["connections"]),
            "": "[red]limited[/]" if one["limited"] else "",
        }
        for one in report["busiest"]
    ]
    _show_rows(output, rows, keep=("ASKS FOR MOST",), right=("REQUESTS", "CONNECTIONS"))


def _show_left_out(output: Output, report: Shape) -> None:
    rows = [
        {
            "NOT SERVED": clean(one["network"]),
            "CODE": f"[red]{clean(one['code'])}[/]",
            "REASON": clean(one["reason"])
            + (f"\n[dim]{clean(one['hint'])}[/]" if one["hint"] else ""),
        }
        for one in report["left_out"]
    ]
    _show_rows(output, rows[:MOST_SHOWN], keep=("NOT SERVED", "CODE"))
    output.styled(*count_more(len(rows)))


def _show_rows(
    output: Output,
    rows: Sequence[Mapping[str, str]],
    keep: Sequence[str],
    right: Sequence[str] = (),
) -> None:
    """A table with a blank line before it; nothing without rows."""
    if rows:
        output.text("")
        output.table(rows, keep=keep, right=right)


def _show_problems(output: Output, report: Shape) -> None:
    groups = [[_problem(one) for one in part["problems"]] for part in (report, *report["sources"])]
    groups.append(
        [
            f"{one['kind']} {one['subject']}: claimed by {_claimants(one)}; guests get 503"
            for one in report["conflicts"]
        ]
    )
    warnings = [f"  {clean(one)}" for one in report.get("warnings", ())]
    if warnings:
        output.text("")
        output.styled("[bold yellow]names that guests see otherwise, or not at all[/]", *warnings)
    if count := sum(map(len, groups)):
        output.text("")
        output.styled(
            f"[bold red]{count:,} problem{'s' if count > 1 else ''}[/]",
            *(f"  {clean(line)}" for group in groups for line in first_lines(group)),
        )


def _claimants(conflict: Shape) -> str:
    return ", ".join(
        f"{one['instance']} ({one['source']})" if one["instance"] else str(one["source"])
        for one in conflict["claimants"]
    )


def _problem(problem: Shape) -> str:
    place = ":".join(str(one) for one in (problem["file"], problem["line"]) if one is not None)
    hint = f" ({problem['hint']})" if problem["hint"] else ""
    return f"{place}: {problem['field']}: {problem['reason']}{hint}".removeprefix(": ")


def _source_state(source: Shape) -> str:
    if source["stale_s"]:
        return f"[red]silent for {_duration(source['stale_s'])}[/]"
    return "[green]in sync[/]" if source["in_sync"] else "[yellow]not in sync[/]"


def _count(number: int) -> str:
    return f"[red]{number}[/]" if number else "0"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole >= _DAY_S:
        return f"{whole // _DAY_S} d {whole % _DAY_S // _HOUR_S} h"
    if whole >= _HOUR_S:
        return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S} min"
    if whole >= _MINUTE_S:
        return f"{whole // _MINUTE_S} min {whole % _MINUTE_S} s"
    return f"{whole} s"
