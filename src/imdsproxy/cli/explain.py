"""`imdsproxy explain`: which instance a guest is, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Final, TypeAlias

import typer

from imdsproxy.cli import completers, options
from imdsproxy.cli.exitcodes import NO
from imdsproxy.cli.output import Output, Shape, clean, spell_status
from imdsproxy.errors import RequestRefused

_FOUND: Final = "found"
_HOW: Final[Mapping[str, str]] = {
    "address": "by one of its port's addresses",
    "eui64": "by the link-local address of its port's MAC",
    "neighbour": "by its port's MAC, from the neighbour table",
    "router": "by its address behind the router",
}


Path: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--path",
        metavar="PATH",
        help="Also whether its policy allows a GET of it: /latest/user-data.",
        show_default=False,
    ),
]


Instance: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="[INSTANCE]",
        help="An instance's id or name: explain each address that it is known by.",
        show_default=False,
        autocompletion=completers.instances,
    ),
]
Probe: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--probe",
        help="Also send a GET as the guest would, of --path or a common document; exit 1 from status 400 up.",
        show_default=False,
    ),
]


@options.command
def explain(
    run: options.Invocation,
    instance: Instance = None,
    *,
    network: options.MaybeNetwork = None,
    address: options.MaybeAddress = None,
    path: Path = None,
    probe: Probe = False,
) -> None:
    """Who has an address in a network, why, from which source, and what it gets; or the same of an instance."""
    from imdsproxy.cli.admin_client import path_to  # noqa: PLC0415 - `--help` need not load it

    query = {} if path is None else {"path": path}
    if probe:
        query["probe"] = "true"
    explained: Sequence[Shape]
    if instance is None and network is not None and address is not None:
        query |= {"network": network, "address": address}
        one = run.daemon().get("/v1/explain", query)
        explained = [one]
        shown: object = one
    elif instance is not None and network is None and address is None:
        answer = run.daemon().get(path_to("instances", instance, "explain"), query)
        explained = answer
        shown = explained
    else:
        raise RequestRefused(
            "explain takes either an INSTANCE or both --network and --from",
            hint="`imdsproxy explain web`, or `imdsproxy explain -n red --from 10.0.0.5`",
        )
    if run.output.as_json:
        run.output.json(shown)
    elif not explained:
        run.output.text(f"instance {instance} has no address: no network serves it yet")
    for number, each in enumerate(() if run.output.as_json else explained):
        if number:
            run.output.text("")
        show_explanation(run.output, each)
    if not explained or not all(map(_is_served, explained)):
        raise typer.Exit(NO)


def _is_served(explained: Shape) -> bool:
    probe = explained["probe"]
    refused = probe is not None and probe["status"] >= HTTPStatus.BAD_REQUEST
    return explained["verdict"] == _FOUND and not refused


def show_explanation(output: Output, shape: Shape) -> None:
    """The explanation for people."""
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
        facts["instance"] = f"{clean(shape['instance'])} ({clean(shape['instance_name'])})"
        facts["known"] = f"{_how(shape['how'])}, from source {clean(shape['source'])}"
        if "upstream" not in shape["policy"]:
            facts["revision"] = clean(shape["revision"] or "not compiled yet")
        facts["in HAProxy"] = clean(shape["installed"] or "not there")
    claimants = [
        f"{clean(one['instance'])} (source {clean(one['source'])})" for one in shape["claimants"]
    ]
    if claimants:
        facts["claimed by"] = "\n".join(claimants)
    policy = shape["policy"]
    facts |= {clean(name): clean(value) for name, value in policy.items()}
    facts |= dict(_rules(shape["rules"]))
    decision = shape["decision"]
    if decision is not None:
        facts["policy"] = f"to GET {clean(decision['path'])}:\n" + "\n".join(
            f"{words}: {_decided(decision[key], shape['rules'])}"
            for words, key in (
                ("without a token", "without_token"),
                ("with a good one", "with_token"),
            )
        )
    why = shape["why"]
    if why:
        facts["why"] = "\n".join(f"{number}. {clean(step)}" for number, step in enumerate(why, 1))
    output.facts(facts)


def _outcome(shape: Shape) -> str:
    if shape["answer"] is None:
        return "its requests are sent to Nova"
    if shape["verdict"] == "left-out":
        return "no listener serves it"
    return f"its documents are answered {shape['answer']}"


def _how(how: object) -> str:
    return _HOW.get(str(how), clean(how))


def _rules(shape: Shape | None) -> Iterator[tuple[str, str]]:
    if shape is None:
        return
    rules = shape["rules"]
    width = max((len(str(rule["name"])) for rule in rules), default=0)
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


def _value(value: object) -> str:
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
    ends_text = f"{'finished at' if shape['boot_over'] else 'until'} {_time(ends)}"
    return ends_text if reopened is None else f"{ends_text}, opened again at {_time(reopened)}"


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC).astimezone():%Y-%m-%d %H:%M:%S %Z}"


def _decided(decided: Shape, shape: Shape) -> str:
    """What is answered, by which rule, and which scope set it."""
    if decided["status"] is None:
        return "[green]it passes[/]"
    rules = shape["rules"]
    origin = next((rule["origin"] for rule in rules if rule["name"] == decided["rule"]), None)
    by = clean(decided["rule"]) if origin is None else f"{clean(decided['rule'])}, {clean(origin)}"
    return f"[red]{decided['status']}[/], {clean(decided['why'])} [dim]({by})[/]"
