"""Generate files from the code: pages for docs/reference, manual pages and completions for packaging.

Usage: `.venv/bin/python script/docgen.py [REFERENCE [PACKAGING]]`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import yaml
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from imdsproxy.api.app import admin_app
from imdsproxy.api.exposition import Metric, metrics_of
from imdsproxy.api.metrics import NETWORK_SUM, PREFIX, Metrics
from imdsproxy.cli.main import SHELLS, build_program, iterate_commands, render_completion
from imdsproxy.config.changes import SettingsHolder
from imdsproxy.config.describe import (
    Setting,
    iterate_settings,
    render_records_schema,
    render_schema,
)
from imdsproxy.config.neutron_options import NEUTRON_OPTIONS
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import render_value
from imdsproxy.controller.audit import Audit
from imdsproxy.controller.companion import DocumentProbe
from imdsproxy.controller.identity import IdentityHost
from imdsproxy.controller.macs import Macs
from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.controller.sources import Sources
from imdsproxy.controller.token_counting import TokenCounting
from imdsproxy.controller.traffic import Traffic
from imdsproxy.controller.watchdog import HaproxyWatchdog
from imdsproxy.documents.resolver import Resolver
from imdsproxy.errors import KINDS, ImdsproxyError
from imdsproxy.fleet.members import Role
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.unix_listener.listener import UnixListener
from imdsproxy.hub.api.app import ROUTERS, operators_app
from imdsproxy.hub.api.callers import Admits
from imdsproxy.hub.api.metrics import HubMetrics
from imdsproxy.model.records.json_schema import schema_of_records
from imdsproxy.network.listeners.loop import ListenerLoop
from imdsproxy.network.planned import NotServedCode
from imdsproxy.nova.upstream import NovaWatch
from imdsproxy.sources.fleet.source import FleetSource
from imdsproxy.sources.neutron.source import NeutronSource
from imdsproxy.tools.namespace_proxy import run_parser

_TEXTS: Final[Mapping[str, Any]] = tomllib.loads(
    Path(__file__).with_name("docgen_texts.toml").read_text("utf-8")
)
"""Introductions of pages, and meanings of exit statuses."""

_RULES: Final = Path(__file__).resolve().parents[1] / "packaging/prometheus"
_MADE: Final = "Made by `script/docgen.py`; edit the code instead."
_DEFAULTS: Final = Settings().model_dump(mode="json")
_STATUSES: Final = list(_TEXTS["exit_statuses"].items())
_FILES: Final = (
    ("/etc/imdsproxy/imdsproxy.yaml", "Settings; see imdsproxy.yaml(5)."),
    ("/etc/imdsproxy/conf.d/*.yaml", "More of them, merged over it in the order of their names."),
    ("/var/lib/imdsproxy", "Records, documents made of them, and passwords that guests posted."),
    ("/run/imdsproxy/admin.sock", "The admin socket, which the commands ask."),
)


def render_settings_page() -> str:
    """Render docs/reference/settings.md."""
    lines = _head("Settings", _TEXTS["settings"])
    for name, field in Settings.model_fields.items():
        lines += ["", f"## {name}", "", field.description or "", ""]
        lines += _settings_table(name, inner=False)
        inner = _settings_table(name, inner=True)
        if inner:
            lines += ["", _TEXTS["inner_settings"], "", *inner]
    return _page(lines)


def _settings_table(section: str, *, inner: bool) -> list[str]:
    rows = [
        (
            f"`{setting.path}`",
            _default(setting),
            setting.takes,
            setting.change.value,
            setting.description,
        )
        for setting in iterate_settings()
        if setting.inner is inner and setting.path.startswith(f"{section}.")
    ]
    titles = ("setting", "default", "takes", "a change takes", "what it is")
    return _table(titles, rows) if rows else []


def _default(setting: Setting, lead: str = "") -> str:
    value: object = _DEFAULTS
    for step in setting.path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    if value is None and "default" not in setting.schema:
        return "required"
    return f"{lead}`{render_value(setting.schema['default'] if value is None else value)}`"


_PARTS: Final = (
    Metrics,
    Sources,
    RecordLoop,
    ListenerLoop,
    HaproxyWatchdog,
    Haproxy,
    DocumentProbe,
    Resolver,
    Traffic,
    Macs,
    TokenCounting,
    UnixListener,
    Audit,
    NovaWatch,
    IdentityHost,
    SettingsHolder,
    FleetSource,
    NeutronSource,
)


def render_cli_page() -> str:
    """Render docs/reference/cli.md."""
    lines = [*_head("Command line", _TEXTS["command_line"]), "", "## Exit statuses", ""]
    lines += _table(("status", "meaning"), _STATUSES)
    for path, command in iterate_commands(build_program(), "imdsproxy"):
        lines += ["", f"## {path}", "", _one_line(command.help)]
        rows = _parameters(command)
        if rows:
            lines += ["", *_table(("option or argument", "meaning"), rows)]
        if command.epilog:
            lines += ["", "Example:", "", f"    {command.epilog.removeprefix('Example: ')}"]
    return _page(lines)


def _parameters(command: Any) -> list[tuple[str, str]]:
    """Return options and arguments as written, `--config, -c FILE`, with their meanings."""
    rows = []
    for parameter in command.params:
        names = [name for name in parameter.opts if name.startswith("-")]
        names += parameter.secondary_opts if names else ()
        metavar = parameter.metavar or ("" if names else parameter.name)
        spelled = f"{', '.join(names)} {metavar}".strip()
        if parameter.name != "help":
            rows.append((f"`{spelled}`", _one_line(getattr(parameter, "help", ""))))
    return rows


def render_metrics_page() -> str:
    """Render docs/reference/metrics.md."""
    introduction = _TEXTS["metrics"].format(network_sum=NETWORK_SUM)
    metrics = [metric for part in _PARTS for metric in metrics_of(part, PREFIX)]
    lines = [*_head("Metrics", introduction), "", *_metrics_table(metrics)]
    return _page(
        [
            *lines,
            "",
            "## Of a hub",
            "",
            _TEXTS["hub_metrics"],
            "",
            *_metrics_table(HubMetrics.metrics),
        ]
    )


def _metrics_table(metrics: Iterable[Metric]) -> list[str]:
    rows = (
        (
            f"`{metric.exposed}`",
            metric.kind,
            ", ".join(f"`{label}`" for label in metric.labels) or "-",
            metric.help,
        )
        for metric in metrics
    )
    return _table(("metric", "type", "labels", "meaning"), rows)


def render_alerts_page() -> str:
    """Render docs/reference/alerts.md."""
    lines = _head("Alerts", _TEXTS["alerts"])
    for file in sorted(_RULES.glob("*.rules.yml")):
        groups = yaml.safe_load(file.read_text())["groups"]
        for rule in (one for group in groups for one in group["rules"]):
            notes = rule["annotations"]
            since = f", for {rule['for']}" if "for" in rule else ""
            lines += ["", f"## {rule['alert']}", "", f"**{_one_line(notes['summary'])}.**"]
            lines[-1] += f" {notes['description']}"
            lines += ["", f"*To do:* {notes['action']}"]
            severity = rule["labels"]["severity"]
            lines += ["", f"Severity {severity}, in `{file.name}`: `{rule['expr']}`{since}."]
    return _page(lines)


def render_errors_page() -> str:
    """Render docs/reference/errors.md."""
    kinds = sorted(KINDS, key=lambda kind: kind.__name__)
    rows = [
        (
            f"`{kind.code}`",
            str(kind.exit_status),
            str(kind.http_status),
            "yes" if kind.http_status == HTTPStatus.SERVICE_UNAVAILABLE else "no",
            _one_line(kind.__doc__),
            kind.remedy,
        )
        for kind in sorted(kinds, key=lambda kind: kind.code)
        if kind is not ImdsproxyError
    ]
    by_status = [
        (
            status,
            meaning,
            ", ".join(f"`{kind.code}`" for kind in kinds if str(kind.exit_status) == status),
        )
        for status, meaning in _STATUSES
    ]
    lines = [*_head("Error codes", _TEXTS["errors"]), ""]
    lines += _table(("code", "exit status", "HTTP status", "again", "meaning", "remedy"), rows)
    lines += ["", "## Exit statuses", ""]
    lines += _table(("status", "meaning", "codes"), by_status)
    lines += ["", "## Networks that are not served", "", _TEXTS["not_served"], ""]
    return _page([*lines, *(f"- `{code.value}`" for code in NotServedCode)])


def render_admin_api_page() -> str:
    """Render docs/reference/admin-api.md."""
    return _api_page("Admin API", _TEXTS["admin_api"], admin_app(None), {})


def render_hub_api_page() -> str:
    """Render docs/reference/hub-api.md."""
    who = {
        (prefix + route.path_format, method.lower()): _who_may(route)
        for router, prefix in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    return _api_page("Hub API", _TEXTS["hub_api"], operators_app(None), who)


def _api_page(title: str, text: str, app: FastAPI, who: Mapping[tuple[str, str], str]) -> str:
    """Render every route, with its permitted roles if they differ, and every shape."""
    document = app.openapi()
    lines = _head(title, text)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            may = who[path, method] if who else ""
            about = f"{_one_line(operation['description'])} {may}".rstrip()
            lines += ["", f"## {method.upper()} {path}", "", about]
            lines += ["", *_table(("part", "shape", "meaning"), _parts(operation))]
    lines += ["", "## Shapes"]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += ["", f"### {name}", "", _one_line(schema.get("description", "").split("\n\n")[0])]
        required = schema.get("required", ())
        rows = [
            (
                f"`{key}`",
                _shape(value),
                "yes" if key in required else "no",
                _one_line(value.get("description", "")),
            )
            for key, value in schema.get("properties", {}).items()
        ]
        if rows:
            lines += ["", *_table(("key", "shape", "always", "meaning"), rows)]
    return _page(lines)


def _who_may(route: APIRoute) -> str:
    """Return the certificates that a route of a hub accepts, in words."""
    found = [one for one in _dependencies(route.dependant) if isinstance(one, Admits)]
    if not found:
        return "For all, also without a certificate."
    may = [role for role in Role if all(role in one.roles for one in found)]
    words = f"For {', '.join(f'`{role}`' for role in may)}"
    return (
        f"{words}, not limited to a project."
        if any(one.all_projects for one in found)
        else f"{words}."
    )


def _dependencies(of: Dependant) -> Iterator[object]:
    for one in of.dependencies:
        yield one.call
        yield from _dependencies(one)


def _parts(operation: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for parameter in operation.get("parameters", ()):
        where = f"{parameter['in']} `{parameter['name']}`"
        yield where, _shape(parameter["schema"]), parameter.get("description", "")
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema = content["schema"]
        yield "body", f"`{schema['title']}`" if "title" in schema else _shape(schema), ""
    for status, answer in operation["responses"].items():
        if status.isdecimal():
            kind, content = next(iter(answer["content"].items()))
            shape = kind if kind == "text/plain" else _shape(content["schema"])
            yield f"answer {status}", shape, ""


def _shape(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_shape(one) for one in schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_shape(schema['items'])}" if "items" in schema else "list"
    if "enum" in schema:
        return " or ".join(f"`{one}`" for one in schema["enum"])
    if schema.get("type") == "object":
        others = [schema["additionalProperties"]] if "additionalProperties" in schema else []
        for value in (*schema.get("patternProperties", {}).values(), *others):
            if isinstance(value, dict):
                return f"mapping to {_shape(value)}"
    return str(schema.get("type", "any"))


def render_neutron_page() -> str:
    """Render docs/reference/neutron-options.md."""
    rows = [
        (
            option.whose,
            ", of old ".join(
                f"`[{section}] {name}`"
                for section, name in ((option.section, option.name), *option.deprecated)
            ),
            f"`{option.default}`" if option.default else "-",
            option.fate.value,
            f"`{option.becomes}`" if option.becomes else "-",
            option.why,
        )
        for option in NEUTRON_OPTIONS
    ]
    titles = ("service", "option", "default", "result", "setting", "how, or why not")
    return _page(
        [*_head("Neutron's options", _TEXTS["neutron_options"]), "", *_table(titles, rows)]
    )


def render_records_page() -> str:
    """Render docs/reference/records.md: `docgen_records.md` with a table of each record's fields."""
    definitions = schema_of_records()["$defs"]
    text = Path(__file__).with_name("docgen_records.md").read_text("utf-8")
    for name, definition in definitions.items():
        rows = [
            (
                f"`{key}`",
                _takes(value),
                "required" if key in definition["required"] else _default_of_field(value),
                _one_line(value["description"]),
            )
            for key, value in definition["properties"].items()
        ]
        table = "\n".join(_table(("field", "takes", "default", "what it is"), rows))
        text = text.replace(f"{{{name}}}", table)
    return _page([f"<!-- {_MADE} -->", "", text])


