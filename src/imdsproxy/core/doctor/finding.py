"""What a check finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


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
        clients: Who suffers.
        paths: Where it was seen.
    """

    code: str
    severity: Severity
    what: str
    change: str
    clients: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Card:
    """A network card of the record, as the host knows it.

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
        macs: Of its network cards, in lower case; `None` where nobody could look.
        dmi: Names below /sys/class/dmi/id and their values; `None` where nobody could look.
        dmi_complete: All of it may be read; the serial number is for root alone.
        sources: What cloud-init's own `ds-identify` has found on this boot; `None` where it has not run.
        kernel: Its kernel command line (of process 1 in a container).
        environment: Of process 1.
        container: It is one.
        instance: The record's id, where the daemon knows it.
        verdict: On who the guest is, where the daemon was asked (`imdsproxy explain`).
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
