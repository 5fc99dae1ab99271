"""`imdsproxy policy list|show|set|clear`: policies of a fleet, its hosts and projects."""

# No postponed annotations in this module: annotations of `set` are values.
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final

import typer

from imdsproxy.api.client import path_to
from imdsproxy.cli import record_io
from imdsproxy.cli.options import Invocation, argument, flag, fleet_command
from imdsproxy.cli.output import Shape, clean
from imdsproxy.cli.record_flags import flags_of, keys_of
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
def show(run: Invocation, place: Annotated[str, _PLACE]) -> None:
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
def clear(run: Invocation, place: Annotated[str, _PLACE]) -> None:
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
