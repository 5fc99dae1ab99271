"""Rendering of pages: escaping templates, and the values that all pages share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse

from imdsproxy import __version__
from imdsproxy.api.client import AdminClient
from imdsproxy.console.access import TOKEN, Access
from imdsproxy.console.explained import spell_rule
from imdsproxy.console.rates import Rates

Shape: TypeAlias = Mapping[str, Any]
"""Object in the daemon's JSON."""

_CODE: Final = Markup("<code>{}</code>")
_TEMPLATES: Final = Path(__file__).with_name("templates")


def make_environment() -> Environment:
    """Build the templates' environment: it escapes every value, and an undefined name is an error."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["moment"] = _spell_time
    environment.filters["code"] = _mark_code
    environment.filters["rule"] = spell_rule
    environment.filters["number"] = "{:,}".format
    environment.globals["ui"] = environment.get_template("macros.html").module
    return environment


def _spell_time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC).astimezone():%Y-%m-%d %H:%M:%S}"


def _mark_code(text: str) -> Markup:
    parts = enumerate(text.split("`"))
    return Markup().join(_CODE.format(one) if place % 2 else escape(one) for place, one in parts)


@dataclass(slots=True)
class Console:
    """State shared by all pages.

    Attributes:
        notice: Result of a change, shown at the top of the next page.
    """

    daemon: AdminClient
    access: Access
    templates: Environment = field(default_factory=make_environment)
    rates: Rates = field(default_factory=Rates)
    notice: str = ""

    @property
    def root(self) -> str:
        return f"/{self.access.place}"

    def page(
        self, request: Request, template: str, values: Mapping[str, object], status: int = 200
    ) -> HTMLResponse:
        shared = {
            "root": self.root,
            "here": request.url.path.removeprefix(self.root),
            "version": __version__,
            "notice": self._take_notice(),
            "token_field": TOKEN,
            "token": self.access.token,
        }
        html = self.templates.get_template(template).render({**shared, **values})
        return HTMLResponse(html, status)

    def _take_notice(self) -> str:
        notice, self.notice = self.notice, ""
        return notice
