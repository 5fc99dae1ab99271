"""`imdsproxy policy|grant`: policies of a fleet, its hosts and projects, and permissions of projects' operators."""

# No postponed annotations in this module: annotations of `policy set` are values.

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final, TypeAlias

import typer

from imdsproxy.api.client import path_to
from imdsproxy.cli import record_io
from imdsproxy.cli.options import Invocation, argument, flag, fleet_command
from imdsproxy.cli.output import Shape, clean
from imdsproxy.cli.record_flags import flags_of, keys_of, wrong_flag
from imdsproxy.errors import RequestRefused
from imdsproxy.model.records.network import POLICY

policy_app = typer.Typer(
    help="Manage policies of a fleet: list, show, set, clear. Policies of networks and instances are in their records.",
    no_args_is_help=True,
)
_PLACE: Final = argument("SCOPE", "fleet, host/ID or project/ID.")
_CLEAR: Final = {
    "clear": Annotated[
        list[str] | None,
        flag(
            "--clear RULE", "Remove a rule, so that less specific scopes decide; may be repeated."
        ),
    ]
}


@policy_app.command("list")
@fleet_command
def list_policies(run: Invocation) -> None:
    """List all scopes with rules."""
    run.output.answer(
        run.hubs().get("/v1/policies"),
        lambda output, shapes: output.table(
            ({"SCOPE": clean(one["place"]), "RULES": clean(_spell(one))} for one in shapes),
            empty="no scope has rules: set some with `imdsproxy policy set`",
            keep=("SCOPE",),
        ),
    )


@policy_app.command("show")
@fleet_command
def show_policy(run: Invocation, place: Annotated[str, _PLACE]) -> None:
    """Show the rules of a scope."""
    run.output.answer(
        run.hubs().get(_route(place)), lambda output, shape: output.text(_spell(shape) or "none")
    )


@policy_app.command("set")
@partial(fleet_command, flags={"place": Annotated[str, _PLACE], **dict(flags_of(POLICY)), **_CLEAR})
def set_policy(run: Invocation, **values: Any) -> None:
    """Set rules of a scope; other rules stay."""
    place = values.pop("place")
    cleared = dict.fromkeys(key.replace("-", "_") for key in values.pop("clear") or ())
    body = {**cleared, **keys_of(POLICY, values)}
    if not body:
        raise RequestRefused("no rule was given", hint="see `imdsproxy policy set --help`")
    answer = run.hubs().request("PATCH", _route(place), body=body)
    record_io.show_written(run.output, f"policy of {place} changed", answer)


@policy_app.command("clear")
@fleet_command
def clear_policy(run: Invocation, place: Annotated[str, _PLACE]) -> None:
    """Remove all rules of a scope; less specific scopes then apply."""
    answer = run.hubs().request("DELETE", _route(place))
    record_io.show_written(run.output, f"policy of {place} cleared", answer)


def _route(place: str) -> str:
    return path_to("policies", *place.split("/"))


