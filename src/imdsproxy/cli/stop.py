"""`imdsproxy stop`: end the controller, or everything."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, TypeAlias, cast

import typer

from imdsproxy.cli import options
from imdsproxy.errors import AdminUnavailable, HostRefused

_END_DEADLINE_S: Final = 40.0
_POLL_S: Final = 0.02

DataPlane: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--data-plane",
        help="End HAProxy and the document server too: guests get no answer.",
        show_default=False,
    ),
]


@options.command
def stop(
    run: options.Invocation,
    *,
    data_plane: DataPlane = False,
) -> None:
    """End the controller; known guests are served on. With --data-plane, end everything."""
    daemon = run.daemon()
    try:
        answer = cast(
            "Mapping[str, object]",
            daemon.request("POST", "/v1/stop", body={"data_plane": data_plane}),
        )
        stopped = list(cast("Sequence[str]", answer["stopping"]))
        _wait_until_gone(daemon.socket, int(str(answer["controller"])))
    except AdminUnavailable:
        # A dead controller is no reason to leave what it left running.
        if not data_plane:
            raise
        _stop_orphaned_data_plane(run, daemon.socket)
        stopped = []
    if run.output.as_json:
        run.output.json({"stopped": stopped, "data_plane": data_plane})
    else:
        run.output.text(f"stopped: {', '.join(stopped) or 'the data plane; no controller ran'}")


def _stop_orphaned_data_plane(run: options.Invocation, asked: Path) -> None:
    import asyncio  # noqa: PLC0415 - `--help` need not load it

    from imdsproxy.controller.stop import stop_data_plane  # noqa: PLC0415 - as above
    from imdsproxy.host.socket_file import find_socket_holder  # noqa: PLC0415 - as above

    settings = run.settings
    if settings.admin_socket != asked:
        # The settings are another daemon's: its data plane must not be taken for the dead one's.
        raise AdminUnavailable(
            f"no daemon answers on {asked}, and the settings are of another one",
            hint="name its settings with --config, to end the data plane that it left",
        )
    hung = find_socket_holder(asked)
    if hung is not None:
        # It would start again what is ended here, as soon as it goes on.
        raise HostRefused(
            f"the controller (pid {hung.pid or 'unknown'}) does not answer: nothing was stopped",
            hint="end it first: systemctl stop imdsproxy, or kill -KILL and its pid; then try again",
        )
    asyncio.run(stop_data_plane(settings, os.environ))


def _wait_until_gone(path: Path, pid: int) -> None:
    """Until the controller has taken its socket away, which it does last, or has died."""
    from imdsproxy.host.process import identify  # noqa: PLC0415 - `--help` need not load it

    deadline = time.monotonic() + _END_DEADLINE_S
    while path.exists() and identify(pid) is not None:
        if time.monotonic() > deadline:
            raise HostRefused(
                f"the controller (pid {pid}) has not ended within {_END_DEADLINE_S:.0f} s",
                hint="its log says what it waits for",
            )
        time.sleep(_POLL_S)
