"""Doctor for metadata servers: sends the requests of known clients and reports the clients that would fail, and why.

`crawl` sends the requests through a fetch function. `checks_documents.examine` checks the answers, whatever their
origin. findings.toml has all possible findings.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from typing import Any, Final


class Severity(StrEnum):
    """Severity of a finding, the worst first."""

    ERROR = "error"
    """A client boots with a wrong configuration, or not at all."""

    WARNING = "warning"
    """A client is slow, or lacks a feature."""

    NOTE = "note"
    """Information."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Fault or note about a metadata server.

    Attributes:
        code: Stable, in kebab-case.
        what: Observation, in a sentence.
        change: Correction.
        clients: Clients that it breaks; known from tests with them.
        paths: Paths where it was observed.
    """

    code: str
    severity: Severity
    what: str
    change: str
    clients: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


TEXTS: Final[Mapping[str, dict[str, Any]]] = tomllib.loads(
    files(__name__).joinpath("findings.toml").read_text("utf-8")
)


def found(
    code: str,
    *paths: str,
    severity: Severity | None = None,
    clients: Iterable[str] | None = None,
    case: str = "",
    **values: Any,
) -> Finding:
    """Return a finding with the texts of its code.

    Args:
        code: Code in findings.toml.
        paths: Paths where it was observed.
        severity: Severity that replaces the code's.
        clients: Clients that replace the code's.
        case: Name in the code's `cases`; its texts replace the code's.
        values: Values for the braces in the texts.
    """
    text = TEXTS[code] | TEXTS[code].get("cases", {}).get(case, {})
    return Finding(
        code,
        severity or Severity(text["severity"]),
        text["what"].format(**values),
        text["change"].format(**values),
        tuple(text.get("clients", ()) if clients is None else clients),
        tuple(dict.fromkeys(paths)),
    )


def seen(code: str, paths: Iterable[str], **values: Any) -> Iterator[Finding]:
    """Yield a finding if there are any paths."""
    if where := tuple(paths):
        yield found(code, *where, **values)


@dataclass(frozen=True, slots=True)
class Nic:
    """NIC of the record.

    Attributes:
        seen: MACs that have answered for its addresses in its network.
    """

    network: str
    mac: str
    seen: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Known facts about the guest.

    Attributes:
        nics: NICs of the record, if the daemon was asked.
        macs: MACs of the guest's NICs, in lower case; `None` if unknown.
        dmi: Names below /sys/class/dmi/id and their values; `None` if unknown.
        dmi_complete: Whether all of DMI was readable; only root may read the serial number.
        sources: Data sources that cloud-init's `ds-identify` found on this boot; `None` if it did not run.
        kernel: Kernel command line (in a container, that of process 1).
        environment: Environment of process 1.
        container: Whether the guest is a container.
        instance: Id of the record, if the daemon knows it.
        verdict: Verdict on the guest's identity, if the daemon was asked (`imdsproxy explain`).
        why: Reasons of the verdict.
    """

    macs: frozenset[str] | None = None
    nics: tuple[Nic, ...] = ()
    dmi: Mapping[str, str] | None = None
    dmi_complete: bool = True
    sources: tuple[str, ...] | None = None
    kernel: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    container: bool = False
    instance: str | None = None
    verdict: str = ""
    why: tuple[str, ...] = ()
