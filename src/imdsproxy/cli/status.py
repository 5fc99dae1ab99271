"""`imdsproxy status|console`: current state of the daemon, as text or as web pages."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, Final

import typer

from imdsproxy.api.client import AdminClient, read_problem
from imdsproxy.cli import options
from imdsproxy.cli.options import NO, NOT_IN_FORCE, flag
from imdsproxy.cli.output import MOST_SHOWN, Output, Shape, and_more, clean, clean_all, first_lines
from imdsproxy.errors import (
    AdminUnavailable,
    RequestRefused,
    Starting,
    optional_library,
    spell_count,
)

_STATUS: Final = "/v1/status"
_APPEARS_WITHIN_S: Final = 10.0
_LOOK_EVERY_S: Final = 0.3
_UNITS: Final = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))


@options.host_command
def status(
    run: options.Invocation,
    *,
    check: Annotated[
        bool, flag("--check", "Exit 1 while the daemon is not ready, 75 while it is degraded.")
    ] = False,
    wait: Annotated[
        bool,
        flag(
            "--wait",
            "Wait until the daemon is ready, at most ten seconds for its first answer.",
        ),
    ] = False,
) -> None:
    """Show networks, instances, sources, HAProxy and all problems."""
    daemon = run.daemon()
    try:
        report = _wait(run.output, daemon) if wait else replace(daemon, waiting=None).get(_STATUS)
    except Starting as error:
        facts = {"state": f"[yellow]{clean(error.message)}[/]"}
        unready = {"ready": False, "reasons": [error.message], "degraded": []}
        report = {"readiness": unready, "progress": [*error.steps]}
        run.output.answer(report, lambda output, _: output.facts(facts))
    else:
        run.output.answer(report, _show_status)
    readiness = report["readiness"]
    if check and not readiness["ready"]:
        raise typer.Exit(NO)
    if check and readiness["degraded"]:
        raise typer.Exit(NOT_IN_FORCE)


def _wait(output: Output, daemon: AdminClient) -> Shape:
    deadline = time.monotonic() + _APPEARS_WITHIN_S
    with output.starting() as show:
        daemon = replace(daemon, waiting=lambda: nullcontext(show))
        while True:
            try:
                report: Shape = daemon.get(_STATUS)
            except Starting:
                pass  # a long step may report no progress
            except AdminUnavailable:
                if time.monotonic() > deadline:
                    raise
            else:
                readiness = report["readiness"]
                if readiness["ready"]:
                    return report
                show(Starting.at([{"what": readiness["reasons"][0], "done": 0, "of": 0}]))
            time.sleep(_LOOK_EVERY_S)


def _show_status(output: Output, answer: Shape) -> None:
    report = clean_all(answer)
    output.facts({name: "\n".join(lines) or None for name, lines in _facts(report)})
    output.text("")
    sources = (
        {
            "SOURCE": one["name"],
            "STATE": _source_state(one),
            "NETWORKS": str(one["networks"]),
            "INSTANCES": str(one["instances"]),
            "REFUSED": _red_unless_zero(len(one["problems"])),
        }
        for one in report["sources"]
    )
    numbers = ("NETWORKS", "INSTANCES", "REFUSED", "REQUESTS", "FAILED", "CONNECTIONS")
    output.table(sources, empty="no sources", keep=("SOURCE",), right=numbers)
    nova = (
        {
            "NOVA": one["endpoint"],
            "SET": one["endpoint_set"],
            "STATE": "[green]up[/]" if one["up"] else f"[red]down[/] {one['reason']}".rstrip(),
            "REQUESTS": str(one["requests"]),
            "FAILED": _red_unless_zero(one["failures"]),
        }
        for one in report["nova"]
    )
    output.table(nova, apart=True, keep=("NOVA",), right=numbers)
    busiest = (
        {
            "MOST REQUESTS": one["instance"] or f"unknown guests of {one['network']}",
            "REQUESTS": str(one["requests"]),
            "CONNECTIONS": str(one["connections"]),
            "": "[red]limited[/]" if one["limited"] else "",
        }
        for one in report["busiest"]
    )
    output.table(busiest, apart=True, keep=("MOST REQUESTS",), right=numbers)
    not_served = (
        {
            "NOT SERVED": one["network"],
            "CODE": f"[red]{one['code']}[/]",
            "REASON": one["reason"] + (f"\n[dim]{one['hint']}[/]" if one["hint"] else ""),
        }
        for one in report["not_served"][:MOST_SHOWN]
    )
    output.table(not_served, apart=True, keep=("NOT SERVED", "CODE"))
    output.styled(*and_more(len(report["not_served"])))
    _show_problems(output, answer)


def _facts(report: Shape) -> Iterator[tuple[str, list[str]]]:
    up = spell_duration(report["uptime_s"])
    yield "imdsproxy", [f"{report['version']}, up {up}, pid {report['controller']}"]
    yield "state", list(_state(report["readiness"]))
    colour = "green" if report["networks"] == report["serving"] else "red"
    yield "networks", [f"{report['networks']}, [{colour}]{report['serving']} serving[/]"]
    yield "instances", [f"{report['instances']} with {report['addresses']} addresses"]
    yield "haproxy", list(_haproxy(report["haproxy"]))
    yield "documents", list(_documents(report["documents"]))
    if (identity := report.get("identity")) is not None:
        yield "identity", list(_identity(identity))
    if (unix := report["unix_listener"]) is not None:
        line = f"{unix['path']}, [red]not served[/] {unix['problem']}".rstrip()
        if unix["serving"]:
            owner = f"mode {unix['mode']} {unix['user']}:{unix['group']}"
            taken = f", taken over from {unix['taken_from']}" if unix["taken_from"] else ""
            line = f"{unix['path']}, {owner}, [green]serving[/]{taken}"
        yield "unix listener", [line]
    yield "macs", list(_macs(report["macs"]))
    if unmatched := ", ".join(report["unmatched_policies"]):
        yield "policy", [f"[yellow]for unknown names[/]: {unmatched}"]
    if (audit := report["audit"]) is not None:
        lost = f", [yellow]{audit['lost']} skipped[/]" if audit["lost"] else ""
        problem = [f"[red]not written[/] {audit['problem']}"] if audit["problem"] else []
        line = f"{audit['mode']}, to {audit['destination']}, {audit['written']} lines{lost}"
        yield "audit log", [line, *problem]
    if (fleet := report.get("fleet")) is not None:
        yield "fleet", list(_fleet(fleet))
    if (plan := report["last_plan"]) is not None:
        reasons = ": " + ", ".join(plan["reasons"]) if plan["reasons"] else ""
        line = f"{plan['operations']} operations in {plan['took_s'] * 1000:.0f} ms{reasons}"
        yield "last plan", [line, *(f"[red]{one}[/]" for one in plan["failed"])]
    steps = ((one, f": {one['done']:,} of {one['of']:,}") for one in report.get("progress", ()))
    yield "under way", [one["what"] + (share if one["of"] else "") for one, share in steps]


def _state(readiness: Shape) -> Iterator[str]:
    degraded = [f"[yellow]{one}[/]" for one in readiness["degraded"]]
    ready = "[yellow]ready, degraded[/]" if degraded else "[green]ready[/]"
    yield ready if readiness["ready"] else "[red]not ready[/]"
    yield from (*first_lines(readiness["reasons"]), *first_lines(degraded))


def _haproxy(haproxy: Shape) -> Iterator[str]:
    if haproxy["master"] is None:
        yield f"[red]not running[/] {haproxy['problem']}".rstrip()
        return
    old = " ".join(map(str, haproxy["old_workers"]))
    pids = f"master {haproxy['master']}, worker {haproxy['worker'] or '[red]none[/]'}"
    yield f"{haproxy['version']}, {pids}" + (f", draining {old}" if old else "")
    if (last := haproxy["last_reload"]) is not None:
        result = "[green]ok[/]" if last["ok"] else f"[red]{last['result']}[/]"
        how = f"{result}, {last['took_s'] * 1000:.0f} ms"
        yield f"reload {last['number']} ({last['reason']}): {how}"
    if haproxy["problem"]:
        yield f"[red]{haproxy['problem']}[/]"


def _identity(identity: Shape) -> Iterator[str]:
    if identity["issuer"]:
        yield f"{identity['issuer']}, key {identity['signing_key'] or '[red]none[/]'}"
    else:
        yield "hubs sign"
    given, refused = sum(identity["given"].values()), sum(identity["refused"].values())
    yield f"{identity['held']} held, {given} given, {refused} refused"


def _documents(documents: Shape) -> Iterator[str]:
    parent, *workers = documents["pids"] or [None]
    if not documents["needed"]:
        yield "off: all documents come from Nova"
    elif parent is None:
        yield f"[red]not running[/] {documents['problem']}".rstrip()
    else:
        yield f"parent {parent}, workers {' '.join(map(str, workers)) or '[red]none[/]'}"
        yield from [f"[red]{documents['problem']}[/]"] if documents["problem"] else []


def _fleet(fleet: Shape) -> Iterator[str]:
    age = f"{spell_duration(fleet['age_s'])} old"
    hub = f"by {fleet['hub']}, {age}" if fleet["hub"] else f"[red]no hub[/], {age}"
    yield f"revision {fleet['revision']} with {spell_count(fleet['items'], 'item')}, {hub}"
    if (left_s := fleet["serves_for_s"]) == 0:
        yield "[red]guests of the fleet's instances get 503[/]: sources.fleet.serve_without_hubs_s is over"
    elif left_s is not None and not fleet["hub"]:
        yield f"[yellow]without a hub, the fleet's instances are served for {spell_duration(left_s)}[/]"
    if fleet["held"]:
        yield f"[yellow]held[/]: {', '.join(first_lines(fleet['held']))}"
    yield from first_lines([f"[red]{item}[/]: {why}" for item, why in fleet["failing"].items()])


def _macs(macs: Shape) -> Iterator[str]:
    if macs["mac_filters"] or macs["refused"]:
        pairs = f"{macs['pairs']} pairs, {macs['learned']} by MAC alone"
        yield f"checked in {macs['mac_filters']} networks, {pairs}"
        if macs["refused"]:
            yield f"[red]cannot be checked in {macs['refused']}[/]"
        if most := ", ".join(f"{name} {count}" for name, count in macs["mismatches"].items()):
            yield f"[yellow]refused for another MAC[/]: {most}"
        if most := ", ".join(f"{name} {count}" for name, count in macs["forged_claims"].items()):
            yield f"[yellow]addresses claimed by other MACs[/]: {most}"
        yield from first_lines(macs["claimed"])


def _show_problems(output: Output, report: Shape) -> None:
    parts = (report, *report["sources"])
    groups = [[str(read_problem(one)) for one in part["problems"]] for part in parts]
    groups.append(
        [
            f"{one['kind']} {one['subject']}: claimed by {_claimants(one)}; guests get 503"
            for one in report["conflicts"]
        ]
    )
    if warnings := report.get("warnings"):
        output.styled("", "[bold yellow]names that guests see changed, or not at all[/]")
        output.styled(*(f"  {clean(one)}" for one in warnings))
    if foreign := report.get("foreign"):
        output.styled(
            "",
            "[bold yellow]other programs that listen on served addresses, but get no requests[/]",
        )
        output.styled(*(f"  {clean(one)}" for one in foreign))
    if count := sum(map(len, groups)):
        output.styled("", f"[bold red]{count:,} problem{'s' if count > 1 else ''}[/]")
        # Each line is cleaned as a whole, because parts of several texts may form a tag.
        output.styled(*(f"  {clean(line)}" for group in groups for line in first_lines(group)))


def _claimants(conflict: Shape) -> str:
    return ", ".join(
        f"{one['instance']} ({one['source']})" if one["instance"] else one["source"]
        for one in conflict["claimants"]
    )


def _source_state(source: Shape) -> str:
    if source["stale_s"]:
        return f"[red]silent for {spell_duration(source['stale_s'])}[/]"
    return "[green]in sync[/]" if source["in_sync"] else "[yellow]not in sync[/]"


def _red_unless_zero(number: int) -> str:
    return f"[red]{number}[/]" if number else "0"


def spell_duration(seconds: float) -> str:
    """Return a duration in its two largest units: `1 d 2 h`, `12 s`."""
    left, found = int(seconds), list[str]()
    for unit, length in _UNITS:
        count, left = divmod(left, length)
        if count or found or unit == "s":
            found.append(f"{count} {unit}")
    return " ".join(found[:2])


_HIGHEST: Final = 65535
_HINT: Final = "apt install python3-jinja2, or pip install 'imdsproxy[console]'"


@options.host_command
def console(
    run: options.Invocation,
    *,
    port: Annotated[
        int, flag("--port -p PORT", "Port on 127.0.0.1, for ssh -L (default: 0, any free port).")
    ] = 0,
) -> None:
    """Serve web pages on 127.0.0.1 that show networks, guests, requests and problems, until Ctrl-C.

    The link works once, within five minutes, in one browser.
    """
    if not 0 <= port <= _HIGHEST:
        raise RequestRefused(f"there is no port {port}", hint=f"use 0 to {_HIGHEST}")
    from imdsproxy.host.servers import open_tcp_socket

    daemon = run.daemon()
    with optional_library("jinja2", _HINT):
        from imdsproxy.console.server import run_console
    # This request fails for accounts without access to the daemon.
    daemon.get("/v1/status")
    listener = open_tcp_socket("127.0.0.1", port)

    def announce(link: str) -> None:
        if run.output.as_json:
            run.output.json({"link": link})
        else:
            run.output.text(
                f"{link}\nThe link works once, within five minutes. Ctrl-C ends the console."
            )

    with listener:
        # A page reports a starting daemon instead of waiting for it.
        reason = run_console(replace(daemon, waiting=None), listener, announce)
    run.output.styled(f"[dim]ended:[/] {reason}")
