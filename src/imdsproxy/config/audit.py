"""The audit log: a line for each request of a guest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from imdsproxy.config.change import Change
from imdsproxy.config.section import OffIsFalse, Section, setting


def _destination(value: object) -> object:
    if value != "journal" and isinstance(value, str) and not Path(value).is_absolute():
        raise PydanticCustomError(
            "destination", "{written} is neither `journal` nor an absolute path", {"written": value}
        )
    return value


class AuditSettings(Section):
    """The audit log: one JSON line for each request and its answer."""

    mode: Annotated[Literal["off", "sampled", "all"], OffIsFalse] = setting("off", Change.RELOAD)
    """Which requests have a line: none, one of `sample` by chance, or each. Off, because a line costs HAProxy 1 to 2
    µs, which is up to a sixth of what a request does.
    """

    sample: int = setting(100, Change.RELOAD, ge=2, le=1_000_000)
    """With `sampled`: of how many requests one has a line."""

    destination: Annotated[str, BeforeValidator(_destination), Field(min_length=1)] = setting(
        "journal", Change.LIVE, examples=["journal", "/var/log/imdsproxy/audit.log"]
    )
    """`journal`, where at most 300 lines a second are written because systemd's journal takes little more from one
    service, or the absolute path of a file, mode 0640. The file may be renamed at any time (logrotate): a new one is
    begun.
    """

    @property
    def one_in(self) -> int:
        """Of so many requests one has a line; 0 where none has."""
        return {"off": 0, "sampled": self.sample, "all": 1}[self.mode]
