"""`imdsproxy get|explain|watch|token`: guests' responses, their reasons, live requests, and session tokens."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, Final

import typer

from imdsproxy.api.client import path_to
from imdsproxy.cli import options
from imdsproxy.cli.options import NO, argument, complete_instances, flag
from imdsproxy.cli.output import Output, Shape, clean_all, decode_bytes, spell_status, spell_time
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
_DAY_S: Final = 86_400
_WATCH_EVERY_S: Final = 0.5
_HEAD: Final = (
    f"{'TIME':12} {'NETWORK':16} {'ADDRESS':15} {'INSTANCE':20} {'BY':9} {'MS':>5} {'':3} REQUEST"
)


@options.command
def get(
    run: options.Invocation,
    path: Annotated[str, argument("PATH", "The path of the request, as /latest/meta-data/.")],
    network: options.Network,
    address: options.Address,
    *,
    include: Annotated[bool, flag("--include -i", "Print status and headers first.")] = False,
) -> None:
    """Show the response a guest at this address would get. Exits 1 for status 400 and above."""
    query = {"network": network, "address": address, "path": path}
    answer = run.api().get("/v1/documents", query)
    status = answer["status"]
    if run.output.as_json:
        run.output.json(answer)
    else:
        if include:
            lines = [f"{name}: {value}" for name, value in answer["headers"]]
            run.output.text("\n".join([f"HTTP/1.1 {spell_status(status)}", *lines, "", ""]))
        body = decode_bytes(answer["body"])
        run.output.raw(body)
        if sys.stdout.isatty() and body[-1:] not in {b"", b"\n"}:
            run.output.text("")  # ends the line, so that the prompt starts on a new one
    if status >= HTTPStatus.BAD_REQUEST:
        if not (include or run.output.as_json):
            sys.stderr.write(f"imdsproxy: the guest gets {spell_status(status)}\n")
        raise typer.Exit(NO)


@options.command
def explain(
    run: options.Invocation,
    instance: Annotated[
        str | None,
        argument(
            "[INSTANCE]",
            "An instance's id or name: explain each of its addresses.",
            complete_instances,
        ),
    ] = None,
    *,
    network: options.MaybeNetwork = None,
    address: options.MaybeAddress = None,
    path: Annotated[
        str | None,
        flag(
            "--path PATH",
            "Also show whether the policy allows a request of this path, as /latest/user-data.",
        ),
    ] = None,
    probe: Annotated[
        bool,
        flag(
            "--probe",
            "Also send a GET as the guest would, of --path or a common document; exit 1 for status 400 and above.",
        ),
    ] = False,
) -> None:
    """Show which instance owns an address, why, its source and its access; or explain all addresses of an instance."""
    query = {} if path is None else {"path": path}
    if probe:
        query["probe"] = "true"
    if instance is None and network is not None and address is not None:
        route, query = "/v1/explain", {"network": network, "address": address, **query}
    elif instance is not None and network is None and address is None:
        route = path_to("instances", instance, "explain")
    else:
        raise RequestRefused(
            "explain takes either an INSTANCE or both --network and --from",
            hint="use `imdsproxy explain web`, or `imdsproxy explain -n red --from 10.0.0.5`",
        )
    answer = run.api().get(route, query)
    explained = [answer] if instance is None else answer
    if run.output.as_json:
        run.output.json(answer)
    elif not explained:
        run.output.text(f"instance {instance} has no address: no network serves it yet")
    else:
        for number, each in enumerate(clean_all(explained)):
            run.output.styled(*([""] if number else []))
            run.output.facts(dict(_explanation(each)))
    if not explained or not all(map(_is_served, explained)):
        raise typer.Exit(NO)


def _is_served(explained: Shape) -> bool:
    probe = explained["probe"]
    refused = probe is not None and probe["status"] >= HTTPStatus.BAD_REQUEST
    return explained["verdict"] == _FOUND and not refused


def _explanation(shape: Shape) -> Iterator[tuple[str, str]]:
    yield "guest", f"{shape['address']} in network {shape['network']}"
    if "host" in shape:  # only a fleet's answer names the host
        yield "host", shape["host"]
    colour = "green" if shape["verdict"] == _FOUND else "red"
    yield "verdict", f"[{colour}]{shape['verdict']}[/], {_outcome(shape)}"
    if (probe := shape["probe"]) is not None:
        colour = "red" if probe["status"] >= HTTPStatus.BAD_REQUEST else "green"
        yield "probe", f"GET {probe['path']}: [{colour}]{spell_status(probe['status'])}[/]"
    if shape["instance"] is not None:
        yield from _identity(shape)
    if claimants := [f"{one['instance']} (source {one['source']})" for one in shape["claimants"]]:
        yield "claimed by", "\n".join(claimants)
    yield from shape["policy"].items()
    if (policy := shape["rules"]) is not None:
        yield from _policy(policy)
    if (decision := shape["decision"]) is not None:
        origins = {rule["name"]: f", {rule['origin']}" for rule in policy["rules"]}
        without = f"without a token: {_decided(decision['without_token'], origins)}"
        given = f"with a valid token: {_decided(decision['with_token'], origins)}"
        answers = "\n".join((without, given, *decision["guards"]))
        yield "policy", f"to {decision['method']} {decision['path']}:\n{answers}"
    if steps := [f"{number}. {step}" for number, step in enumerate(shape["why"], 1)]:
        yield "why", "\n".join(steps)


def _outcome(shape: Shape) -> str:
    if shape["verdict"] == "not-served":
        return "no listener serves this network"
    outcome = f"its requests for documents get {shape['answer']}"
    if shape["answer"] is None:
        outcome = "its requests go to Nova"
    paths = shape["token_paths"]
    get = "gets" if len(paths) == 1 else "get"
    without = f"; without a session token {' and '.join(paths)} {get} 401"
    return outcome + (without if paths else "")


def _identity(shape: Shape) -> Iterator[tuple[str, str]]:
    yield "instance", f"{shape['instance']} ({shape['instance_name']})"
    # If the guest's MAC differs from the record's, only the instance is known.
    if shape["how"] is not None:
        how = _HOW.get(shape["how"], shape["how"])
        yield "known", f"{how}, from source {shape['source']}"
        if "upstream" not in shape["policy"]:
            yield "revision", shape["revision"] or "not compiled yet"
    yield "in HAProxy", shape["installed"] or "not there"


def _policy(policy: Shape) -> Iterator[tuple[str, str]]:
    rules = policy["rules"]
    width = max((len(rule["name"]) for rule in rules), default=0)
    lines = (
        f"{rule['name']:{width}}  {_value(rule['value'])} [dim]({rule['origin']})[/]"
        for rule in rules
    )
    yield "may", "\n".join(lines)
    ends, reopened = policy["boot_ends_at"], policy["reopened_at"]
    boot = "finished: no source has its creation time"
    if ends is not None:
        boot = f"{'finished at' if policy['boot_over'] else 'until'} {spell_time(ends, zone=True)}"
        if reopened is not None:
            boot += f", opened again at {spell_time(reopened, zone=True)}"
    yield "boot", boot
    signed = ["signed by the fleet's key of the instance"] if policy["of_fleet"] else []
    revoked = [f"revoked {policy['token_epoch']} times"] if policy["token_epoch"] else []
    if signed or revoked:
        yield "tokens", ", ".join((*signed, *revoked))


def _value(value: Any) -> str:
    if value is None:
        # Only limits may be unset here.
        return "as in the section limits of the settings"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _decided(decided: Shape, origins: Mapping[str, str]) -> str:
    if decided["status"] is None:
        return "[green]allowed[/]"
    by = decided["rule"] + origins.get(decided["rule"], "")
    return f"[red]{decided['status']}[/], {decided['why']} [dim]({by})[/]"


@options.command
def watch(
    run: options.Invocation,
    *,
    network: Annotated[
        str | None, options.network_flag("Show only guests of this network.")
    ] = None,
    instance: Annotated[
        str | None,
        flag("--instance ID", "Show only this instance, by id or name.", complete_instances),
    ] = None,
    host: Annotated[
        str | None,
        flag("--host HOST", "In a fleet, the host to watch, unless --instance is given."),
    ] = None,
) -> None:
    """Show guests' requests as they are answered, until Ctrl-C; with --json one line per request."""
    daemon, as_json = run.api(), run.output.as_json
    query = {} if network is None else {"network": network}
    query |= {} if instance is None else {"instance": instance}
    if host is not None and daemon.of_host:
        raise RequestRefused("--host needs a fleet", hint="name a hub with --fleet URL")
    query |= {} if host is None else {"host": host}
    lines = [] if as_json else [_HEAD]
    while True:
        answer = daemon.get("/v1/watch", query)
        query["cursor"] = str(answer["cursor"])
        if "host" in answer:  # only a fleet's answer names the host
            query["host"] = answer["host"]
        if answer["missed"]:
            lines.append(
                '{"missed": true}'
                if as_json
                else "… some requests are missing: there were too many"
            )
        lines += [_line_of(one, as_json=as_json) for one in answer["requests"]]
        # `raw` flushes, also to a pipe. HAProxy has already encoded unprintable bytes as `#XX`.
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
    help="Manage session tokens (IMDSv2): revoke, rotate, report.", no_args_is_help=True
)


