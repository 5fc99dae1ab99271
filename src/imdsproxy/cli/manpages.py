"""Manual pages and completions in packaging, out of the same code as docs/reference; see `imdsproxy.cli.docgen`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from imdsproxy.app.namespace_proxy.command import describe_options
from imdsproxy.cli.main import SHELLS, build_program, iterate_commands, render_completion
from imdsproxy.cli.options import EXIT_STATUSES
from imdsproxy.cli.reference_pages import (
    TEXTS,
    one_line,
    spell_parameter,
)
from imdsproxy.config.describe import Setting, iterate_settings
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import render_value

_MADE: Final = '.\\" Made by `python -m imdsproxy.cli.docgen`; edit the code instead.'

_FILES: Final = (
    ("/etc/imdsproxy/imdsproxy.yaml", "Settings; see imdsproxy.yaml(5)."),
    ("/etc/imdsproxy/conf.d/*.yaml", "More of them, merged over it in the order of their names."),
    ("/var/lib/imdsproxy", "Records, documents made of them, and passwords that guests posted."),
    ("/run/imdsproxy/admin.sock", "The admin socket, which the commands ask."),
)


def render_program_page() -> str:
    """imdsproxy(1)."""
    root = build_program()
    commands = list(iterate_commands(root, "imdsproxy"))
    lines = _head(
        "imdsproxy", 1, "instance metadata at 169.254.169.254 for every network of a host"
    )
    lines += [
        ".SH SYNOPSIS",
        ".B imdsproxy",
        "[\\fIOPTION\\fR...]",
        "\\fICOMMAND\\fR [\\fIARGUMENT\\fR...]",
    ]
    lines += [".SH DESCRIPTION", _text(root.help or ""), ".PP", _text(TEXTS["command_line"])]
    lines += [".PP", _text(TEXTS["commands"]), ".SH OPTIONS"]
    lines += _parameters(root)
    lines += [".SH COMMANDS"]
    for path, command in commands[1:]:
        lines += [f".SS {_text(path)}", _text(one_line(command.help)), *_parameters(command)]
        if command.epilog:
            lines += [".PP", _text(command.epilog)]
    lines += [".SH EXIT STATUS", *_items((str(key), value) for key, value in EXIT_STATUSES.items())]
    lines += [".SH UNITS", _text(TEXTS["units"])]
    lines += [".SH FILES", *_items(_FILES)]
    return _page(lines, "imdsproxy.yaml(5)", "neutron-ns-metadata-proxy(1)", "haproxy(1)")


def render_settings_page() -> str:
    """imdsproxy.yaml(5)."""
    lines = _head("imdsproxy.yaml", 5, "settings of imdsproxy")
    lines += [".SH DESCRIPTION"]
    lines += _join(_text(part) for part in TEXTS["settings"].split("\n\n"))
    lines += [".SH SETTINGS"]
    settings = sorted(iterate_settings(), key=lambda setting: setting.inner)
    for name, field in Settings.model_fields.items():
        lines += [f".SS {_text(name)}", _text(field.description or "")]
        own = [setting for setting in settings if setting.path.startswith(f"{name}.")]
        lines += _items((f"`{setting.path}`", _setting_words(setting)) for setting in own)
    return _page(lines, "imdsproxy(1)")


def render_namespace_proxy_page() -> str:
    """neutron-ns-metadata-proxy(1)."""
    name = "neutron-ns-metadata-proxy"
    description, options, more = describe_options(name)
    lines = _head(name, 1, "the metadata proxy of one network, as agents of Neutron start it")
    lines += [
        ".SH SYNOPSIS",
        f".B {_text(name)}",
        "(\\-\\-network\\-id \\fIUUID\\fR | \\-\\-router\\-id \\fIUUID\\fR)",
    ]
    lines += [
        "[\\fIOPTION\\fR...]",
        ".br",
        f".B {_text(name)} cleanup",
        "\\fIID\\fR [\\fIOPTION\\fR...]",
    ]
    lines += [".SH DESCRIPTION", _text(description)]
    lines += [".PP", *_join(_text(part) for part in more.split("\n\n"))]
    lines += [".SH OPTIONS", *_items((f"`{spelled}`", words) for spelled, words in options)]
    return _page(lines, "imdsproxy(1)")


MAN_PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "imdsproxy.1": render_program_page,
    "imdsproxy.yaml.5": render_settings_page,
    "neutron-ns-metadata-proxy.1": render_namespace_proxy_page,
}


def write_packaging(directory: Path) -> None:
    """Write every page into `man`, and every shell's script into `completion`."""
    files = {f"man/{name}": render() for name, render in MAN_PAGES.items()}
    files |= {f"completion/imdsproxy.{shell}": render_completion(shell) for shell in SHELLS}
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")


def _setting_words(setting: Setting) -> str:
    default = "required" if setting.required else f"default `{render_value(setting.default)}`"
    return f"{setting.description} Takes {setting.takes}; {default}; a change takes: {setting.change.value}."


def _head(name: str, section: int, what: str) -> list[str]:
    title = f'.TH "{name.upper()}" {section} "" imdsproxy'
    return [_MADE, title, ".SH NAME", f"{_text(name)} \\- {_text(what)}"]


def _parameters(command: object) -> list[str]:
    parameters: Sequence[object] = getattr(command, "params", ())
    return _items(
        (f"`{spell_parameter(parameter)}`", one_line(getattr(parameter, "help", "")))
        for parameter in parameters
        if getattr(parameter, "name", "") != "help"
    )


def _items(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [line for term, words in pairs for line in (".TP", _text(term), _text(words) or "\\&")]


def _join(paragraphs: Iterable[str]) -> Iterator[str]:
    for number, paragraph in enumerate(paragraphs):
        if number:
            yield ".PP"
        yield paragraph


def _text(words: str) -> str:
    """Words as roff has them: `code` is bold, and nothing of theirs is a command."""
    escaped = one_line(words).replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    marked = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", escaped).replace("`", "\\(ga")
    return f"\\&{marked}" if marked.startswith((".", "\\(aq")) else marked


def _page(lines: Iterable[str], *see_also: str) -> str:
    references = [
        f".BR {_text(name)} ({section[:-1]})"
        for name, _, section in (one.partition("(") for one in see_also)
    ]
    listed = [f"{one} ," for one in references[:-1]] + references[-1:]
    return "\n".join([*lines, ".SH SEE ALSO", *listed, ""])