def _default_of_field(schema: Mapping[str, Any]) -> str:
    return f"`{render_value(schema['default'])}`" if "default" in schema else "-"


def _takes(schema: Mapping[str, Any]) -> str:
    """Return the accepted values of a record's field, in words."""
    match schema:
        case {"enum": enum}:
            words = " or ".join(f"`{one}`" for one in enum if isinstance(one, str))
        case {"anyOf": [{"format": _}, *_]}:
            words = "an IP address"
        case {"anyOf": options}:
            each = (_takes(one) for one in options if one.get("type") != "null")
            words = ", or ".join(dict.fromkeys(each))
        case {"items": items}:
            words = f"list of: {_takes(items)}"
        case {"minimum": least, "maximum": most}:
            words = f"{least} to {most}"
        case {"patternProperties": named}:
            (value,) = named.values()
            words = f"mapping to: {_takes(value)}"
        case _:
            types = {"boolean": "true or false", "object": "a mapping", "string": "text"}
            kinds = schema.get("type", "object")
            words = types[kinds[0] if isinstance(kinds, list) else kinds]
    return words


def _head(title: str, introduction: str) -> list[str]:
    return [f"<!-- {_MADE} -->", "", f"# {title}", "", introduction]


def _page(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(titles), line(["---"] * len(titles)), *(line(row) for row in rows)]


