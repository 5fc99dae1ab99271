"""What the doctor examines: a server over HTTP, the daemon's own computation, the machine around; and what it shows."""

from __future__ import annotations

import http.client
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from imdsproxy.cli.admin_client import AdminClient
from imdsproxy.cli.options import Invocation
from imdsproxy.cli.output import Output, clean, read_bytes_shape
from imdsproxy.core.doctor import examine
from imdsproxy.core.doctor.crawl import Answer, Answered, Ask, Crawl, Framing, Unanswered, crawl
from imdsproxy.core.doctor.finding import Card, Finding, Severity, Surroundings
from imdsproxy.core.model import METADATA_IPV4, METADATA_IPV6, Dialect
from imdsproxy.errors import RequestRefused

_PATHS_SHOWN: Final = 3
_COLOURS: Final = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_NOT_LOOKED_AT: Final = ("times", "session tokens", "framing", "headers", "other clouds' paths")
_TIMEOUT_S: Final = 10.0
_MOST_BYTES: Final = 17 << 20
_SAFE: Final = "/?=&:%+,@;~!$'()*"
_HTTP_1_0: Final = 10
_BODILESS: Final = frozenset({204, 304})


@dataclass(frozen=True, slots=True)
class _Subject:
    """The server or guest that is examined: its name, how to ask it, and what is known of the guest."""

    name: str
    fetch: Callable[[Ask], Answered]
    around: Surroundings
    direct: bool


def run_doctor(
    run: Invocation, url: str | None, network: str | None, address: str | None, headers: list[str]
) -> bool:
    """Ask what the command line names, and show what is found; whether some client would fail.

    Raises:
        RequestRefused: The command line makes no sense.
    """
    subject = _find_subject(run, url, network, address, headers)
    with run.output.waiting("asking as the known clients do"):
        crawled = crawl(subject.fetch, direct=subject.direct)
    findings = examine(crawled, subject.around)
    shape = {
        "subject": subject.name,
        "questions": len(crawled.asked),
        "served": _served(crawled),
        "given_up": crawled.given_up,
        "not_looked_at": [] if subject.direct else list(_NOT_LOOKED_AT),
        "findings": [asdict(one) for one in findings],
    }
    run.output.answer(shape, lambda output, _: _show(output, subject, crawled, findings))
    return any(one.severity is Severity.ERROR for one in findings)


def _find_subject(
    run: Invocation, url: str | None, network: str | None, address: str | None, headers: list[str]
) -> _Subject:
    if url is not None and network is None and address is None:
        fetch = parse_url(url, headers)
        around = look_around() if is_metadata_address(fetch.host) else Surroundings()
        return _Subject(url, fetch, around, direct=True)
    if url is None and network is not None and address is not None and not headers:
        return _find_guest(run.daemon(), network, address)
    raise RequestRefused(
        "doctor takes either a URL or both --network and --from",
        hint="as `imdsproxy doctor http://169.254.169.254` inside a guest, or "
        "`imdsproxy doctor --network NET --from ADDRESS` on the host",
    )


def _find_guest(daemon: AdminClient, network: str, address: str) -> _Subject:
    guest = daemon.get("/v1/explain", {"network": network, "address": address})
    cards = tuple(
        Card(one["network"], one["mac"], frozenset(one["seen"])) for one in guest.get("cards", ())
    )
    around = Surroundings(
        macs=machine_macs(frozenset(mac for card in cards for mac in (card.mac, *card.seen))),
        cards=cards,
        instance=guest["instance"],
        verdict=guest["verdict"],
        why=tuple(guest["why"]),
    )
    name = f"{address} in network {network}" + (
        f" ({guest['instance']})" if guest["instance"] else ""
    )
    fetch = partial(_ask_daemon, daemon, network, address)
    return _Subject(name, fetch, around, direct=False)


def _served(crawled: Crawl) -> list[str]:
    return [one.value for one in Dialect if crawled.serves(one)]