@token_app.command("revoke")
@options.command
def revoke(run: options.Invocation, instance: options.Instance) -> None:
    """Revoke an instance's tokens; the instance can get a new one at once."""
    answer = run.api().request("POST", path_to("instances", instance, "revoke-tokens"))
    show_written(run.output, f"all tokens of instance {instance} revoked", answer)


@token_app.command("rotate")
@options.command
def rotate(run: options.Invocation) -> None:
    """Sign tokens with a new key; tokens of the two previous keys stay valid."""
    done = run.api().request("POST", path_to("token-keys", "rotate"))
    key = f"key {done['kid']}"
    waiting = f"{key} does not sign yet; when these hosts have the key, run the same command again"
    show_written(run.output, f"{key} in {done['file']} signs tokens", done, waiting=waiting)


@token_app.command("report")
@options.host_command
def report(
    run: options.Invocation,
    *,
    days: Annotated[
        int,
        flag(
            "--days N",
            "Days for which no guest may have read without a token, 1 to 7 (default: 7).",
        ),
    ] = 7,
    network: Annotated[
        str | None, options.network_flag("Judge this network instead of the host.")
    ] = None,
    project: Annotated[
        str | None, flag("--project ID", "Judge this project instead of the host.")
    ] = None,
    check: Annotated[
        bool,
        flag(
            "--check", "Exit 1 while tokens cannot be required, 75 while the answer is not known."
        ),
    ] = False,
) -> None:
    """Show whether tokens can be required, which guests and clients read without tokens, and which trees stay open."""
    if network is not None and project is not None:
        raise RequestRefused("token report takes --network or --project, not both", hint="omit one")
    scope = {"network": network, "project": project}
    query = {name: value for name, value in scope.items() if value is not None}
    answer = run.daemon().get("/v1/token-report", {"days": str(days), **query})
    run.output.answer(answer, lambda output, _: _show_report(output, clean_all(answer)))
    ready = answer["verdicts"][0]["ready"]
    if check and ready != "yes":
        raise typer.Exit(NO if ready == "no" else options.NOT_IN_FORCE)


