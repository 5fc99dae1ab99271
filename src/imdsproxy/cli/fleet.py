"""`imdsproxy fleet …`: certificates, members and state of a fleet."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from imdsproxy.cli import options
from imdsproxy.cli.options import NO, NOT_IN_FORCE, argument, flag
from imdsproxy.cli.output import Output, Shape, clean, clean_all, spell_time
from imdsproxy.cli.record_io import show_written
from imdsproxy.errors import (
    AlreadyExists,
    ConfigUnreadable,
    RequestRefused,
    SourceCorrupt,
    optional_library,
    spell_count,
)
from imdsproxy.fleet.members import (
    LIBRARY_HINT,
    LONGEST_INVITATION_S,
    OPERATOR_ROLES,
    SHORTEST_INVITATION_S,
    Role,
    parse_invitation,
)

_DIRECTORY: Final = Path("/etc/imdsproxy/fleet")
_SHOWN: Final = 5
_STANDARD_INPUT: Final = "-"
_VALID_H: Final = 24.0
_NAMED: Final = 10
_ANSWER_S: Final = 10.0
_STEPS: Final = ("begin", "switch", "finish")
_SOON_S: Final = 366 * 86_400
"""Period before the CA's end in which `fleet status` warns; operators' certificates are valid for a year."""


fleet_app = typer.Typer(
    help="Manage a fleet of hosts with one store: init, hub-certificate, operator, enrol, revoke, join, status, hosts, "
    "wait, accept-restore, rotate-ca, envelope-key, reseal.",
    no_args_is_help=True,
)

Directory = Annotated[
    Path,
    flag("--directory -d DIR", f"Directory of the fleet's files on a hub (default: {_DIRECTORY})."),
]
Addresses = Annotated[
    list[str],
    flag(
        "--address -a ADDRESS",
        "A DNS name or IP address by which hosts and operators reach the hub; may be repeated.",
    ),
]
HubName = Annotated[str, flag("--name NAME", "The hub's name in the fleet.")]


_on_hub = partial(options.command, shared=("as_json", "config"))
"""Variant of `options.command` that reads the settings of this machine's hub and sends no request."""


def _refuse_host(run: options.Invocation, name: str) -> None:
    """Refuse a hub's or operator's name that belongs to a host, according to the journal of this machine's hub."""
    from imdsproxy.hub.store.journal import FILE, find_host

    if find_host(run.settings.hub.state_dir / FILE, name):
        raise AlreadyExists(
            f"{name} is already the name of a host of the fleet",
            hint="choose another name: hubs, hosts and operators share one namespace",
        )


@fleet_app.command("init")
@options.json_command
def init(
    run: options.Invocation,
    *,
    name: HubName,
    address: Addresses,
    directory: Directory = _DIRECTORY,
    ca_certificate: Annotated[
        Path | None,
        flag("--ca-certificate FILE", "Use this CA, PEM (default: create a CA). Needs --ca-key."),
    ] = None,
    ca_key: Annotated[
        Path | None, flag("--ca-key FILE", "The CA's key, PEM, not encrypted.")
    ] = None,
) -> None:
    """Create a fleet on its first hub: a CA, certificates for hub and operator, and the key that seals secrets.

    The operator's name is `admin`. Only this account can read the files.
    """
    with optional_library("cryptography", LIBRARY_HINT):
        from imdsproxy.hub.pki import files
    from imdsproxy.hub.pki.authority import parse_authority

    given = None
    if (ca_certificate is None) != (ca_key is None):
        raise RequestRefused(
            "a CA needs both a certificate and a key", hint="use both --ca-certificate and --ca-key"
        )
    if ca_certificate is not None and ca_key is not None:
        given = parse_authority(_read(ca_certificate), _read(ca_key), str(ca_certificate))
    made = files.FleetFiles(directory)
    print_ = files.init_fleet(made, given, files.HubNames(name, tuple(address)), _now())
    answer = {"directory": str(directory), "hub": name, "fingerprint": print_}
    run.output.answer(
        answer,
        f"{directory} has the fleet's CA (SHA-256 {print_}), certificates of hub {name} and of the operator "
        f"{files.FIRST_OPERATOR}, and the key that seals secrets in etcd.\n"
        "Keep a copy in a safe place: without these files no host can join, and no secret in etcd can be decrypted.",
    )