def _show(output: Output, subject: _Subject, crawled: Crawl, findings: Sequence[Finding]) -> None:
    served = ", ".join(_served(crawled)) or "none"
    output.styled(
        f"[bold]{clean(subject.name)}[/]: {len(crawled.asked)} questions, documents served: {served}"
    )
    if crawled.given_up:
        output.styled(f"[yellow]given up early:[/] {clean(crawled.given_up)}")
    if not subject.direct:
        output.styled(
            f"[dim]not looked at: {', '.join(_NOT_LOOKED_AT)} (`imdsproxy doctor "
            "http://169.254.169.254` in the guest does)[/]"
        )
    output.styled("")
    output.entries((_head(one), _facts(one)) for one in findings)
    output.styled(_summarise(findings))


def _head(finding: Finding) -> str:
    return f"[{_COLOURS[finding.severity]}]{finding.severity.value}[/] [bold]{finding.code}[/]"


def _facts(finding: Finding) -> Mapping[str, str]:
    more = len(finding.paths) - _PATHS_SHOWN
    facts = {
        "seen": [finding.what],
        "at": [*finding.paths[:_PATHS_SHOWN], *([f"and {more} more"] if more > 0 else ())],
        "breaks": finding.clients,
        "change": [finding.change],
    }
    return {name: "\n".join(map(clean, lines)) for name, lines in facts.items() if lines}


def _summarise(findings: Sequence[Finding]) -> str:
    counts = Counter(one.severity.value for one in findings)
    shown = [
        f"[{colour}]{counts[name]} {name}{'' if counts[name] == 1 else 's'}[/]"
        for name, colour in _COLOURS.items()
        if counts[name]
    ]
    return ", ".join(shown) or "[green]nothing found[/]"


@dataclass(frozen=True, slots=True)
class HttpFetch:
    """Asks a server, each question on a connection of its own, as most clients do.

    Args:
        host: A name or address, an IPv6 address with its zone and without brackets.
        port: TCP port.
        prefix: Put in front of every path.
        tls: Whether it is https.
        headers: Added to every question.
        timeout_s: For each step of the network, as long as cloud-init's.
        clock: Seconds that only grow.
    """

    host: str
    port: int
    prefix: str = ""
    tls: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = _TIMEOUT_S
    clock: Callable[[], float] = time.monotonic

    def __call__(self, ask: Ask) -> Answered:
        """One question."""
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout_s)
        try:
            return self._ask(connection, ask)
        except TimeoutError:
            return Unanswered(f"no answer within {self.timeout_s:g} s", timed_out=True)
        except (OSError, http.client.HTTPException) as error:
            return Unanswered(str(error) or type(error).__name__)
        finally:
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection, ask: Ask) -> Answer:
        began = self.clock()
        # Not `request`, which gives a PUT a Content-Length that the clients do not send.
        connection.putrequest(
            ask.method, quote(f"{self.prefix}{ask.path}", safe=_SAFE), skip_host=True
        )
        connection.putheader("Host", self._host_header())
        for name, value in (*self.headers, *ask.headers):
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        took = self.clock() - began
        length, cut = response.length, False
        framing: Framing | None = Framing.UNTIL_CLOSE if length is None else Framing.LENGTH
        if response.chunked or response.status in _BODILESS:
            framing = Framing.CHUNKED if response.chunked else None
        try:
            body = response.read(_MOST_BYTES)
        except http.client.IncompleteRead as error:
            body, cut = error.partial, True
        return Answer(
            response.status,
            tuple((name.lower(), value) for name, value in response.getheaders()),
            body,
            first_byte_s=took,
            framing=framing,
            version="1.0" if response.version == _HTTP_1_0 else "1.1",
            # `read` with a limit does not complain of a body that ends too early.
            cut=cut or (length is not None and len(body) < min(length, _MOST_BYTES)),
        )

    def _host_header(self) -> str:
        # A zone is of no concern to the server (RFC 6874 §3).
        bare = self.host.partition("%")[0]
        name = f"[{bare}]" if ":" in bare else bare
        return name if self.port == (443 if self.tls else 80) else f"{name}:{self.port}"


def _ask_daemon(daemon: AdminClient, network: str, address: str, ask: Ask) -> Answered:
    """What the daemon would answer the guest at an address; nothing goes over a network."""
    document = daemon.get(
        "/v1/documents", {"network": network, "address": address, "path": ask.path}
    )
    headers = tuple((name.lower(), value) for name, value in document["headers"])
    return Answer(document["status"], headers, read_bytes_shape(document["body"]))


