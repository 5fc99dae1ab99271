"""`imdsproxy identity …`: the issuer of identity tokens, its keys, and what verifiers need."""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeGuard

import typer

from imdsproxy.api.client import path_to
from imdsproxy.cli.options import (
    NO,
    Invocation,
    argument,
    command,
    complete_instances,
    config_command,
    flag,
)
from imdsproxy.cli.output import Output, Shape, clean, clean_all, spell_time
from imdsproxy.errors import RequestRefused, optional_library
from imdsproxy.model.entities import ID_PATTERN

if TYPE_CHECKING:
    from imdsproxy.config.schema import Settings
    from imdsproxy.tools.identity_setup import Site

_COLOURS: Final = {"good": "green", "failed": "red", "unchecked": "dim"}
_STDIN: Final = "-"
_LATEST: Final = int(datetime(9999, 1, 1, tzinfo=UTC).timestamp())
_PROJECT: Final = re.compile(ID_PATTERN)
_URL: Final = re.compile(r"https?://[A-Za-z0-9._:/\[\]-]+")
_TIMES: Final = ("iat", "nbf", "exp", "instance_created")

identity_app = typer.Typer(
    help="Manage identity tokens, by which guests prove who they are: keys, rotate, check, tokens, show, setup.",
    no_args_is_help=True,
)


@identity_app.command("keys")
@command
def keys(run: Invocation) -> None:
    """List the issuer's keys, the signing key first, with their next change."""
    _show_keys(run.output, run.api().get("/v1/identity/keys"))


@identity_app.command("rotate")
@command
def rotate(
    run: Invocation,
    *,
    compromised: Annotated[
        bool,
        flag(
            "--compromised",
            "Replace all keys now, because a key was stolen: no token of an old key is valid at a verifier that reads "
            "the keys again.",
        ),
    ] = False,
) -> None:
    """Publish the issuer's next key; it signs once every verifier knows it, and the old key goes after its last token.

    The rotation goes on by itself, also after a restart.
    """
    api = run.api()
    try:
        shape = api.request("POST", "/v1/identity/rotate", body={"compromised": compromised})
    except RequestRefused:
        # The operator replaces the key, and needs the steps all the same.
        if compromised:
            _show_compromised(run.output, api.get("/v1/identity/keys"))
        raise
    _show_keys(run.output, shape)
    if compromised:
        _show_compromised(run.output, shape)


def _show_compromised(output: Output, shape: Shape) -> None:
    if not output.as_json:
        from imdsproxy.tools.identity_setup import render_compromised

        output.text(render_compromised(shape["issuer"]))


def _show_keys(output: Output, shape: Shape) -> None:
    def show(output: Output, shape: Shape) -> None:
        output.styled(f"issuer {clean(shape['issuer'])}")
        output.table(
            (
                {
                    "STATE": one["state"],
                    "KEY": clean(one["id"]),
                    "ALGORITHM": one["algorithm"],
                    "SINCE": spell_time(one["since"]),
                    "THEN": _spell_due(one),
                    "SHA1": one["sha1"],
                }
                for one in shape["keys"]
            ),
        )

    output.answer(shape, show)


def _spell_due(key: Mapping[str, Any]) -> str:
    if key["due_at"] is None:
        return "-"
    what = "signs" if key["state"] == "next" else "is removed"
    return f"{what} at {spell_time(key['due_at'])}"


@identity_app.command("show")
@command
def show(
    run: Invocation,
    token: Annotated[
        str,
        argument(
            "TOKEN", "The token, or - for standard input: other users see a command's arguments."
        ),
    ] = _STDIN,
) -> None:
    """Decode a token: header, claims, and whether a key of the issuer has signed it."""
    text = (sys.stdin.readline() if token == _STDIN else token).strip()
    keys = run.api().get("/v1/identity/keys")["keys"]
    header, claims, verdict = decode_token(text, keys)
    now = datetime.now(UTC).timestamp()
    life = judge_life(claims, now)

    def show_token(output: Output, shape: Shape) -> None:
        for name, value in {**shape["header"], **shape["claims"]}.items():
            spelled = value if isinstance(value, str) else json.dumps(value)
            if name in _TIMES and _is_time(value):
                spelled = f"{spell_time(value)} ({value - int(now):+d} s)"
            output.styled(f"{clean(name)}: {clean(spelled)}")
        output.styled(f"signature: {shape['signature']}")
        output.styled(f"life: {shape['life']}")

    run.output.answer(
        {"header": header, "claims": claims, "signature": verdict, "life": life}, show_token
    )


