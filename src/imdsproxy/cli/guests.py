"""`imdsproxy get|explain|watch|token`: what guests are answered, why, and as it happens; their session tokens."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, Final

import typer

from imdsproxy.cli import options
from imdsproxy.cli.admin_client import path_to
from imdsproxy.cli.options import NO, argument, complete_instances, complete_networks, flag, switch
from imdsproxy.cli.output import Output, Shape, clean, read_bytes_shape, spell_status, spell_time
from imdsproxy.cli.record_io import show_written
from imdsproxy.errors import RequestRefused

_FOUND: Final = "found"
_HOW: Final[Mapping[str, str]] = {
    "address": "by one of its port's addresses",
    "eui64": "by the link-local address of its port's MAC",
    "neighbour": "by its port's MAC, from the neighbour table",
    "router": "by its address behind the router",
}
_TREES_SHOWN: Final = 5
_WATCH_EVERY_S: Final = 0.5
_HEAD: Final = (
    f"{'TIME':12} {'NETWORK':16} {'ADDRESS':15} {'INSTANCE':20} {'BY':9} {'MS':>5} {'':3} REQUEST"
)


@options.command
def get(
    run: options.Invocation,
    path: Annotated[str, argument("PATH", "As the guest asks: /latest/meta-data/.")],
    network: options.Network,
    address: options.Address,
    *,
    include: Annotated[
        bool, typer.Option("--include", "-i", help="Status and headers first.", show_default=False)
    ] = False,
) -> None:
    """The answer that the guest at this address would get; exit 1 from status 400 up."""
    query = {"network": network, "address": address, "path": path}
    answer = run.daemon().get("/v1/documents", query)
    status = answer["status"]
    if run.output.as_json:
        run.output.json(answer)
    else:
        if include:
            lines = [f"{name}: {value}" for name, value in answer["headers"]]
            run.output.text("\n".join([f"HTTP/1.1 {spell_status(status)}", *lines, "", ""]))
        body = read_bytes_shape(answer["body"])
        run.output.raw(body)
        if sys.stdout.isatty() and body[-1:] not in {b"", b"\n"}:
            run.output.text("")  # only so that the prompt has a line of its own
    if status >= HTTPStatus.BAD_REQUEST:
        if not (include or run.output.as_json):
            sys.stderr.write(f"imdsproxy: the guest is answered {spell_status(status)}\n")
        raise typer.Exit(NO)


@options.command
def explain(
    run: options.Invocation,
    instance: Annotated[
        str | None,
        argument(
            "[INSTANCE]",
            "An instance's id or name: explain each address that it is known by.",
            complete_instances,
        ),
    ] = None,
    *,
    network: options.MaybeNetwork = None,
    address: options.MaybeAddress = None,
    path: Annotated[
        str | None,
        flag("--path", "PATH", "Also whether its policy allows a GET of it: /latest/user-data."),
    ] = None,
    probe: Annotated[
        bool,
        switch(
            "--probe",
            "Also send a GET as the guest would, of --path or a common document; exit 1 from status 400 up.",
        ),
    ] = False,
) -> None:
    """Who has an address in a network, why, from which source, and what it gets; or the same of an instance."""
    query = {} if path is None else {"path": path}
    if probe:
        query["probe"] = "true"
    if instance is None and network is not None and address is not None:
        query |= {"network": network, "address": address}
        answer = run.daemon().get("/v1/explain", query)
        explained = [answer]
    elif instance is not None and network is None and address is None:
        answer = explained = run.daemon().get(path_to("instances", instance, "explain"), query)
    else:
        raise RequestRefused(
            "explain takes either an INSTANCE or both --network and --from",
            hint="`imdsproxy explain web`, or `imdsproxy explain -n red --from 10.0.0.5`",
        )
    if run.output.as_json:
        run.output.json(answer)
    elif not explained:
        run.output.text(f"instance {instance} has no address: no network serves it yet")
    for number, each in enumerate(() if run.output.as_json else explained):
        if number:
            run.output.text("")
        run.output.facts(_explanation(each))
    if not explained or not all(map(_is_served, explained)):
        raise typer.Exit(NO)


def _is_served(explained: Shape) -> bool:
    probe = explained["probe"]
    refused = probe is not None and probe["status"] >= HTTPStatus.BAD_REQUEST
    return explained["verdict"] == _FOUND and not refused


def _explanation(shape: Shape) -> dict[str, str]:
    colour = "green" if shape["verdict"] == _FOUND else "red"
    facts = {
        "guest": f"{clean(shape['address'])} in network {clean(shape['network'])}",
        "verdict": f"[{colour}]{clean(shape['verdict'])}[/], {_outcome(shape)}",
    }
    probe = shape["probe"]
    if probe is not None:
        status = probe["status"]
        colour = "red" if status >= HTTPStatus.BAD_REQUEST else "green"
        facts["probe"] = f"GET {clean(probe['path'])}: [{colour}]{spell_status(status)}[/]"
    if shape["instance"] is not None:
        how = _HOW.get(shape["how"]) or clean(shape["how"])
        facts["instance"] = f"{clean(shape['instance'])} ({clean(shape['instance_name'])})"
        facts["known"] = f"{how}, from source {clean(shape['source'])}"
        if "upstream" not in shape["policy"]:
            facts["revision"] = clean(shape["revision"] or "not compiled yet")
        facts["in HAProxy"] = clean(shape["installed"] or "not there")
    if shape["claimants"]:
        facts["claimed by"] = "\n".join(
            f"{clean(one['instance'])} (source {clean(one['source'])})"
            for one in shape["claimants"]
        )
    facts |= {clean(name): clean(value) for name, value in shape["policy"].items()}
    facts |= dict(_rules(shape["rules"]))
    decision = shape["decision"]
    if decision is not None:
        without, with_one = (
            _decided(decision[key], shape["rules"]) for key in ("without_token", "with_token")
        )
        facts["policy"] = (
            f"to GET {clean(decision['path'])}:\n"
            f"without a token: {without}\nwith a good one: {with_one}"
        )
    if shape["why"]:
        steps = enumerate(shape["why"], 1)
        facts["why"] = "\n".join(f"{number}. {clean(step)}" for number, step in steps)
    return facts


def _outcome(shape: Shape) -> str:
    if shape["answer"] is None:
        return "its requests are sent to Nova"
    if shape["verdict"] == "left-out":
        return "no listener serves it"
    return f"its documents are answered {shape['answer']}"


def _rules(shape: Shape | None) -> Iterator[tuple[str, str]]:
    if shape is None:
        return
    rules = shape["rules"]
    width = max((len(rule["name"]) for rule in rules), default=0)
    yield (
        "may",
        "\n".join(
            f"{clean(rule['name']):{width}}  {clean(_value(rule['value']))} "
            f"[dim]({clean(rule['origin'])})[/]"
            for rule in rules
        ),
    )
    yield "boot", clean(_boot(shape))
    if shape["token_epoch"]:
        yield "tokens", f"revoked {clean(shape['token_epoch'])} times"


def _value(value: Any) -> str:  # noqa: ANN401 - JSON
    if value is None:
        # Only limits have no value of their own.
        return "as set in the section limits of the settings"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _boot(shape: Shape) -> str:
    ends, reopened = shape["boot_ends_at"], shape["reopened_at"]
    if ends is None:
        return "finished: no source has its creation time"
    text = f"{'finished at' if shape['boot_over'] else 'until'} {spell_time(ends, zone=True)}"
    return (
        text if reopened is None else f"{text}, opened again at {spell_time(reopened, zone=True)}"
    )


def _decided(decided: Shape, shape: Shape) -> str:
    """What is answered, by which rule, and which scope set it."""
    if decided["status"] is None:
        return "[green]it passes[/]"
    rules = shape["rules"]
    origin = next((rule["origin"] for rule in rules if rule["name"] == decided["rule"]), None)
    by = clean(decided["rule"]) + ("" if origin is None else f", {clean(origin)}")
    return f"[red]{decided['status']}[/], {clean(decided['why'])} [dim]({by})[/]"


@options.command
def watch(
    run: options.Invocation,
    *,
    network: Annotated[
        str | None,
        flag("--network", "NET", "Only the guests of this network.", complete_networks, "-n"),
    ] = None,
    instance: Annotated[
        str | None,
        flag("--instance", "ID", "Only this instance, by id or name.", complete_instances),
    ] = None,
) -> None:
    """Every request of a guest as it is answered, until Ctrl-C; with --json a line each."""
    daemon, as_json = run.daemon(), run.output.as_json
    chosen = {"network": network, "instance": instance}
    query = {name: value for name, value in chosen.items() if value is not None}
    lines = [] if as_json else [_HEAD]
    while True:
        answer = daemon.get("/v1/watch", query)
        query["cursor"] = str(answer["cursor"])
        if answer["missed"]:
            lines.append('{"missed": true}' if as_json else "… some were too many to show")
        lines += [_line_of(one, as_json=as_json) for one in answer["requests"]]
        # At once, also into a pipe. HAProxy itself spells what is not printable as `#XX`.
        run.output.raw("".join(f"{line}\n" for line in lines).encode())
        lines = []
        time.sleep(_WATCH_EVERY_S)


def _line_of(request: Shape, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({name: value for name, value in request.items() if name != "number"})
    at = datetime.fromtimestamp(request["at"], UTC).astimezone()
    who = f"{request['network'] or '-':16} {request['address'] or '-':15} {request['instance'] or '-':20}"
    how = f"{request['answered_by']:9} {request['milliseconds']:>5} {request['status']:3}"
    asked = f"{request['method'] or '-'} {request['path']}"
    return f"{at:%H:%M:%S}.{at.microsecond // 1000:03} {who} {how} {asked}"


token_app = typer.Typer(
    help="Session tokens (IMDSv2): revoke, rotate, report.", no_args_is_help=True
)


@token_app.command("revoke")
@options.command
def revoke(run: options.Invocation, instance: options.Instance) -> None:
    """Revoke the instance's tokens; it can get a new one at once."""
    answer = run.daemon().request("POST", path_to("instances", instance, "revoke-tokens"))
    show_written(run.output, f"all tokens of instance {instance} revoked", answer)