def _one_line(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split())


def render_program_manual() -> str:
    """Render imdsproxy(1)."""
    root = build_program()
    synopsis = ["[\\fIOPTION\\fR...]", "\\fICOMMAND\\fR [\\fIARGUMENT\\fR...]"]
    lines = _manual_head(
        "imdsproxy", 1, "instance metadata at 169.254.169.254 for every network of a host"
    )
    lines += [".SH SYNOPSIS", ".B imdsproxy", *synopsis, ".SH DESCRIPTION"]
    lines += _paragraphs(root.help or "", _TEXTS["command_line"], _TEXTS["commands"])
    lines += [".SH OPTIONS", *_items(_parameters(root)), ".SH COMMANDS"]
    for path, command in list(iterate_commands(root, "imdsproxy"))[1:]:
        lines += [f".SS {_text(path)}", _text(command.help), *_items(_parameters(command))]
        if command.epilog:
            lines += [".PP", _text(command.epilog)]
    lines += [".SH EXIT STATUS", *_items(_STATUSES)]
    lines += [".SH UNITS", _text(_TEXTS["units"]), ".SH FILES", *_items(_FILES)]
    return _manual(lines, "imdsproxy.yaml(5)", "neutron-ns-metadata-proxy(1)", "haproxy(1)")


def render_settings_manual() -> str:
    """Render imdsproxy.yaml(5)."""
    lines = _manual_head("imdsproxy.yaml", 5, "settings of imdsproxy")
    lines += [".SH DESCRIPTION", *_paragraphs(*_TEXTS["settings"].split("\n\n")), ".SH SETTINGS"]
    settings = sorted(iterate_settings(), key=lambda setting: setting.inner)
    for name, field in Settings.model_fields.items():
        lines += [f".SS {_text(name)}", _text(field.description)]
        for one in (one for one in settings if one.path.startswith(f"{name}.")):
            default = _default(one, "default ")
            about = f"Takes {one.takes}; {default}; a change takes: {one.change.value}."
            lines += _items([(f"`{one.path}`", f"{one.description} {about}")])
    return _manual(lines, "imdsproxy(1)")


