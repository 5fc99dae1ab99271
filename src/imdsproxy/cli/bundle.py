"""The command `imdsproxy bundle`."""

from pathlib import Path
from typing import Annotated

from imdsproxy.cli import options
from imdsproxy.cli.output import Output, Shape, clean
from imdsproxy.errors import spell_count


@options.host_command
def bundle(
    run: options.Invocation,
    *,
    output: Annotated[
        Path | None,
        options.flag(
            "--output -o FILE",
            "The file to write, which must not exist (default: imdsproxy-HOST-DATE.tar.gz in this directory).",
        ),
    ] = None,
) -> None:
    """Collect settings, status, logs and HAProxy's state in one file, without secrets and user-data.

    Also works without a daemon; README.txt in the file lists the missing parts.
    """
    from imdsproxy.tools.bundle.make import make_bundle

    with run.output.waiting("collecting"):
        made = make_bundle(run.load, run.socket, output)
    shape = {
        "file": str(made.path),
        "parts": list(made.parts),
        "lacking": [{"part": one, "reason": reason} for one, reason in made.lacking],
    }
    run.output.answer(shape, _show)


def _show(output: Output, shape: Shape) -> None:
    output.styled(f"{clean(shape['file'])}: {spell_count(len(shape['parts']), 'part')}")
    rows = (
        {"LACKING": clean(one["part"]), "REASON": clean(one["reason"])} for one in shape["lacking"]
    )
    output.table(rows, apart=True, keep=("LACKING",))
    output.styled("Review the file before you share it: its README.txt lists what was removed.")