@token_app.command("rotate")
@options.command
def rotate(run: options.Invocation) -> None:
    """Sign tokens with a new key; existing tokens stay valid, by the two keys before it."""
    done = run.daemon().request("POST", path_to("token-keys", "rotate"))
    show_written(run.output, f"key {done['kid']} signs tokens, {done['file']} has it", done)


@token_app.command("report")
@options.command
def report(run: options.Invocation) -> None:
    """Name guests and clients that still read without tokens, and what required tokens leave open."""
    run.output.answer(run.daemon().get("/v1/token-report"), _show_report)


def _show_report(output: Output, report: Shape) -> None:
    """A line for each client of each guest, then the trees that stay open."""
    guests, one_in = report["guests"], report["one_in"]
    since = spell_time(report["since"])
    output.table(
        (row for guest in guests for row in _rows(guest, "~" if one_in > 1 else "")),
        empty=f"since {since} no read without a token was seen",
        keep=("READS", "REFUSED", "LAST"),
        right=("READS", "REFUSED"),
        spare=("LAST",),
    )
    if guests:
        output.styled(
            f"[dim]since {since}; READS and REFUSED are the guest's, its clients are samples[/]"
        )
    if one_in == 0:
        output.styled(
            "[yellow]warning:[/] only refused reads are counted, and no others",
            "[dim]hint:[/] tokens.count_reads: sampled, then imdsproxy reload, and come back after a while",
        )
    elif one_in > 1:
        output.styled(
            f"[dim]READS is about: one read in {one_in} is counted, by chance. Frequent readers are seen, "
            "rare ones may not be: tokens.count_reads: all counts each[/]"
        )
    trees = report["open_trees"][:_TREES_SHOWN]
    for one in trees:
        output.styled(
            f"[yellow]warning:[/] {clean(one['tree'])} gives instance {clean(one['instance'])} in "
            f"{clean(one['network'])} the user-data that another tree denies, or gives for a token only"
        )
    more = report["open_tree_count"] - len(trees)
    if more > 0:
        output.styled(f"[yellow]warning:[/] so do {more} more")
    if trees:
        output.styled(
            "[dim]hint:[/] policy: openstack_tokens, nocloud_tokens or seal_user_data lock it after the boot, "
            "and paths at once"
        )


def _rows(guest: Shape, about: str) -> Iterator[dict[str, str]]:
    reads = guest["reads"]
    row = {
        "NETWORK": clean(guest["network"]),
        "INSTANCE": clean(guest["instance"]),
        "READS": f"{about if reads else ''}{reads}",
        "REFUSED": str(guest["refused"]),
    }
    readers = guest["readers"]
    if not readers:
        yield row | {"LAST": spell_time(guest["last_at"]), "PATH": "-", "CLIENT": "-"}
    for reader in readers:
        yield row | {
            "LAST": spell_time(reader["last_at"]),
            "PATH": f"/{clean(reader['path'])}",
            "CLIENT": clean(reader["client"]) or "-",
        }
