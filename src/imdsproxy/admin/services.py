"""The services behind the admin API. The resolver waits for this module, and not for FastAPI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from imdsproxy.admin.guests import GuestService
from imdsproxy.admin.record_reports import RecordReports
from imdsproxy.admin.records import RecordService
from imdsproxy.admin.reports import StatusReport
from imdsproxy.admin.tokens import TokenService
from imdsproxy.app.watching import Watching
from imdsproxy.config.changes import SettingsReload
from imdsproxy.core.token_report import TokenReport


@dataclass(slots=True)
class Services:
    """Each route takes what it uses from here.

    Attributes:
        status: Everything at one moment.
        reload: Reads the settings again, with `True` also where settings were dropped; returns once guests are
            answered by them, or says in `pending` why they are not yet.
        end: Ends the controller after the call is answered, and with `True` the data plane too.
    """

    reports: RecordReports
    records: RecordService
    guests: GuestService
    tokens: TokenService
    watching: Watching
    status: Callable[[], Awaitable[StatusReport]]
    token_report: Callable[[], Awaitable[TokenReport]]
    reload: Callable[[bool], Awaitable[SettingsReload]]
    end: Callable[[bool], None]