@fleet_app.command("hub-certificate")
@_on_hub
def hub_certificate(
    run: options.Invocation,
    *,
    name: HubName,
    address: Addresses,
    output: Annotated[
        Path,
        flag(
            "--output -o DIR", "A new directory, to copy to the other hub's /etc/imdsproxy/fleet."
        ),
    ],
    directory: Directory = _DIRECTORY,
) -> None:
    """Create the files for another hub, including its certificate; copy them there over ssh."""
    with optional_library("cryptography", LIBRARY_HINT):
        from imdsproxy.hub.pki import files

    _refuse_host(run, name)
    hub = files.HubNames(name, tuple(address))
    files.add_hub(files.FleetFiles(directory), output, hub, _now())
    run.output.answer(
        {"directory": str(output), "hub": name},
        f"{output} has the files of hub {name}: copy the directory there as {_DIRECTORY}, and remove it here.",
    )


@fleet_app.command("operator")
@_on_hub
def operator(
    run: options.Invocation,
    name: Annotated[
        str, argument("NAME", "The operator's name; each certificate needs a new name.")
    ],
    *,
    role: Annotated[
        Role,
        flag(
            f"--role {'|'.join(sorted(OPERATOR_ROLES))}",
            "The operator's rights: everything, read and place instances on hosts, or read (default: operator).",
        ),
    ] = Role.OPERATOR,
    project: Annotated[
        str | None, flag("--project PROJECT", "Limit the operator to records of this project.")
    ] = None,
    output: Annotated[
        Path | None, flag("--output -o FILE", "The file to write, mode 0600 (default: NAME.pem).")
    ] = None,
    directory: Directory = _DIRECTORY,
) -> None:
    """Create an operator's certificate, valid for a year: one file with key, certificate and CA certificate."""
    with optional_library("cryptography", LIBRARY_HINT):
        from imdsproxy.hub.pki import files

    if role not in OPERATOR_ROLES:
        raise RequestRefused(
            f"{role} is not a role of operators",
            hint=f"use one of {', '.join(sorted(OPERATOR_ROLES))}",
        )
    _refuse_host(run, name)
    authority = files.FleetFiles(directory).load_authority()
    pem = files.make_operator_pem(authority, name, role, project, _now())
    path = output or Path(f"{name}.pem")
    files.write_secret(path, pem)
    run.output.answer(
        {"file": str(path), "name": name, "role": role, "project": project},
        f"{path} is {name}'s certificate with its key, for the role {role}: "
        "`imdsproxy --fleet URL --fleet-certificate FILE`."
        + (
            ""
            if project is None
            else f"\n`imdsproxy grant show {project}` lists what the operator may use."
        ),
    )


@fleet_app.command("enrol")
@options.fleet_command
def enrol(
    run: options.Invocation,
    host: Annotated[str, argument("HOST", "The host's name in the fleet.")],
    *,
    valid: Annotated[
        float,
        flag(
            "--valid HOURS", "Lifetime of the string in hours, a minute to 30 days (default: 24)."
        ),
    ] = _VALID_H,
) -> None:
    """Invite a host: print a secret string for `imdsproxy fleet join` on the host, valid for one use."""
    if not SHORTEST_INVITATION_S <= valid * 3600 <= LONGEST_INVITATION_S:
        raise RequestRefused(
            f"--valid {valid:g}: the lifetime must be a minute to {LONGEST_INVITATION_S // 3600} hours",
            hint="use --valid 24 for a day, --valid 0.5 for half an hour",
        )
    body = {"host": host, "valid_s": valid * 3600}
    made = run.hubs().request("POST", "/fleet/invitations", body=body)
    run.output.answer(made, str(made["invitation"]))


