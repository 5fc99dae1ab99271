"""`imdsproxy config show|schema|sample|import`."""

from __future__ import annotations

import json
from typing import Annotated, TypeAlias

import typer

from imdsproxy.cli import config_import, options

app = typer.Typer(help="Settings: show, schema, sample, import.", no_args_is_help=True)

Origin: TypeAlias = Annotated[
    bool,
    typer.Option("--origin", help="Say where each value was written.", show_default=False),
]


@app.command("show")
def show(
    context: typer.Context,
    *,
    origin: Origin = False,
    as_json: options.Json = False,
    config: options.Config = None,
) -> None:
    """The settings in force, from the file, conf.d/ and the environment."""
    from imdsproxy.config.render import (  # noqa: PLC0415 - `--help` need not load it
        render_settings,
        settings_by_origin,
    )

    run = options.invocation(context, as_json=as_json, config=config)
    loaded = run.load()
    if not run.output.as_json:
        run.output.text(render_settings(loaded, with_origin=origin))
    elif origin:
        run.output.json(settings_by_origin(loaded))
    else:
        run.output.json(loaded.settings.model_dump(mode="json"))


@app.command("schema")
def schema(context: typer.Context, *, as_json: options.Json = False) -> None:
    """The JSON Schema of the configuration file, for editors."""
    from imdsproxy.config.render import render_schema  # noqa: PLC0415 - `--help` need not load it

    options.invocation(context, as_json=as_json).output.text(render_schema())


@app.command("sample")
def sample(context: typer.Context, *, as_json: options.Json = False) -> None:
    """Every setting with its default and what it is for."""
    from imdsproxy.config.render import render_sample  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.config.schema import Settings  # noqa: PLC0415 - as above

    run = options.invocation(context, as_json=as_json)
    if run.output.as_json:
        run.output.text(json.dumps(Settings().model_dump(mode="json"), indent=2))
    else:
        run.output.text(render_sample())


app.command("import")(config_import.import_settings)