def _spell(shape: Shape) -> str:
    return "\n".join(f"{name}: {_value(value)}" for name, value in shape["rules"].items())


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{path} {word}" for path, word in value.items())
    return (
        {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    )


grant_app = typer.Typer(
    help="Manage grants, the resources that a project's operators may use in a fleet: list, show, add, remove, clear.",
    no_args_is_help=True,
)

_KINDS: Final = ("bridge", "interface", "namespace")
_Lists: TypeAlias = dict[str, list[Any]]

Project = Annotated[str, argument("PROJECT", "The project's id.")]
Hosts = Annotated[
    list[str] | None,
    flag("--host HOST", "A host for the project's instances, or * for all hosts; may be repeated."),
]
Listeners = Annotated[
    list[str] | None,
    flag(
        f"--listener {'|'.join(_KINDS)}=NAME",
        "A listener for the project's own networks; may be repeated.",
    ),
]
Addresses = Annotated[
    list[str] | None,
    flag(
        "--address NETWORK=CIDR",
        "Addresses for the project's instances in a shared network, a MAC as its link-local address; may be repeated.",
    ),
]


@grant_app.command("list")
@fleet_command
def list_grants(run: Invocation) -> None:
    """List all projects with a grant."""
    run.output.answer(
        run.hubs().get("/v1/grants"),
        lambda output, shapes: output.table(
            (
                {"PROJECT": clean(one["project"]), "GRANT": clean(_spell_grant(one))}
                for one in shapes
            ),
            empty="no project has a grant: add one with `imdsproxy grant add`",
            keep=("PROJECT",),
        ),
    )


@grant_app.command("show")
@fleet_command
def show_grant(run: Invocation, project: Project) -> None:
    """Show the hosts, listeners and addresses that a project's operators may use."""
    run.output.answer(
        run.hubs().get(path_to("grants", project)),
        lambda output, shape: output.text(_spell_grant(shape) or "nothing"),
    )


@grant_app.command("add")
@fleet_command
def add(
    run: Invocation,
    project: Project,
    *,
    host: Hosts = None,
    listener: Listeners = None,
    address: Addresses = None,
) -> None:
    """Grant hosts, listeners and addresses to a project's operators."""
    given = _given(host, listener, address)
    _change(run, project, lambda old, new: [*old, *(one for one in new if one not in old)], given)


@grant_app.command("remove")
@fleet_command
def remove(
    run: Invocation,
    project: Project,
    *,
    host: Hosts = None,
    listener: Listeners = None,
    address: Addresses = None,
) -> None:
    """Remove hosts, listeners and addresses from a project's grant; existing records stay."""
    given = _given(host, listener, address)
    _change(run, project, lambda old, new: [one for one in old if one not in new], given)


@grant_app.command("clear")
@fleet_command
def clear_grant(run: Invocation, project: Project) -> None:
    """Remove a project's whole grant; existing records stay."""
    answer = run.hubs().request("DELETE", path_to("grants", project))
    record_io.show_written(run.output, f"grant of project {project} cleared", answer)


def _change(
    run: Invocation,
    project: str,
    join: Callable[[Sequence[Any], Sequence[Any]], list[Any]],
    given: _Lists,
) -> None:
    hubs, route = run.hubs(), path_to("grants", project)
    known = hubs.get(route)
    body = {key: join(known["grant"].get(key, []), values) for key, values in given.items()}
    # With the revision, concurrent operators cannot overwrite each other's changes.
    query = {"if_revision": str(known["revision"])} if known["revision"] else {}
    answer = hubs.request("PUT", route, query=query, body={**known["grant"], **body})
    record_io.show_written(run.output, f"grant of project {project} changed", answer)


def _given(
    hosts: Sequence[str] | None, listeners: Sequence[str] | None, addresses: Sequence[str] | None
) -> _Lists:
    given: _Lists = {
        "hosts": list(hosts or ()),
        "listeners": [_listener(one) for one in listeners or ()],
        "addresses": [_range(one) for one in addresses or ()],
    }
    if not any(given.values()):
        raise RequestRefused(
            "no hosts, listeners or addresses were given", hint="see `imdsproxy grant add --help`"
        )
    return given


def _listener(text: str) -> dict[str, str]:
    kind, equals, name = text.partition("=")
    if not equals or kind not in _KINDS:
        raise wrong_flag("listener", f"{text} is not a listener", "use --listener bridge=br-shop")
    return {kind: name}


def _range(text: str) -> dict[str, str]:
    network, equals, cidr = text.partition("=")
    if not equals:
        raise wrong_flag("address", f"{text} has no range", "use --address public=10.0.0.64/26")
    return {"network": network, "cidr": cidr}


def _spell_grant(shape: Shape) -> str:
    grant = shape["grant"]
    listeners = (
        " ".join(f"{key} {value}" for key, value in one.items())
        for one in grant.get("listeners", ())
    )
    ranges = (f"{one['cidr']} in {one['network']}" for one in grant.get("addresses", ()))
    rows: Iterable[tuple[str, Iterable[str]]] = (
        ("hosts", grant.get("hosts", ())),
        ("listeners", listeners),
        ("addresses", ranges),
    )
    return "\n".join(f"{name}: {', '.join(found)}" for name, found in rows if grant.get(name))