@fleet_app.command("revoke")
@options.fleet_command
def revoke(
    run: options.Invocation,
    name: Annotated[str, argument("NAME", "A host's name in the fleet.")],
    *,
    operator: Annotated[
        bool,
        flag(
            "--operator",
            "Revoke an operator or a hub instead: reject all its certificates.",
        ),
    ] = False,
) -> None:
    """Revoke a host: cut its stream at once, and reject its certificate and invitation."""
    kind = "operators" if operator else "hosts"
    hubs = run.hubs()
    done = hubs.request("POST", f"/fleet/revoked-{kind}", body={"name": name})
    left = "" if operator else " The host serves its guests from its own copy until it is stopped."
    if (why := done["not_journaled"]) is not None:
        left += f" The hub cannot write its journal ({why}), so a restore of etcd may undo this."
    run.output.answer(done, f"{name} is revoked since revision {done['revision']}.{left}")


@fleet_app.command("join")
@partial(options.command, shared=("as_json", "config"))
def join(
    run: options.Invocation,
    source: Annotated[
        str,
        argument("[-]", "Read the string from standard input (the default)."),
    ] = _STANDARD_INPUT,
) -> None:
    """Add this host to a fleet, with the string from `imdsproxy fleet enrol`.

    The command reads the string from standard input, or asks for it on a terminal. An argument would be visible to all
    users of this host.
    """
    with optional_library("cryptography", LIBRARY_HINT):
        from imdsproxy.sources.fleet import membership
    from imdsproxy.sources.fleet.client import HostFiles

    if source != _STANDARD_INPUT:
        raise RequestRefused(
            "the string is a secret, but all users of this host can see arguments",
            hint="`imdsproxy fleet join` asks for the string, or reads it from standard input",
        )
    try:
        parsed = parse_invitation(_read_invitation())
    except ValueError as error:
        raise RequestRefused(
            f"this is not a string of `imdsproxy fleet enrol`: {error}",
            hint="copy the whole string, one word",
        ) from None
    files = HostFiles.of(run.settings.paths.state_dir / "fleet")
    with run.output.waiting("asking a hub for a certificate"):
        url = membership.join(parsed, files)
    run.output.answer(
        {"host": parsed.host, "hub": url, "certificate": str(files.certificate)},
        f"This host is now {parsed.host} of the fleet; its certificate is {files.certificate}.\n"
        "Set sources.fleet.enabled, then run `systemctl restart imdsproxy`.",
    )


def _read_invitation() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("The string of `imdsproxy fleet enrol`", hide_input=True, err=True))
    return typer.get_text_stream("stdin").readline()


@fleet_app.command("status")
@options.fleet_command
def status(
    run: options.Invocation,
    *,
    check: Annotated[
        bool,
        flag(
            "--check",
            "Exit 1 while changes are refused, 75 while a hub, a host, a member of etcd or a value has a problem.",
        ),
    ] = False,
) -> None:
    """Show the state of the fleet: hubs, hosts that are absent or behind, and why changes are refused, if they are."""
    report = run.hubs().get("/fleet/status")
    run.output.answer(report, _show_status)
    readiness = report["readiness"]
    if check and not readiness["ready"]:
        raise typer.Exit(NO)
    if check and readiness["degraded"]:
        raise typer.Exit(NOT_IN_FORCE)


def _show_status(output: Output, shape: Shape) -> None:
    hubs = map(_hub, clean_all(shape["hubs"]))
    unfinished = (f"{one['done']:,} of {one['of']:,} records" for one in shape["imports"])
    reasons = "\n".join(f"[red]{clean(one)}[/]" for one in shape["readiness"]["reasons"])
    facts = {
        "fleet": f"{clean(shape['fleet'])}, incarnation {shape['incarnation']}",
        "no changes": reasons or None,
        "revision": str(shape["revision"]),
        "hubs": "\n".join(hubs),
        "etcd": _etcd(shape["etcd"]),
        "records": f"{spell_count(shape['networks'], 'network')}, {spell_count(shape['instances'], 'instance')}",
        "hosts": f"{shape['connected']} of {shape['hosts']} connected",
        "absent": _named(shape["absent"]),
        "CAs not known to": _named(shape["renewing"]),
        "CA": _authority(shape["authority_ends"]),
        "not in force on": _named(shape["behind"]),
        "imports": "\n".join(unfinished) or None,
        "problems": "\n".join(
            f"{clean(key)}: {clean(why)}" for key, why in shape["problems"].items()
        )
        or None,
        "token keys": None
        if shape["token_keys"] is None
        else f"[red]{clean(shape['token_keys'])}[/]",
        "put back": "\n".join(
            f"{clean(whose)} {clean(what)}" for whose, what in shape["regained"].items()
        )
        or None,
        "suspect": None if shape["suspect"] is None else f"[red]{clean(shape['suspect'])}[/]",
    }
    output.facts(facts)
    if shape["suspect"] is not None:
        output.styled(
            "[dim]hint:[/] if etcd was restored, compare, then run `imdsproxy fleet accept-restore`. If a "
            "compromised host claims it alone, run `imdsproxy fleet revoke HOST`"
        )


