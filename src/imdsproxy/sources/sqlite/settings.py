"""The source `sqlite`: where its file is."""

from __future__ import annotations

from imdsproxy.config.change import Change
from imdsproxy.config.section import AbsolutePath, Section, setting


class SqliteSourceSettings(Section):
    """Records in the embedded store, written by the command line and the admin API."""

    enabled: bool = setting(True, Change.RESTART)
    """Use the store. On, because it is what `network add` and `instance add` write to."""

    path: AbsolutePath | None = setting(None, Change.RESTART)
    """The database file; null is `store.sqlite` in `paths.state_dir`."""
