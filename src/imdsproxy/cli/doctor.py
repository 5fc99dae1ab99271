"""`imdsproxy doctor`: which clients would fail, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from imdsproxy.cli import options
from imdsproxy.cli.options import NO
from imdsproxy.errors import RequestRefused

if TYPE_CHECKING:
    from imdsproxy.cli.options import Invocation
    from imdsproxy.core.doctor import Answered, Ask, Crawl, Finding, Surroundings

Url: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="[URL]",
        help="A server, as http://169.254.169.254 inside a guest, or Nova's.",
        show_default=False,
    ),
]
Headers: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--header",
        "-H",
        metavar="NAME: VALUE",
        help="With URL: sent with every question, as Nova needs them; may be repeated.",
        show_default=False,
    ),
]

_PATHS_SHOWN: Final = 3
_COLOURS: Final = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_NOT_LOOKED_AT: Final = ("times", "session tokens", "framing", "headers", "other clouds' paths")


@dataclass(frozen=True, slots=True)
class _Subject:
    """The server or guest that is examined: its name, how to ask it, and what is known of the guest."""

    name: str
    fetch: Callable[[Ask], Answered]
    around: Surroundings
    direct: bool


@options.command
def doctor(
    run: options.Invocation,
    url: Url = None,
    *,
    network: options.MaybeNetwork = None,
    address: options.MaybeAddress = None,
    header: Headers = None,
) -> None:
    """Ask as the known clients do, and report which would fail, why, and what to change; exit 1 on errors.

    With --network and --from the daemon computes what it would answer that guest. With URL a server is asked.
    """
    from imdsproxy.core.doctor import Severity, crawl, examine, run_crawl  # noqa: PLC0415 - `--help`

    subject = _subject(run, url, network, address, header or [])
    with run.output.waiting("asking as the known clients do"):
        crawled = run_crawl(crawl(direct=subject.direct), subject.fetch)
    findings = examine(crawled, subject.around)
    if run.output.as_json:
        run.output.json(_shape(subject, crawled, findings))
    else:
        _show(run, subject, crawled, findings)
    if any(one.severity is Severity.ERROR for one in findings):
        raise typer.Exit(NO)


def _subject(
    run: Invocation, url: str | None, network: str | None, address: str | None, headers: list[str]
) -> _Subject:
    if url is not None and network is None and address is None:
        return _server(url, headers)
    if url is None and network is not None and address is not None and not headers:
        return _guest(run, network, address)
    raise RequestRefused(
        "doctor takes either a URL or both --network and --from",
        hint="as `imdsproxy doctor http://169.254.169.254` inside a guest, or "
        "`imdsproxy doctor --network NET --from ADDRESS` on the host",
    )


def _server(url: str, headers: list[str]) -> _Subject:
    from imdsproxy.cli.doctor_input import (  # noqa: PLC0415 - `--help` need not load it
        is_metadata_address,
        look_around,
        parse_url,
    )
    from imdsproxy.core.doctor import Surroundings  # noqa: PLC0415 - as above

    fetch = parse_url(url, headers)
    around = look_around() if is_metadata_address(fetch.host) else Surroundings()
    return _Subject(url, fetch, around, direct=True)


def _guest(run: Invocation, network: str, address: str) -> _Subject:
    from imdsproxy.cli.doctor_input import (  # noqa: PLC0415 - `--help` need not load it
        DaemonFetch,
        machine_macs,
    )
    from imdsproxy.core.doctor import Card, Surroundings  # noqa: PLC0415 - as above

    daemon = run.daemon()
    query = {"network": network, "address": address}
    guest = daemon.get("/v1/explain", query)
    instance = None if guest["instance"] is None else str(guest["instance"])
    name = f"{address} in network {network}" + (f" ({instance})" if instance else "")
    why = tuple(str(one) for one in guest["why"])
    cards = tuple(
        Card(str(one["network"]), str(one["mac"]), frozenset(one["seen"]))
        for one in guest.get("cards", ())
    )
    known = frozenset(mac for card in cards for mac in (card.mac, *card.seen))
    around = Surroundings(
        macs=machine_macs(known),
        cards=cards,
        instance=instance,
        verdict=str(guest["verdict"]),
        why=why,
    )
    return _Subject(name, DaemonFetch(daemon, network, address), around, direct=False)


def _served(crawled: Crawl) -> list[str]:
    from imdsproxy.core.model import Dialect  # noqa: PLC0415 - `--help` need not load it

    return [one.value for one in Dialect if crawled.serves(one)]


def _shape(subject: _Subject, crawled: Crawl, findings: tuple[Finding, ...]) -> Mapping[str, Any]:
    return {
        "subject": subject.name,
        "questions": len(crawled.exchanges),
        "served": _served(crawled),
        "given_up": crawled.given_up,
        "not_looked_at": [] if subject.direct else list(_NOT_LOOKED_AT),
        "findings": [
            {
                "code": one.code,
                "severity": one.severity.value,
                "what": one.what,
                "change": one.change,
                "clients": list(one.clients),
                "paths": list(one.paths),
            }
            for one in findings
        ],
    }


def _show(
    run: Invocation, subject: _Subject, crawled: Crawl, findings: tuple[Finding, ...]
) -> None:
    from imdsproxy.cli.output import clean  # noqa: PLC0415 - `--help` need not load it

    served = ", ".join(_served(crawled)) or "none"
    run.output.styled(
        f"[bold]{clean(subject.name)}[/]: {len(crawled.exchanges)} questions, documents served: {served}"
    )
    if crawled.given_up:
        run.output.styled(f"[yellow]given up early:[/] {clean(crawled.given_up)}")
    if not subject.direct:
        run.output.styled(
            f"[dim]not looked at: {', '.join(_NOT_LOOKED_AT)} (`imdsproxy doctor "
            "http://169.254.169.254` in the guest does)[/]"
        )
    run.output.styled("")
    run.output.entries((_head(one), _facts(one)) for one in findings)
    run.output.styled(_verdict(findings))


def _head(finding: Finding) -> str:
    severity = finding.severity.value
    return f"[{_COLOURS[severity]}]{severity}[/] [bold]{finding.code}[/]"


def _facts(finding: Finding) -> Mapping[str, str]:
    from imdsproxy.cli.output import clean  # noqa: PLC0415 - `--help` need not load it

    facts = {"seen": clean(finding.what)}
    if finding.paths:
        shown = [clean(path) for path in finding.paths[:_PATHS_SHOWN]]
        more = len(finding.paths) - len(shown)
        facts["at"] = "\n".join([*shown, f"and {more} more"] if more else shown)
    if finding.clients:
        facts["breaks"] = "\n".join(clean(one) for one in finding.clients)
    facts["change"] = clean(finding.change)
    return facts


def _verdict(findings: tuple[Finding, ...]) -> str:
    counts = {name: sum(one.severity.value == name for one in findings) for name in _COLOURS}
    if not any(counts.values()):
        return "[green]nothing found[/]"
    shown = [
        f"[{_COLOURS[name]}]{count} {name}{'' if count == 1 else 's'}[/]"
        for name, count in counts.items()
        if count
    ]
    return ", ".join(shown)