def render_namespace_proxy_manual() -> str:
    """Render neutron-ns-metadata-proxy(1)."""
    name = "neutron-ns-metadata-proxy"
    parser = run_parser(name)
    options = [
        (f"{', '.join(one.option_strings)} {one.metavar or ''}".rstrip(), one.help)
        for one in parser._actions  # noqa: SLF001 - argparse has no other list of them
        if one.help and one.help != argparse.SUPPRESS
    ]
    more = str(parser.epilog).replace("%(prog)s", name)
    lines = _manual_head(
        name, 1, "the metadata proxy of one network, as agents of Neutron start it"
    )
    lines += [
        ".SH SYNOPSIS",
        f".B {_text(name)}",
        "(\\-\\-network\\-id \\fIUUID\\fR | \\-\\-router\\-id \\fIUUID\\fR)",
        "[\\fIOPTION\\fR...]",
        ".br",
        f".B {_text(name)} cleanup",
        "\\fIID\\fR [\\fIOPTION\\fR...]",
    ]
    lines += [".SH DESCRIPTION", *_paragraphs(str(parser.description), *more.split("\n\n"))]
    lines += [".SH OPTIONS", *_items((f"`{spelled}`", text) for spelled, text in options)]
    return _manual(lines, "imdsproxy(1)")


