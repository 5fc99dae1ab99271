"""What a check finds, and who must act."""

from __future__ import annotations

from dataclasses import dataclass

from imdsproxy.errors import ImdsproxyError


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer.

    Attributes:
        area: `settings`, `haproxy`, `privileges`, `namespaces`, `macs`, `paths`, `directories`, `ports`, `records`,
            `tokens`, `nova`, `neutron`, `unix listener`, `audit` or `daemon`.
        exit_status: 0 when it is fine; else that of the error that `run` would end with.
        warning: It is fine to start so, and an operator should look.
    """

    area: str
    text: str
    hint: str = ""
    exit_status: int = 0
    warning: bool = False

    @property
    def ok(self) -> bool:
        """Whether no action is needed."""
        return self.exit_status == 0


@dataclass(frozen=True, slots=True)
class Area:
    """Makes findings of one area."""

    name: str

    def ok(self, text: str) -> Finding:
        """All is well."""
        return Finding(self.name, text)

    def warn(self, text: str, hint: str = "") -> Finding:
        """It is fine to start so."""
        return Finding(self.name, text, hint, warning=True)

    def wrong(self, text: str, hint: str, error: ImdsproxyError | type[ImdsproxyError]) -> Finding:
        """`run` would end with this error, or guests would not be served."""
        return Finding(self.name, text, hint, error.exit_status)

    def of(self, error: ImdsproxyError) -> list[Finding]:
        """An error as findings: one for each of its problems, or one for itself."""
        if not error.problems:
            return [self.wrong(error.message, error.hint, error)]
        return [self.wrong(str(problem), "", error) for problem in error.problems]
