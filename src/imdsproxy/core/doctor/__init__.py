"""A doctor for metadata servers: asks as the known clients do, and reports which of them would fail, and why.

`crawl` asks by a function that fetches. `checks_documents.examine` checks the answers, wherever they come from. What it
may find stands in findings.toml.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from typing import Any, Final


class Severity(StrEnum):
    """How bad it is, the worst first."""

    ERROR = "error"
    """Some client comes up wrong, or not at all."""

    WARNING = "warning"
    """Some client is slow, or lacks something."""

    NOTE = "note"
    """Good to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing.

    Attributes:
        code: Stable, in kebab-case.
        what: What was seen, in a sentence.
        change: What to do about it.
        clients: Those that it breaks; found by testing them.
        paths: Where it was seen.
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
    **values: Any,  # noqa: ANN401 - what a text shows
) -> Finding:
    """A finding with the texts of its code.

    Args:
        code: In findings.toml.
        paths: Where it was seen.
        severity: In the place of the code's own.
        clients: The same.
        case: Which of the code's `cases` it is: what that has stands in the place of the code's own.
        values: What stands in braces in the texts.
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


def seen(code: str, paths: Iterable[str], **values: Any) -> Iterator[Finding]:  # noqa: ANN401 - as above
    """A finding, if there is a path where it was seen."""
    if where := tuple(paths):
        yield found(code, *where, **values)


@dataclass(frozen=True, slots=True)
class Card:
    """A NIC of the record, as the host knows it.

    Attributes:
        seen: The MACs that have answered for its addresses in its network.
    """

    network: str
    mac: str
    seen: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known of the guest itself.

    Attributes:
        cards: Of the record, where the daemon was asked.
        macs: Of its NICs, in lower case; `None` where they are not known.
        dmi: Names below /sys/class/dmi/id and their values; `None` where they are not known.
        dmi_complete: All of it may be read; the serial number is for root alone.
        sources: What cloud-init's own `ds-identify` has found on this boot; `None` where it has not run.
        kernel: Its kernel command line (of process 1 in a container).
        environment: Of process 1.
        container: It is one.
        instance: The record's id, where the daemon knows it.
        verdict: On the identity of the guest, where the daemon was asked (`imdsproxy explain`).
        why: The verdict's reasons.
    """

    macs: frozenset[str] | None = None
    cards: tuple[Card, ...] = ()
    dmi: Mapping[str, str] | None = None
    dmi_complete: bool = True
    sources: tuple[str, ...] | None = None
    kernel: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    container: bool = False
    instance: str | None = None
    verdict: str = ""
    why: tuple[str, ...] = ()