def _manual_head(name: str, section: int, what: str) -> list[str]:
    title = f'.TH "{name.upper()}" {section} "" imdsproxy'
    return [f'.\\" {_MADE}', title, ".SH NAME", f"{_text(name)} \\- {_text(what)}"]


def _items(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [line for term, text in pairs for line in (".TP", _text(term), _text(text) or "\\&")]


def _paragraphs(*texts: str) -> list[str]:
    return [line for text in texts for line in (".PP", _text(text))][1:]


def _text(text: str | None) -> str:
    """Escape a text for roff, with `code` in bold and no commands."""
    escaped = _one_line(text).replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    marked = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", escaped).replace("`", "\\(ga")
    return f"\\&{marked}" if marked.startswith((".", "\\(aq")) else marked


def _manual(lines: Iterable[str], *see_also: str) -> str:
    names = [one[:-1].split("(") for one in see_also]
    listed = " ,\n".join(f".BR {_text(name)} ({section})" for name, section in names)
    return "\n".join([*lines, ".SH SEE ALSO", listed, ""])


PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "settings.md": render_settings_page,
    "cli.md": render_cli_page,
    "neutron-options.md": render_neutron_page,
    "metrics.md": render_metrics_page,
    "alerts.md": render_alerts_page,
    "errors.md": render_errors_page,
    "admin-api.md": render_admin_api_page,
    "hub-api.md": render_hub_api_page,
    "records.md": render_records_page,
}
MANUALS: Final[Mapping[str, Callable[[], str]]] = {
    "imdsproxy.1": render_program_manual,
    "imdsproxy.yaml.5": render_settings_manual,
    "neutron-ns-metadata-proxy.1": render_namespace_proxy_manual,
}


def write_all(reference: Path, packaging: Path) -> None:
    """Write every page, every manual page, the completions of every shell, and the JSON Schemas."""
    written = {reference / name: render() for name, render in PAGES.items()}
    written |= {packaging / "man" / name: render() for name, render in MANUALS.items()}
    for shell in SHELLS:
        written[packaging / "completion" / f"imdsproxy.{shell}"] = render_completion(shell)
    written[packaging / "schema/settings.json"] = render_schema()
    written[packaging / "schema/records.json"] = render_records_schema()
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    places = [*sys.argv[1:], *("docs/reference", "packaging")[len(sys.argv) - 1 :]]
    write_all(*map(Path, places))
