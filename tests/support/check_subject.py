"""What `check` is given, without a host."""

from collections.abc import Iterable, Mapping

from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.tools.checks import Finding, Subject


def subject(settings: Mapping[str, object] | None = None) -> Subject:
    """Settings as a file has them."""
    parsed = Settings.model_validate(settings or {})
    return Subject(parsed, Loaded(parsed, ()))


def summarise(found: Iterable[Finding]) -> list[tuple[int, bool, str]]:
    """Exit status, whether it is a warning, and text of each."""
    return [(one.exit_status, one.warning, one.text) for one in found]
