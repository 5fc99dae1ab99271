"""Pages that change records by forms; the daemon's problems are shown at their inputs."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from imdsproxy.api.client import path_to
from imdsproxy.console.forms import (
    Sent,
    edited_keys,
    make_form,
    plan_patch,
    read_form,
    show_record,
)
from imdsproxy.console.pages import Console
from imdsproxy.errors import AdminError, ImdsproxyError, Problem, SourceError

_PAYLOADS: Final = ("user_data", "vendor_data")
_CHANGED: Final = Problem(
    "record", "was changed by another since this form was opened", "look at it, and change it again"
)
_REFUSALS: Final = (AdminError, SourceError)


def edit_guest(console: Console, request: Request) -> Response:
    return _edit(console, request, "instance", request.path_params["guest"])


def edit_network(console: Console, request: Request) -> Response:
    return _edit(console, request, "network", request.path_params["network"])


def change_guest(console: Console, request: Request, sent: Sent) -> Response:
    return _change(console, request, sent, "instance", request.path_params["guest"])


def change_network(console: Console, request: Request, sent: Sent) -> Response:
    return _change(console, request, sent, "network", request.path_params["network"])


def _edit(console: Console, request: Request, kind: str, name: str) -> Response:
    known = console.daemon.get(path_to(f"{kind}s", name))
    return _form(console, request, kind, known, show_record(kind, known["record"]))


def _form(  # noqa: PLR0917 - what a form is made of
    console: Console,
    request: Request,
    kind: str,
    known: Mapping[str, Any],
    sent: Sent,
    error: ImdsproxyError | None = None,
) -> Response:
    problems = () if error is None else error.problems
    values = {
        "kind": kind,
        "place": "guests" if kind == "instance" else "networks",
        "known": known,
        "record": known["record"],
        "form": make_form(kind, sent, problems),
        "sent": sent,
        "digest": _digest(known["record"]),
        "payloads": _PAYLOADS if kind == "instance" else (),
        "error": error,
    }
    return console.page(request, "edit.html", values, 200 if error is None else 422)


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _change(console: Console, request: Request, sent: Sent, kind: str, name: str) -> Response:
    known = console.daemon.get(path_to(f"{kind}s", name))
    record = known["record"]
    try:
        if sent.get("digest") != _digest(record):
            raise SourceError("nothing was stored", problems=[_CHANGED])
        wanted, problems = read_form(kind, sent)
        if problems:
            raise AdminError("nothing was stored", problems=problems)
        keys = edited_keys(kind)
        patch = plan_patch({key: record[key] for key in record.keys() & keys}, wanted)
        patch |= _read_payloads(sent)
        if patch:
            written = console.daemon.request("PATCH", path_to(f"{kind}s", record["id"]), body=patch)
            console.notice = _spell_written(written)
    except _REFUSALS as error:
        return _form(console, request, kind, known, sent, error)
    place = "guests" if kind == "instance" else "networks"
    return RedirectResponse(f"{console.root}/{place}/{record['id']}", 303)


def _read_payloads(sent: Sent) -> dict[str, str | None]:
    """Return user-data and vendor-data that the operator replaces, or `None` for removed ones."""
    what = {name: sent.get(f"{name}.what") for name in _PAYLOADS}
    replaced = {
        name: sent.get(name, "").replace("\r\n", "\n") for name in what if what[name] == "replace"
    }
    return replaced | {name: None for name in what if what[name] == "remove"}


def _spell_written(written: Mapping[str, Any]) -> str:
    if written["applied"]:
        return " ".join(("Stored, and in force.", *written["warnings"]))
    return " ".join(("Stored; not in force yet:", *written["pending"]))
