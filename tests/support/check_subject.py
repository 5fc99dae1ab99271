"""What `check` is given, without a host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from imdsproxy.cli.checks import Finding, Subject
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.errors import ImdsproxyError


def subject(
    settings: Mapping[str, object] | None = None,
    *,
    status: Mapping[str, Any] | ImdsproxyError | None = None,
) -> Subject:
    """Settings as a file has them, and what a daemon reports."""
    parsed = Settings.model_validate(settings or {})
    return Subject(parsed, Loaded(parsed, ()), status=status)


def summarise(found: Iterable[Finding]) -> list[tuple[int, bool, str]]:
    """Exit status, whether it is a warning, and text of each."""
    return [(one.exit_status, one.warning, one.text) for one in found]
