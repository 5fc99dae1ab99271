"""`imdsproxy namespace-proxy`: the proxy of one network or router, for agents that spawn one per namespace."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import typer

from imdsproxy.cli import options

SETTINGS: Final = {
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}
"""All words after the command's name are the other program's, also --help."""

Words: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[OPTION]...",
        help="As `neutron-ns-metadata-proxy`, which this is; --help says them all.",
        show_default=False,
    ),
]


def namespace_proxy(context: typer.Context, words: Words = None) -> int:
    """Be one network's own metadata proxy, as Neutron's agents spawn it in each namespace."""
    from imdsproxy.app.namespace_proxy import main  # noqa: PLC0415 - the others need not load it

    config = options.invocation(context).config
    return main(words or [], program="imdsproxy namespace-proxy", config=config)