def decode_token(
    text: str, keys: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return header, claims, and the verdict on the signature alone, whatever the claims say.

    Raises:
        RequestRefused: The text is no token.
        LibraryMissing: PyJWT is not installed.
    """
    from imdsproxy.issuer.check import LIBRARY_HINT, find_wrong_signature

    with optional_library("jwt", LIBRARY_HINT):
        import jwt
    try:
        header = jwt.get_unverified_header(text)
        content = jwt.PyJWS().decode_complete(text, options={"verify_signature": False})
        claims = json.loads(content["payload"])
    except (jwt.InvalidTokenError, ValueError) as error:
        raise RequestRefused(f"this is no token: {error}", hint="pipe the token in") from error
    if not isinstance(claims, dict):
        raise RequestRefused(
            "this is no token: its claims are no JSON object", hint="pipe the token in"
        )
    known = next((one for one in keys if one["id"] == header.get("kid")), None)
    if known is None:
        return header, claims, "of a key that this issuer does not have"
    wrong = find_wrong_signature(text, known["jwk"])
    good = f"good, of the key that is {known['state']}"
    return header, claims, good if wrong is None else f"wrong: {wrong}"


def judge_life(claims: Mapping[str, Any], now: float) -> str:
    """Return whether a token is valid or expired at `now`, in seconds since 1970, if it says when it ends."""
    exp = claims.get("exp")
    if exp is None:
        return "unknown: the token has no exp"
    if not _is_number(exp):
        return "unknown: the token has no exp that is a number"
    return "expired" if exp <= now else "valid"


def _is_number(value: object) -> TypeGuard[float]:
    """Return whether a claim is a finite number. An integer of JSON may be too large for a float."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_time(value: object) -> bool:
    """Return whether a claim is a number of seconds that a calendar can show."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LATEST


@identity_app.command("check")
@command
def check(
    run: Invocation,
    instance: Annotated[str, argument("INSTANCE", "An instance's id or name.", complete_instances)],
    *,
    audience: Annotated[str, flag("--audience -a AUDIENCE", "The audience of the token.")],
    network: Annotated[
        str | None,
        flag("--network -n NETWORK", "The network by which it asks (default: the first)."),
    ] = None,
) -> None:
    """Check each link between an instance and a verifier, and name the first that fails. Exits 1 if one does.

    The host has a token signed for the instance, and shows it to the verifier of the settings (verifier_url).
    """
    query = {"audience": audience, **({} if network is None else {"network": network})}
    shape = run.api().get(path_to("instances", instance, "identity-check"), query)

    def show(output: Output, shape: Shape) -> None:
        for one in clean_all(shape["links"]):
            verdict = one["verdict"]
            output.styled(f"{one['link']:10} [{_COLOURS[verdict]}]{verdict:9}[/]  {one['reason']}")
            if one["hint"]:
                output.styled(f"{'':21}  hint: {one['hint']}")

    run.output.answer(shape, show)
    if shape["failed"] is not None:
        raise typer.Exit(NO)


@identity_app.command("tokens")
@command
def tokens(
    run: Invocation,
    instance: Annotated[str, argument("INSTANCE", "An instance's id or name.", complete_instances)],
) -> None:
    """Show which tokens an instance may request, and the last answer for each audience, without any token.

    HAProxy gives a token again for half its life without a note here; the audit log has each request.
    """
    shape = run.api().get(path_to("instances", instance, "identity"))
    run.output.answer(shape, _show_uses)


def _show_uses(output: Output, shape: Shape) -> None:
    if not shape["enabled"]:
        output.text("this host gives no identity tokens: identity.enabled turns them on")
        return
    for use in clean_all(shape["networks"]):
        output.styled(f"network {use['network']}: {', '.join(map(str, use['addresses']))}")
        for one in use["requests"]:
            allowed = (
                "[green]allowed[/]" if one["allowed"] else f"[dim]not allowed:[/] {one['why']}"
            )
            output.styled(f"  {one['method']:4} {one['path']}  {allowed}")
        if use["problem"]:
            output.styled(f"  [red]last answers are unknown:[/] {use['problem']}")
        output.table(_spell_use(one) for one in use["audiences"])


def _spell_use(use: Shape) -> dict[str, str]:
    last = use["last"] or {}
    times = {name: last.get(name) for name in ("at", "expires_at", "ready_until")}
    spelled = {name: "-" if at is None else spell_time(at) for name, at in times.items()}
    return {
        "AUDIENCE": use["audience"],
        "POLICY": "allowed" if use["allowed"] else "not allowed",
        "LAST ANSWER": spelled["at"],
        "REASON": use["reason"] or "-",
        "TOKEN GIVEN": last.get("token_id") or "-",
        "EXPIRES": spelled["expires_at"],
        "TOKEN READY": last.get("ready_id") or "-",
        "UNTIL": spelled["ready_until"],
    }


@identity_app.command("setup")
@config_command
def setup(
    run: Invocation,
    verifier: Annotated[
        str, argument("VERIFIER", "keystone, openbao, vault, kubernetes, rgw or haproxy.")
    ],
    *,
    project: Annotated[
        str | None, flag("--project ID", "The project whose guests may use the verifier.")
    ] = None,
    url: Annotated[
        str | None, flag("--url URL", "The URL at which guests reach the verifier.")
    ] = None,
    part: Annotated[
        str | None,
        flag(
            "--part NAME",
            "Print only the script for one place: server (a machine of the verifier), admin (where its client is an "
            "administrator), host (imdsproxy's) or guest.",
        ),
    ] = None,
) -> None:
    """Print the scripts with which a verifier takes this issuer's tokens, and a guest uses them."""
    from imdsproxy.tools import identity_setup as recipes

    if verifier not in recipes.VERIFIERS:
        raise RequestRefused(
            f"there is no recipe for {verifier}", hint=f"one of {', '.join(recipes.VERIFIERS)}"
        )
    for value, form, hint in ((project, _PROJECT, "the project's id"), (url, _URL, "https://HOST")):
        if value is not None and not form.fullmatch(value):
            raise RequestRefused(f"{value} has a wrong form", hint=hint)
    recipe = recipes.render_setup(verifier, _read_site(run.settings, verifier, project, url))
    if part is None:
        run.output.text(recipe.rstrip())
        return
    scripts = recipes.split_parts(recipe)
    if part not in scripts:
        raise RequestRefused(
            f"the recipe for {verifier} has no part {part}", hint=f"one of {', '.join(scripts)}"
        )
    run.output.text(scripts[part].rstrip())


def _read_site(settings: "Settings", verifier: str, project: str | None, url: str | None) -> "Site":
    """Return the values of a recipe; raise `RequestRefused` if the settings name no issuer."""
    from imdsproxy.tools.identity_setup import EXAMPLE_PROJECT, Site

    identity, policy = settings.identity, settings.policy
    if identity.issuer is None:
        raise RequestRefused("the settings have no issuer", hint="identity.issuer")
    project = project or EXAMPLE_PROJECT
    scopes = (policy.projects.get(project), policy.host)
    audiences = (one.rules().audiences for one in scopes if one is not None)
    own = {"keystone": identity.openstack_audience or "keystone", "haproxy": "internal"}
    return Site(
        issuer=identity.issuer,
        trust_domain=identity.domain,
        audience=own.get(verifier, verifier),
        project=project,
        others=next((one for one in audiences if one is not None), ()),
        url=url,
        # A hub's settings have this section.
        has_fleet="hub" in settings.model_fields_set or bool(settings.operator.hubs),
    )