def _hub(hub: Shape) -> str:
    if hub["absent"]:
        since = "" if hub["absent_since"] is None else f" since {spell_time(hub['absent_since'])}"
        return f"{hub['name']} [red]absent{since}[/]"
    return f"{hub['name']}{'' if hub['answers'] else ' [red]does not answer[/]'}"


def _authority(ends: float | None) -> str | None:
    if ends is None or ends > time.time() + _SOON_S:
        return None
    return f"[yellow]ends {spell_time(ends)}[/]: run `imdsproxy fleet rotate-ca`"


def _etcd(members: Sequence[Shape]) -> str:
    problems = [
        f"{clean(one['url'])} [red]{clean(problem)}[/]"
        for one in members
        for problem in one["problems"]
    ]
    return "\n".join([spell_count(len(members), "member"), *problems])


def _named(hosts: Sequence[str]) -> str | None:
    shown = " ".join(hosts[:_NAMED]) + (
        f" and {len(hosts) - _NAMED} more" if len(hosts) > _NAMED else ""
    )
    return f"[yellow]{clean(shown)}[/]" if hosts else None


@fleet_app.command("hosts")
@options.fleet_command
def hosts(run: options.Invocation) -> None:
    """List all hosts, each with its hub and the revision in force."""
    run.output.answer(
        run.hubs().get("/fleet/hosts"),
        lambda output, shapes: output.table(
            map(_host_row, shapes),
            empty="no hosts: invite one with `imdsproxy fleet enrol`",
            keep=("HOST",),
        ),
    )


def _host_row(shape: Shape) -> dict[str, str]:
    state = clean(shape["state"])
    if shape["state"] == "enrolled":
        state = "[green]connected[/]" if shape["hub"] else "[yellow]absent[/]"
        if shape["failed"]:
            item, why = next(iter(shape["failed"].items()))
            state = f"[red]not in force:[/] {clean(item)}: {clean(why)}"
    return {
        "HOST": clean(shape["host"]),
        "HUB": clean(shape["hub"] or "-"),
        "INSTANCES": str(shape["instances"]),
        "REVISION": str(shape["acknowledged"] or "-"),
        "STATE": state,
    }


@fleet_app.command("wait")
@options.fleet_command
def wait(
    run: options.Invocation,
    revision: Annotated[
        int, argument("REVISION", "The revision that a change printed with --json.")
    ],
    *,
    host: Annotated[
        list[str] | None, flag("--host HOST", "Wait only for this host; may be repeated.")
    ] = None,
    timeout: Annotated[
        int, flag("--timeout S", "Timeout in seconds, at most 3600 (default: 50).")
    ] = 50,
) -> None:
    """Wait until a revision is in force on every host; on timeout exit 75 and name the other hosts."""
    body = {"revision": revision, "hosts": host or None, "timeout_s": float(timeout)}
    answer = replace(run.hubs(), timeout_s=timeout + _ANSWER_S).request(
        "POST", "/fleet/wait", body=body
    )
    waiting = f"revision {revision} is in force on all but"
    show_written(run.output, f"revision {revision} is in force", answer, waiting=waiting)


