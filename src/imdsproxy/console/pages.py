"""How pages are made: templates that escape all they are given, and what every page has."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from imdsproxy import __version__
from imdsproxy.admin_client import AdminClient
from imdsproxy.console.access import TOKEN, Access

Shape: TypeAlias = Mapping[str, Any]
"""An object in the daemon's JSON."""

_TEMPLATES: Final = Path(__file__).with_name("templates")


def make_environment() -> Environment:
    """Of all templates: every value is escaped, and a name that no page gives is an error."""
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True, slots=True)
class Console:
    """What pages use."""

    daemon: AdminClient
    access: Access
    templates: Environment = field(default_factory=make_environment)

    @property
    def root(self) -> str:
        """Where all paths begin."""
        return f"/{self.access.place}"

    def page(
        self, request: Request, template: str, values: Mapping[str, object], status: int = 200
    ) -> HTMLResponse:
        """A page of a template."""
        shared = {
            "root": self.root,
            "here": request.url.path.removeprefix(self.root),
            "version": __version__,
            "token_field": TOKEN,
            "token": self.access.token,
        }
        html = self.templates.get_template(template).render({**shared, **values})
        return HTMLResponse(html, status)