def _show_report(output: Output, report: Shape) -> None:
    verdict = report["verdicts"][0]
    answer = verdict["ready"]
    colour = {"yes": "green", "no": "red"}.get(answer, "yellow")
    output.styled(f"ready for required tokens: [{colour}]{answer}[/], because {verdict['because']}")
    about = "~" if report["one_in"] > 1 else ""
    output.table(
        (row for guest in report["guests"] for row in _rows(guest, about)),
        empty="no read without a token was seen",
        keep=("READS", "REFUSED", "LAST"),
        right=("READS", "REFUSED"),
        spare=("LAST",),
    )
    output.styled(*_remarks(report))


def _remarks(report: Shape) -> Iterator[str]:
    one_in, trees = report["one_in"], report["open_trees"][:_TREES_SHOWN]
    days = max(0.0, (time.time() - report["since"]) / _DAY_S)
    yield f"[dim]counted since {spell_time(report['since'])}, {days:.1f} days[/]"
    if report["guests"]:
        yield "[dim]READS and REFUSED count all clients of a guest; the listed clients are samples[/]"
    others = [one for one in report["verdicts"] if one["scope"] != "host" and one["ready"] == "no"]
    if others and len(others) < len(report["verdicts"]) - 1:
        named = (f"{one['scope']} {one['id']}" for one in others[:_TREES_SHOWN])
        more = ", …" if len(others) > _TREES_SHOWN else ""
        yield f"[dim]not ready: {', '.join(named)}{more}[/]"
    if one_in == 0:
        yield "[yellow]warning:[/] only refused reads are counted"
        yield "[dim]hint:[/] set tokens.count_reads: sampled, run `imdsproxy reload`, and look again later"
    elif one_in > 1:
        yield (
            f"[dim]READS is an estimate: one read in {one_in} is counted, at random. Rare readers may be missing; "
            "tokens.count_reads: all counts every read[/]"
        )
    for one in trees:
        yield (
            f"[yellow]warning:[/] {one['tree']} gives instance {one['instance']} in {one['network']} "
            "user-data that another tree denies, or gives only for a token"
        )
    if (more := report["open_tree_count"] - len(trees)) > 0:
        yield f"[yellow]warning:[/] {more} more such instances"
    if trees:
        yield (
            "[dim]hint:[/] in the policy, openstack_tokens, nocloud_tokens or seal_user_data locks the tree after the "
            "boot, paths at once"
        )


def _rows(guest: Shape, about: str) -> Iterator[dict[str, str]]:
    reads = guest["reads"]
    for one in guest["readers"] or [{**guest, "path": None, "client": None}]:
        yield {
            "NETWORK": guest["network"],
            "INSTANCE": guest["instance"],
            "READS": f"{about if reads else ''}{reads}",
            "REFUSED": str(guest["refused"]),
            "LAST": spell_time(one["last_at"]),
            "PATH": "-" if one["path"] is None else f"/{one['path']}",
            "CLIENT": one["client"] or "-",
        }