@fleet_app.command("accept-restore")
@options.fleet_command
def accept_restore(run: options.Invocation) -> None:
    """Accept etcd's content after a restore: hosts remove records that etcd lacks.

    Memberships, revocations and operator overrides that etcd lost stay in force; the answer names them.
    """
    answer = run.hubs().request("POST", "/fleet/accept-restore")
    show_written(run.output, "the restored store is accepted", answer)


@fleet_app.command("rotate-ca")
@options.json_command
def rotate_ca(
    run: options.Invocation,
    step: Annotated[str, argument("|".join(_STEPS), "The step; run each once, in this order.")],
    *,
    directory: Directory = _DIRECTORY,
) -> None:
    """Replace the CA in three steps: begin also trusts a new CA, switch signs with it, finish trusts only it.

    After each step, copy the files to the other hubs and wait until all hosts have renewed their certificates:
    `fleet status` names hosts that have not.
    """
    with optional_library("cryptography", LIBRARY_HINT):
        from imdsproxy.hub.pki import files

    made = files.FleetFiles(directory)
    match step:
        case "begin":
            files.begin_rotation(made, _now())
            changed, more = [made.ca_certificate], "Also append it to the operators' certificates."
        case "switch":
            files.switch_rotation(made, _now())
            changed = [made.ca_certificate, made.ca_key]
            more = "Create new certificates for operators with `imdsproxy fleet operator`."
        case "finish":
            files.finish_rotation(made)
            changed, more = [made.ca_certificate], "The old CA is no longer trusted."
        case _:
            raise RequestRefused(f"there is no step {step}", hint=f"use one of {', '.join(_STEPS)}")
    names = " and ".join(map(str, changed))
    run.output.answer(
        {"step": step, "files": list(map(str, changed))},
        f"Copy {names} to every other hub, and restart all hubs one after the other. {more}\n"
        "Hosts renew their certificates within two hours; `imdsproxy fleet status` names those that have not.",
    )


@fleet_app.command("envelope-key")
@options.json_command
def envelope_key(run: options.Invocation, *, directory: Directory = _DIRECTORY) -> None:
    """Add a key that seals secrets in etcd; hubs use it from the next `fleet reseal`."""
    with optional_library("cryptography", LIBRARY_HINT):
        from imdsproxy.hub.pki import files

    made = files.FleetFiles(directory)
    name = files.add_envelope_key(made)
    run.output.answer(
        {"file": str(made.envelope_key), "key": name},
        f"{made.envelope_key} now has the key {name} too: copy the file to every other hub, restart the hubs one "
        "after the other, then run `imdsproxy fleet reseal`.",
    )


@fleet_app.command("reseal")
@options.fleet_command
def reseal(run: options.Invocation) -> None:
    """Seal all secrets in etcd with the newest key of `fleet envelope-key`; if interrupted, run it again."""
    hubs, changed, unreadable = run.hubs(), 0, set[str]()
    after: str | None
    with run.output.progress() as note:
        # Repeat until a round changes nothing: writes during a round may still use the older key.
        of_round = 1
        while of_round:
            of_round, after = 0, ""
            unreadable.clear()
            while after is not None:
                done = hubs.request("POST", "/fleet/reseal", body={"after": after})
                of_round, after = of_round + done["changed"], done["after"]
                unreadable.update(done["unreadable"])
                note("sealing secrets again", done["done"], done["of"])
            changed += of_round
    if unreadable:
        keys, more = sorted(unreadable)[:_SHOWN], ", …" if len(unreadable) > _SHOWN else ""
        raise SourceCorrupt(
            f"{changed} secrets were sealed again, but {len(unreadable)} in etcd cannot be decrypted: "
            f"{', '.join(keys)}{more}",
            hint="keep all older keys, which may decrypt them, or write these records again",
        )
    run.output.answer(
        {"key": done["key"], "changed": changed},
        f"all secrets in etcd are sealed with the key {done['key']}; {changed} were sealed again. Older keys are "
        "needed only for backups: keep a copy off-line, and remove them from envelope.key on every hub.",
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigUnreadable(f"cannot read {path}: {error.strerror}") from error
