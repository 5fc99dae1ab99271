"""`imdsproxy config show|schema|sample|import`."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from imdsproxy.cli import options
from imdsproxy.cli.options import argument, flag
from imdsproxy.config import read_each
from imdsproxy.config.neutron_ini import IniOption, decode_ini, parse_ini
from imdsproxy.errors import AlreadyExists, ConfigUnreadable, RequestRefused

_SECRET_NAME: Final = "nova.secret"  # noqa: S105 - a file's name
_SECRET_MODE: Final = 0o600
_SETTINGS_MODE: Final = 0o640
_DIRECTORY: Final = Path("/etc/imdsproxy")

config_app = typer.Typer(
    help="Show, check and convert settings: show, schema, sample, import.", no_args_is_help=True
)


@config_app.command("show")
@partial(options.command, shared=("as_json", "config"))
def show(
    run: options.Invocation,
    *,
    origin: Annotated[
        bool, flag("--origin", "Show the file or variable that sets each value.")
    ] = False,
) -> None:
    """Show the settings, merged from defaults, the file, conf.d/ and the environment."""
    from imdsproxy.config.load import render_settings, settings_by_origin

    loaded = run.load()
    dumped = loaded.settings.model_dump(mode="json")
    shape = settings_by_origin(loaded) if origin else dumped
    run.output.answer(shape, render_settings(loaded, with_origin=origin))


@config_app.command("schema")
@options.json_command
def schema(
    run: options.Invocation,
    *,
    records: Annotated[bool, flag("--records", "Print the schema of record files.")] = False,
) -> None:
    """Print the JSON Schema of the configuration file for editors, or with --records of record files."""
    from imdsproxy.config import describe

    run.output.text(describe.render_records_schema() if records else describe.render_schema())


@config_app.command("sample")
@options.json_command
def sample(run: options.Invocation) -> None:
    """Print every setting with its default and purpose."""
    from imdsproxy.config.describe import render_sample
    from imdsproxy.config.schema import Settings

    run.output.answer(Settings().model_dump(mode="json"), render_sample())


@config_app.command("import")
@options.json_command
def import_settings(
    run: options.Invocation,
    files: Annotated[
        list[Path],
        argument(
            "FILE...",
            "Neutron's files, in the order of the agent's command line: later files have priority. Nova's "
            "nova.conf may be included.",
        ),
    ],
    *,
    neutron: Annotated[bool, flag("--neutron", "Import the files of Neutron's agents.")] = False,
    output: Annotated[
        Path | None,
        flag(
            "--output -o FILE",
            "Write the settings to this file, mode 0640 (default: standard output).",
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        flag(
            "--secret-file FILE",
            "Write the secret to this file, mode 0600 (default: nova.secret beside --output). It is never printed.",
        ),
    ] = None,
    agent_user: Annotated[
        str,
        flag(
            "--agent-user NAME",
            "Account and group of Neutron's agents (default: neutron).",
        ),
    ] = "neutron",
    server_name: Annotated[
        str | None,
        flag("--server-name NAME", "The name in Nova's certificate, if Nova is given by address."),
    ] = None,
    force: Annotated[bool, flag("--force", "Replace existing files.")] = False,
) -> None:
    """Convert the ini files of Neutron's agents to settings, and report the result for each option.

    The settings go to standard output and the report to standard error; with --output, the report to standard output.
    """
    from imdsproxy.config import neutron_import

    if not neutron:
        raise RequestRefused("the kind of files is not given", hint="add --neutron")
    beside = _DIRECTORY if output is None else output.absolute().parent
    secret = (secret_file or beside / _SECRET_NAME).absolute()
    parsed = read_each(files, _read, "file")
    imported = neutron_import.plan_import(
        parsed, secret, agent_user=agent_user, server_name=server_name
    )
    wanted: dict[Path, tuple[bytes, int]] = {}
    if output is not None or secret_file is not None:
        wanted[secret] = (imported.secret.encode(), _SECRET_MODE)
    if output is not None:
        wanted[output.absolute()] = (imported.text.encode(), _SETTINGS_MODE)
    _write(wanted, force=force)
    if run.output.as_json:
        shape = {"settings": imported.settings, **imported.report, "yaml": imported.text}
        run.output.json({**shape, "written": list(map(str, wanted))})
        return
    report = "\n".join(neutron_import.render_report(imported, wanted)) + "\n"
    if output is None:
        run.output.text(imported.text)
        sys.stderr.write(report)
    else:
        run.output.text(report)


def _read(file: Path) -> tuple[IniOption, ...]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigUnreadable(f"cannot read {file}: {error.strerror}") from error
    return parse_ini(decode_ini(data, str(file)), str(file))


def _write(files: Mapping[Path, tuple[bytes, int]], *, force: bool) -> None:
    """Write all files with their modes; refuse all if one would replace a different file, unless forced."""
    from imdsproxy.host.files import write_atomic

    there = [path for path, (data, _) in files.items() if not force and _is_other(path, data)]
    if there:
        raise AlreadyExists(
            f"{' and '.join(map(str, there))} would be replaced",
            hint="choose another name, or use --force",
        )
    for path, (data, mode) in files.items():
        write_atomic(path, data, mode=mode, durable=True)


def _is_other(path: Path, data: bytes) -> bool:
    try:
        return path.is_symlink() or path.read_bytes() != data
    except FileNotFoundError:
        return False
    except OSError:
        return True
