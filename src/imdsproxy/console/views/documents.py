"""Page with a guest's documents as the guest would get them; secrets are shown only on demand."""

from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from imdsproxy.api.client import path_to
from imdsproxy.console.forms import Sent
from imdsproxy.console.masking import is_secret, mask_secrets
from imdsproxy.console.pages import Console, Shape

_TREES: Final = (
    ("ec2", "EC2", "/latest/meta-data/"),
    ("openstack", "OpenStack", "/openstack/latest/meta_data.json"),
    ("nocloud", "NoCloud", "/nocloud/meta-data"),
)
"""Dialects: key, label and first document."""

_SIBLINGS: Final = {
    "ec2": ("/latest/meta-data/", "/latest/user-data", "/latest/dynamic/"),
    "openstack": (
        "/openstack/latest/meta_data.json",
        "/openstack/latest/network_data.json",
        "/openstack/latest/vendor_data.json",
        "/openstack/latest/user_data",
        "/openstack/latest/password",
    ),
    "nocloud": (
        "/nocloud/meta-data",
        "/nocloud/network-config",
        "/nocloud/vendor-data",
        "/nocloud/user-data",
    ),
}
_LONGEST: Final = 64 * 1024
"""Maximum number of characters shown of a document."""


def show_documents(console: Console, request: Request) -> Response:
    query = request.query_params
    asked = {name: query.get(name, "") for name in ("network", "address", "path")}
    return _show(console, request, asked, revealed=False)


def reveal_document(console: Console, request: Request, sent: Sent) -> Response:
    asked = {name: sent.get(name, "") for name in ("network", "address", "path")}
    return _show(console, request, asked, revealed=True)


def _show(console: Console, request: Request, asked: Sent, *, revealed: bool) -> Response:
    guest = console.daemon.get(path_to("instances", request.path_params["guest"]))
    query = dict(asked)
    if not query["address"]:
        known = console.daemon.get(path_to("instances", guest["record"]["id"], "explain"))
        query |= {name: known[0][name] for name in ("network", "address")} if known else {}
    query["path"] = path = query["path"] or _TREES[0][2]
    values: dict[str, object] = {
        "guest": guest,
        "asked": query,
        "trees": _TREES,
        "siblings": _SIBLINGS,
        "tree": _tree_of(path),
        "document": None,
    }
    if query["address"]:
        document = console.daemon.get("/v1/documents", query)
        values |= {"document": document, **_read(document, path, revealed=revealed)}
    return console.page(request, "documents.html", values)


def _tree_of(path: str) -> str:
    first = path.split("/")[1] if "/" in path else ""
    return first if first in {"openstack", "nocloud"} else "ec2"


def _read(document: Shape, path: str, *, revealed: bool) -> dict[str, object]:
    """Return the values for a document's body, masked unless revealed, and the entries of a directory."""
    body = document["body"]
    text = body.get("text")
    if text is None:
        text = f"{body.get('base64', '')}\n(base64: these bytes are not UTF-8)"
    secret = is_secret(path) and bool(text)
    shown = text if revealed else mask_secrets(text)
    names = text.splitlines() if path.endswith("/") and document["status"] == HTTPStatus.OK else []
    return {
        "hidden": secret and not revealed,
        "masked": shown != text,
        "size": len(text),
        "text": "" if secret and not revealed else shown[:_LONGEST],
        "cut": max(0, len(shown) - _LONGEST),
        "names": [] if secret else [(name, path + name.partition("=")[0]) for name in names],
    }
