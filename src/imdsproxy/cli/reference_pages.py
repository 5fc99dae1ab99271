"""The pages of docs/reference, out of the code that they describe; `imdsproxy.cli.docgen` writes them."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from imdsproxy import errors
from imdsproxy.admin.api import admin_app, status_of
from imdsproxy.admin.metrics import METRICS, NETWORK_SUM
from imdsproxy.cli.main import build_program, iterate_commands
from imdsproxy.cli.options import EXIT_STATUSES
from imdsproxy.config.describe import iterate_settings
from imdsproxy.config.neutron_options import NEUTRON_OPTIONS
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import render_value
from imdsproxy.core.endpoints import LeftOutCode
from imdsproxy.errors import ImdsproxyError

TEXTS: Final[Mapping[str, str]] = tomllib.loads(
    files("imdsproxy.cli").joinpath("reference_texts.toml").read_text("utf-8")
)
"""Introductions of pages."""

_MADE: Final = "<!-- Made by `python -m imdsproxy.cli.docgen`; edit the code instead. -->"


def render_settings_page() -> str:
    """docs/reference/settings.md."""
    lines = _head("Settings", TEXTS["settings"])
    for name, field in Settings.model_fields.items():
        lines += ["", f"## {name}", "", field.description or "", ""]
        lines += _settings_table(name, inner=False)
        inner = _settings_table(name, inner=True)
        if inner:
            lines += ["", TEXTS["inner_settings"], "", *inner]
    return _page(lines)


def _settings_table(section: str, *, inner: bool) -> list[str]:
    rows = [
        (
            f"`{setting.path}`",
            "required" if setting.required else f"`{render_value(setting.default)}`",
            setting.takes,
            setting.change.value,
            setting.description,
        )
        for setting in iterate_settings()
        if setting.inner is inner and setting.path.startswith(f"{section}.")
    ]
    titles = ("setting", "default", "takes", "a change takes", "what it is")
    return _table(titles, rows) if rows else []


def render_cli_page() -> str:
    """docs/reference/cli.md."""
    statuses = [(str(key), value) for key, value in EXIT_STATUSES.items()]
    lines = [*_head("Command line", TEXTS["command_line"]), "", "## Exit statuses", ""]
    lines += _table(("status", "meaning"), statuses)
    for path, command in iterate_commands(build_program(), "imdsproxy"):
        lines += ["", f"## {path}", "", one_line(command.help)]
        rows = [
            (f"`{spell_parameter(parameter)}`", one_line(getattr(parameter, "help", "")))
            for parameter in command.params
            if parameter.name != "help"
        ]
        if rows:
            lines += ["", *_table(("option or argument", "meaning"), rows)]
        if command.epilog:
            lines += ["", "Example:", "", f"    {command.epilog.removeprefix('Example: ')}"]
    return _page(lines)


def render_metrics_page() -> str:
    """docs/reference/metrics.md."""
    rows = [
        (
            f"`{metric.exposed}`",
            metric.kind,
            ", ".join(f"`{label}`" for label in metric.labels) or "-",
            metric.help,
        )
        for metric in METRICS
    ]
    table = _table(("metric", "type", "labels", "meaning"), rows)
    return _page([*_head("Metrics", TEXTS["metrics"].format(network_sum=NETWORK_SUM)), "", *table])


def render_errors_page() -> str:
    """docs/reference/errors.md."""
    kinds = [kind for name in errors.__all__ if _is_error(kind := getattr(errors, name))]
    rows = [
        (
            f"`{kind.code}`",
            str(kind.exit_status),
            str(status_of(kind)),
            "yes" if kind.retryable else "no",
            one_line(kind.__doc__),
        )
        for kind in sorted(kinds, key=lambda kind: kind.code)
        if kind is not ImdsproxyError
    ]
    by_status = [
        (
            str(status),
            meaning,
            ", ".join(f"`{kind.code}`" for kind in kinds if kind.exit_status == status),
        )
        for status, meaning in EXIT_STATUSES.items()
    ]
    lines = [*_head("Error codes", TEXTS["errors"]), ""]
    lines += _table(("code", "exit status", "HTTP status", "again", "meaning"), rows)
    lines += ["", "## Exit statuses", ""]
    lines += _table(("status", "meaning", "codes"), by_status)
    return _page(
        [*lines, "", "## Networks that are not served", "", TEXTS["not_served"], "", *_codes()]
    )


def render_admin_api_page() -> str:
    """docs/reference/admin-api.md."""
    document = admin_app(None, version="0").openapi()
    lines = _head("Admin API", TEXTS["admin_api"])
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            lines += ["", f"## {method.upper()} {path}", "", one_line(operation["description"])]
            lines += ["", *_table(("part", "shape", "meaning"), list(_parts(operation)))]
    lines += ["", "# Shapes"]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += ["", f"## {name}", "", one_line(schema.get("description", "").split("\n\n")[0])]
        required = schema.get("required", ())
        rows = [
            (f"`{key}`", _shape(value), "yes" if key in required else "no", _described(value))
            for key, value in schema.get("properties", {}).items()
        ]
        if rows:
            lines += ["", *_table(("key", "shape", "always", "meaning"), rows)]
    return _page(lines)


def render_neutron_page() -> str:
    """docs/reference/neutron-options.md."""
    rows = [
        (
            option.whose,
            ", of old ".join(f"`[{section}] {name}`" for section, name in option.all_names),
            f"`{option.default}`" if option.default else "-",
            option.fate.value,
            f"`{option.becomes}`" if option.becomes else "-",
            option.why,
        )
        for option in NEUTRON_OPTIONS
    ]
    titles = ("whose", "option", "default", "what becomes of it", "setting", "how, or why not")
    return _page([*_head("Neutron's options", TEXTS["neutron_options"]), "", *_table(titles, rows)])


PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "settings.md": render_settings_page,
    "cli.md": render_cli_page,
    "neutron-options.md": render_neutron_page,
    "metrics.md": render_metrics_page,
    "errors.md": render_errors_page,
    "admin-api.md": render_admin_api_page,
}


def write_pages(directory: Path) -> None:
    """Write every page."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, render in PAGES.items():
        (directory / name).write_text(render(), encoding="utf-8")


def _head(title: str, introduction: str) -> list[str]:
    return [_MADE, "", f"# {title}", "", introduction]


def _page(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(titles), line(["---"] * len(titles)), *(line(row) for row in rows)]


def one_line(text: str | None) -> str:
    """A docstring, or other text, as one line."""
    return " ".join(inspect.cleandoc(text or "").split())


def _codes() -> list[str]:
    return [f"- `{code.value}`" for code in LeftOutCode]


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, ImdsproxyError)


def spell_parameter(parameter: Any) -> str:  # noqa: ANN401 - typer keeps its command classes private
    """An option or argument as it is written: `--config, -c FILE`."""
    names = [name for name in parameter.opts if name.startswith("-")]
    if not names:
        return str(parameter.metavar or parameter.name)
    spelled = ", ".join([*names, *parameter.secondary_opts])
    return f"{spelled} {parameter.metavar}" if parameter.metavar else spelled


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
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"mapping to {_shape(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))


def _described(schema: Mapping[str, Any]) -> str:
    return one_line(schema.get("description", ""))
