"""`imdsproxy status`: everything at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, TypeAlias

import typer

from imdsproxy.cli import options
from imdsproxy.cli.exitcodes import NO, NOT_IN_FORCE
from imdsproxy.cli.output import MOST_SHOWN, Column, Output, Shape, clean

_DAY_S: Final = 86_400
_HOUR_S: Final = 3600
_MINUTE_S: Final = 60

Check: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Exit 1 while the daemon is not ready, 75 while it is degraded.",
        show_default=False,
    ),
]


@options.command
def status(
    run: options.Invocation,
    *,
    check: Check = False,
) -> None:
    """Networks, instances, sources, HAProxy, and everything that is wrong."""
    report = run.daemon().get("/v1/status")
    if run.output.as_json:
        run.output.json(report)
    else:
        show_status(run.output, report)
    readiness = report["readiness"]
    if check and not readiness["ready"]:
        raise typer.Exit(NO)
    if check and readiness["degraded"]:
        raise typer.Exit(NOT_IN_FORCE)


def show_status(output: Output, report: Shape) -> None:
    """The report for people."""
    output.facts(_facts(report))
    _show_sources(output, report)
    _show_nova(output, report)
    _show_busiest(output, report)
    _show_left_out(output, report)
    _show_problems(output, report)


def _facts(report: Shape) -> dict[str, str]:
    readiness = report["readiness"]
    reasons = [clean(reason) for reason in readiness["reasons"]]
    degraded = [f"[yellow]{clean(one)}[/]" for one in readiness["degraded"]]
    if not readiness["ready"]:
        state = "[red]not ready[/]"
    else:
        state = "[yellow]ready, degraded[/]" if degraded else "[green]ready[/]"
    networks, serving = report["networks"], report["serving"]
    colour = "green" if networks == serving else "red"
    return {
        "imdsproxy": f"{clean(report['version'])}, up {_duration(report['uptime_s'])}, "
        f"pid {report['controller']}",
        "state": "\n".join([state, *_cap(reasons), *_cap(degraded)]),
        "networks": f"{networks}, [{colour}]{serving} serving[/]",
        "instances": f"{report['instances']} with {report['addresses']} addresses",
        "haproxy": _haproxy(report["haproxy"]),
        "documents": _documents(report["documents"]),
        **_unix_listener(report["unix_listener"]),
        **_macs(report["macs"]),
        **_policy(report["policy_for_nobody"]),
        **_audit(report["audit"]),
        **_plan(report["last_plan"]),
        **_under_way(report.get("progress", ())),
    }


def _under_way(steps: Sequence[Shape]) -> dict[str, str]:
    lines = [
        f"{clean(one['what'])}: {one['done']:,} of {one['of']:,}"
        if one["of"]
        else clean(one["what"])
        for one in steps
    ]
    return {"under way": "\n".join(lines)} if lines else {}


def _haproxy(haproxy: Shape) -> str:
    if haproxy["master"] is None:
        return f"[red]not running[/] {clean(haproxy['problem'])}".rstrip()
    pids = f"master {haproxy['master']}, worker {haproxy['worker'] or '[red]none[/]'}"
    old = haproxy["old_workers"]
    draining = f", draining {' '.join(str(pid) for pid in old)}" if old else ""
    lines = [f"{clean(haproxy['version'])}, {pids}{draining}"]
    reload = haproxy["last_reload"]
    if isinstance(reload, dict):
        result = "[green]ok[/]" if reload["ok"] else f"[red]{clean(reload['result'])}[/]"
        took = f"{float(reload['took_s']) * 1000:.0f} ms"
        lines.append(f"reload {reload['number']} ({clean(reload['reason'])}): {result}, {took}")
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


def _unix_listener(unix: object) -> dict[str, str]:
    if not isinstance(unix, dict):
        return {}
    path = clean(unix["path"])
    if not unix["serving"]:
        return {"unix listener": f"{path}, [red]left out[/] {clean(unix['problem'])}".rstrip()}
    owner = f"{unix['user']}:{unix['group']}"
    line = f"{path}, mode {clean(unix['mode'])} {owner}, [green]serving[/]"
    if unix["taken_from"]:
        line += f", taken over from {clean(unix['taken_from'])}"
    return {"unix listener": line}


def _macs(macs: Shape) -> dict[str, str]:
    if not macs["gates"] and not macs["refused"]:
        return {}
    line = f"checked in {macs['gates']} networks, {macs['pairs']} pairs, {macs['learned']} by MAC alone"
    lines = [line]
    if macs["refused"]:
        lines.append(f"[red]cannot be checked in {macs['refused']}[/]")
    mismatches = macs["mismatches"]
    if mismatches:
        most = ", ".join(f"{clean(network)} {count}" for network, count in mismatches.items())
        lines.append(f"[yellow]refused for another MAC[/]: {most}")
    return {"macs": "\n".join(lines)}


def _policy(for_nobody: Sequence[str]) -> dict[str, str]:
    if not for_nobody:
        return {}
    return {
        "policy": f"[yellow]for names that are not known[/]: {', '.join(map(clean, for_nobody))}"
    }


def _audit(audit: object) -> dict[str, str]:
    if not isinstance(audit, dict):
        return {}
    line = f"{clean(audit['mode'])}, to {clean(audit['destination'])}, {audit['written']} lines"
    if audit["left_out"]:
        line += f", [yellow]{audit['left_out']} left out[/]"
    problem = f"\n[red]not written[/] {clean(audit['problem'])}" if audit["problem"] else ""
    return {"audit log": line + problem}


def _plan(plan: object) -> dict[str, str]:
    if not isinstance(plan, dict):
        return {}
    failed = [f"[red]{clean(one)}[/]" for one in plan["failed"]]
    reasons = ", ".join(clean(reason) for reason in plan["reasons"])
    head = f"{plan['operations']} operations in {float(plan['took_s']) * 1000:.0f} ms"
    return {"last plan": "\n".join([f"{head}: {reasons}" if reasons else head, *failed])}


def _show_sources(output: Output, report: Shape) -> None:
    columns = (
        Column("SOURCE", keep=True),
        Column("STATE"),
        Column("NETWORKS", right=True),
        Column("INSTANCES", right=True),
        Column("REFUSED", right=True),
    )
    rows = [
        (
            clean(source["name"]),
            _source_state(source),
            str(source["networks"]),
            str(source["instances"]),
            _count(len(source["problems"])),
        )
        for source in report["sources"]
    ]
    output.text("")
    output.table(columns, rows, empty="no sources")


def _show_nova(output: Output, report: Shape) -> None:
    columns = (
        Column("NOVA", keep=True),
        Column("SET"),
        Column("STATE"),
        Column("REQUESTS", right=True),
        Column("FAILED", right=True),
    )
    rows = [
        (
            clean(one["endpoint"]),
            clean(one["endpoint_set"]),
            "[green]up[/]" if one["up"] else f"[red]down[/] {clean(one['reason'])}".rstrip(),
            str(one["requests"]),
            _count(one["failures"]),
        )
        for one in report["nova"]
    ]
    _table(output, columns, rows)


def _show_busiest(output: Output, report: Shape) -> None:
    columns = (
        Column("ASKS FOR MOST", keep=True),
        Column("REQUESTS", right=True),
        Column("CONNECTIONS", right=True),
        Column(""),
    )
    rows = [
        (
            clean(one["instance"] or f"unknown guests of {one['network']}"),
            str(one["requests"]),
            str(one["connections"]),
            "[red]limited[/]" if one["limited"] else "",
        )
        for one in report["busiest"]
    ]
    _table(output, columns, rows)


def _show_left_out(output: Output, report: Shape) -> None:
    left_out = report["left_out"]
    columns = (Column("NOT SERVED", keep=True), Column("CODE", keep=True), Column("REASON"))
    rows = [
        (clean(one["network"]), f"[red]{clean(one['code'])}[/]", _with_hint(one))
        for one in left_out[:MOST_SHOWN]
    ]
    _table(output, columns, rows)
    output.styled(*_more(len(left_out)))


def _table(output: Output, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """A table with a blank line before it; nothing where it has no rows."""
    if rows:
        output.text("")
        output.table(columns, rows, empty="")


def _show_problems(output: Output, report: Shape) -> None:
    groups = [[_problem(one) for one in part["problems"]] for part in (report, *report["sources"])]
    conflicts = []
    for conflict in report["conflicts"]:
        claimants = ", ".join(
            f"{one['instance']} ({one['source']})" if one["instance"] else str(one["source"])
            for one in conflict["claimants"]
        )
        conflicts.append(
            f"{conflict['kind']} {conflict['subject']}: claimed by {claimants}; guests get 503"
        )
    groups.append(conflicts)
    warnings = [f"  {clean(one)}" for one in report.get("warnings", ())]
    if warnings:
        output.text("")
        output.styled("[bold yellow]names that guests see otherwise, or not at all[/]", *warnings)
    if count := sum(map(len, groups)):
        output.text("")
        output.styled(
            f"[bold red]{count:,} problem{'s' if count > 1 else ''}[/]",
            *(f"  {clean(line)}" for group in groups for line in _cap(group)),
        )


def _cap(lines: Sequence[str]) -> Sequence[str]:
    return [*lines[:MOST_SHOWN], *_more(len(lines))]


def _more(count: int) -> Sequence[str]:
    return [f"and {count - MOST_SHOWN:,} more: --json has all"] if count > MOST_SHOWN else []


def _source_state(source: Shape) -> str:
    stale = source["stale_s"]
    if stale:
        return f"[red]silent for {_duration(stale)}[/]"
    return "[green]in sync[/]" if source["in_sync"] else "[yellow]not in sync[/]"


def _with_hint(shape: Shape) -> str:
    reason = clean(shape["reason"])
    return f"{reason}\n[dim]{clean(shape['hint'])}[/]" if shape["hint"] else reason


def _problem(problem: Shape) -> str:
    place = "" if problem["file"] is None else f"{problem['file']}"
    if problem["line"] is not None:
        place = f"{place}:{problem['line']}"
    hint = f" ({problem['hint']})" if problem["hint"] else ""
    return f"{place}: {problem['field']}: {problem['reason']}{hint}".removeprefix(": ")


def _count(number: int) -> str:
    return f"[red]{number}[/]" if number else "0"


def _duration(seconds: object) -> str:
    whole = int(float(str(seconds)))
    if whole >= _DAY_S:
        return f"{whole // _DAY_S} d {whole % _DAY_S // _HOUR_S} h"
    if whole >= _HOUR_S:
        return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S} min"
    if whole >= _MINUTE_S:
        return f"{whole // _MINUTE_S} min {whole % _MINUTE_S} s"
    return f"{whole} s"