def parse_url(url: str, headers: Sequence[str] = ()) -> HttpFetch:
    """The server to ask.

    Args:
        url: `http://HOST[:PORT][/PREFIX]`, or https; a bare host is taken for http.
        headers: `NAME: VALUE`, added to every question.

    Raises:
        RequestRefused: It is no such URL, or a header is none.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise RequestRefused(f"{url} is no URL: {error}") from error
    if parts.scheme not in {"http", "https"} or not host or parts.query or parts.fragment:
        raise RequestRefused(
            f"{url} is no URL of a server",
            hint="as http://169.254.169.254, http://[fe80::a9fe:a9fe%25eth0] or http://nova:8775",
        )
    tls = parts.scheme == "https"
    pairs = tuple(_header(one) for one in headers)
    return HttpFetch(
        unquote(host), port or (443 if tls else 80), parts.path.rstrip("/"), tls=tls, headers=pairs
    )


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or not text.isprintable():
        raise RequestRefused(f"{text!r} is no header", hint="as 'X-Instance-ID: 5f0b…'")
    return name.strip(), value.strip()


_DMI: Final = ("sys_vendor", "product_name", "product_serial", "product_uuid", "chassis_asset_tag")
_SOURCES: Final = re.compile(r"^datasource_list:\s*\[(.*)\]", re.MULTILINE)
_QEMU_MAC: Final = re.compile(r"\bmac\"?[=:]\"?((?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2})")
_LOOPBACK: Final = "00:00:00:00:00:00"


def is_metadata_address(host: str) -> bool:
    """Whether a guest asks at this address: elsewhere the machine's own NICs and SMBIOS do not count."""
    try:
        return ip_address(host.partition("%")[0]) in {METADATA_IPV4, METADATA_IPV6}
    except ValueError:
        return False


def look_around(root: Path = Path("/")) -> Surroundings:
    """This machine's NICs, SMBIOS and kernel command line, as far as they may be read.

    Args:
        root: What stands for `/`.
    """
    container = (root / "run/systemd/container").exists()
    first = _text(root / "proc/1/cmdline").replace("\0", " ")
    pairs = [one.partition("=") for one in _text(root / "proc/1/environ").split("\0")]
    shown = root / "sys/class/dmi/id"
    dmi = {name: _text(shown / name).strip() for name in _DMI}
    # `datasource_list: [ OpenStack, None ]`
    listed = _SOURCES.search(_text(root / "run/cloud-init/cloud.cfg"))
    return Surroundings(
        macs=frozenset(_macs(root / "sys/class/net")),
        dmi={name: value for name, value in dmi.items() if value},
        dmi_complete=all(
            os.access(shown / name, os.R_OK) for name in _DMI if (shown / name).exists()
        ),
        sources=None if listed is None else tuple(re.findall(r"\w[\w-]*", listed[1])),
        kernel=first if container else _text(root / "proc/cmdline"),
        environment={name: value for name, _, value in pairs if name},
        container=container,
    )


def machine_macs(known: frozenset[str], root: Path = Path("/")) -> frozenset[str] | None:
    """The MACs of the virtual machine on this host that has one of `known`; `None` where QEMU runs none.

    A NIC that was plugged in later is not on QEMU's command line. It is counted where a tap device has its MAC, with
    the first byte that libvirt gives these, `fe` (`virNetDevTapCreateInBridgePort`).

    Args:
        known: In lower case.
        root: What stands for `/`.
    """
    processes = (one for one in (root / "proc").iterdir() if one.name.isdigit())
    commands = (_text(process / "cmdline") for process in processes)
    machines = (
        {mac.lower() for mac in _QEMU_MAC.findall(command)}
        for command in commands
        if "qemu" in command.partition("\0")[0]
    )
    found = next((macs for macs in machines if macs & known), None)
    if found is None:
        return None
    taps = set(_macs(root / "sys/class/net"))
    return frozenset(found | {mac for mac in known if f"fe{mac[2:]}" in taps})


def _macs(devices: Path) -> list[str]:
    if not devices.is_dir():
        return []
    addresses = [_text(device / "address").strip().lower() for device in devices.iterdir()]
    return [mac for mac in addresses if mac and mac != _LOOPBACK]


def _text(path: Path) -> str:
    """A file's text; nothing where it is not there or not for this account, which is no fault here."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
