"""`imdsproxy documents`: be the document server."""

from __future__ import annotations

import os
import sys

import typer

from imdsproxy.cli import options


def documents(context: typer.Context, *, config: options.Config = None) -> None:
    """Be the document server: answer guests from compiled records, until stopped."""
    import imdsproxy.host.plain_structlog  # noqa: F401, PLC0415 - before all that logs
    from imdsproxy.dataplane.layout import Layout  # noqa: PLC0415 - the others need not load it
    from imdsproxy.host.clock import SystemClock  # noqa: PLC0415 - as above
    from imdsproxy.host.logs import open_logging  # noqa: PLC0415 - as above
    from imdsproxy.host.notify import ServiceNotifier, is_journal  # noqa: PLC0415 - as above
    from imdsproxy.serving.server import DocumentServerOptions, run_documents  # noqa: PLC0415

    settings = options.invocation(context, config=config).settings
    log, journal = settings.log, is_journal(sys.stderr, os.environ)
    open_logging(log.level, log.format, sys.stderr, clock=SystemClock(), journal=journal)
    layout = Layout(
        runtime=settings.paths.runtime_dir,
        state=settings.paths.state_dir,
        documents_workers=settings.documents.workers,
        chroot=settings.haproxy.chroot,
    )
    run_documents(
        DocumentServerOptions(
            sockets=layout.documents_sockets,
            records=layout.records,
            passwords=layout.passwords,
            pid_file=layout.documents_pid,
            log=layout.documents_log,
            user=settings.documents.user,
            group=settings.documents.group,
        ),
        # The service manager's variable, not a setting: where it listens for "ready".
        notifier=ServiceNotifier(os.environ.get("NOTIFY_SOCKET", "")),
    )
