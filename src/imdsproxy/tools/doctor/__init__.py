"""Doctor for metadata servers: sends the requests of known clients and reports the clients that would fail, and why.

`crawl` sends the requests through a fetch function. `checks_documents.examine` checks the answers, whatever their
origin. findings.toml has all possible findings.
"""

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from itertools import islice
from typing import Any, Final

from imdsproxy.model.entities import Dialect
from imdsproxy.model.path_rules import TOKEN_PATH
from imdsproxy.model.tokens import TOKEN_HEADER, TTL_HEADER


class Severity(StrEnum):
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
        clients: Clients that it breaks; known from tests with them.
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
    """Return a finding with the texts of its code. `case`: name in the code's `cases`; its texts replace the code's."""
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
    if where := tuple(paths):
        yield found(code, *where, **values)


@dataclass(frozen=True, slots=True)
class Nic:
    """NIC of the record. `seen`: MACs that have answered for its addresses in its network."""

    network: str
    mac: str
    seen: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Known facts about the guest.

    Attributes:
        macs: MACs of the guest's NICs, in lower case; `None` if unknown.
        dmi: Names below /sys/class/dmi/id and their values; `None` if unknown.
        dmi_complete: Whether all of DMI was readable; only root may read the serial number.
        sources: Data sources that cloud-init's `ds-identify` found on this boot; `None` if it did not run.
        kernel: Kernel command line (in a container, that of process 1).
        verdict: Verdict on the guest's identity, if the daemon was asked (`imdsproxy explain`).
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


CLOUD_INIT_OPENSTACK: Final = (
    "2012-08-10", "2013-04-04", "2013-10-17", "2015-10-15",
    "2016-06-30", "2016-10-06", "2017-02-22", "2018-08-27",
)  # fmt: skip
"""Versions that cloud-init knows (`cloudinit/sources/helpers/openstack.py`), oldest first."""

_OPENSTACK: Final = """
    {version}/meta_data.json {version}/user_data {version}/network_data.json
    latest/meta_data.json latest/user_data latest/network_data.json
    {version}/vendor_data.json {version}/vendor_data2.json
    2013-04-04/meta_data.json 2013-04-04/password 2012-08-10/meta_data.json
"""
_EC2: Final = """
    /2021-03-23/meta-data/instance-id /2018-09-24/meta-data/instance-id /2016-09-02/meta-data/instance-id
    /2009-04-04/meta-data/instance-id /2009-04-04/meta-data/local-hostname /2009-04-04/meta-data/public-keys
    /2009-04-04/user-data {base}/user-data {base}/user-data/ {base}/meta-data {base}//meta-data/instance-id
    {base}/dynamic/instance-identity {base}/meta-data/instance-id/x
"""
"""Paths beside the listed ones: versions of cloud-init and of EC2's look-alikes, and other spellings."""

NOCLOUD_FILES: Final = ("network-config", "meta-data", "user-data", "vendor-data")
"""NoCloud's files, in the order in which cloud-init reads them."""

ODD_LEAF: Final = "/meta-data/instance-id/x"
"""Path below a leaf: Nova answers it with 500."""

_OK: Final = 200
REFUSED: Final = (401, 403)


@dataclass(frozen=True, slots=True)
class Ask:
    """Request without a body."""

    path: str
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer of the server; with status 0 there was none, or the request was not sent.

    Attributes:
        headers: Headers with lower-case names; of several with one name the first.
        first_byte_s: Seconds from the request to the answer's first byte; 0 if not measured.
        until_close: Whether the body ends with the connection: it has no length and is not chunked.
        cut: Whether the body is shorter than its length.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    first_byte_s: float = 0.0
    until_close: bool = False
    version: int = 11
    cut: bool = False
    why: str = ""
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        return self.status == _OK

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    @property
    def json(self) -> object:
        """Body of a 200 parsed as JSON; `None` if it is not JSON, or null."""
        try:
            return json.loads(self.body) if self.ok else None
        except (ValueError, RecursionError):
            return None


TOKEN: Final = Ask(TOKEN_PATH, "PUT", ((TTL_HEADER, "21600"),))
"""Token request of curl and awscrt: a PUT with neither a body nor a length."""

GOOGLE: Final = Ask("/", headers=(("metadata-flavor", "Google"),))
"""Request by which google-auth detects Google's cloud."""

_OTHERS: Final = (
    Ask("/computeMetadata/v1/instance/id", headers=(("metadata-flavor", "Google"),)),
    Ask("/metadata/instance?api-version=2021-02-01", headers=(("metadata", "true"),)),
)
_NONE: Final = Answer()
_MOST: Final = 600
_MOST_CONTENT: Final = 20
_DEEPEST: Final = 8
_PATIENCE: Final = 3


@dataclass(slots=True)
class Crawl:
    """Requests and their answers.

    Attributes:
        direct: Whether requests go over HTTP. If false, the daemon computes the answers, without times, framing, tokens
            and headers.
        base: Root of the EC2 documents, as `/latest`; `None` if there are none.
        version: Version of the OpenStack documents that cloud-init takes; `None` if there are none.
        listed: Leaves and directories as full paths, by the listing that names them.
        token: Header of EC2's requests with a token; empty if they need none.
    """

    fetch: Callable[[Ask], Answer]
    direct: bool
    asked: dict[Ask, Answer] = field(default_factory=dict)
    base: str | None = None
    version: str | None = None
    listed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    given_up: str = ""
    token: tuple[tuple[str, str], ...] = ()

    def answer(self, path: str) -> Answer:
        """Return the answer to a GET without a token, or else to the same GET with a token."""
        plain = self.asked.get(Ask(path))
        return plain or self.asked.get(Ask(path, headers=self.token), _NONE)

    def good(self, path: str) -> Answer:
        """Return the answer for a path if it is 200, else an empty answer."""
        answer = self.answer(path)
        return answer if answer.ok else _NONE

    def where(
        self, fault: Callable[[Answer], bool], paths: Iterable[str] | None = None
    ) -> dict[str, Answer]:
        answers = [(ask.path, answer) for ask, answer in self.asked.items()]
        if paths is not None:
            answers = [(path, self.answer(path)) for path in paths]
        return {path: answer for path, answer in answers if answer.status and fault(answer)}

    def missing(self, paths: Iterable[str]) -> dict[str, str]:
        gone = self.where(lambda one: not one.ok, paths)
        return {path: f"{path} ({answer.status})" for path, answer in gone.items()}

    @property
    def served(self) -> list[Dialect]:
        places = {
            Dialect.EC2: self.base,
            Dialect.OPENSTACK: self.version,
            Dialect.NOCLOUD: self.good("/nocloud/meta-data").status,
        }
        return [one for one in Dialect if places[one]]

    def ask(self, ask: Ask) -> Answer:
        """Send a request, unless it was sent before or the crawl has given up; return its answer."""
        if not self.given_up and ask not in self.asked:
            if len(self.asked) >= _MOST:
                self.given_up = f"more than {_MOST} requests"
                return _NONE
            self.asked[ask] = answer = self.fetch(ask)
            # Give up after a few requests without an answer, instead of waiting for six hundred timeouts.
            last = list(islice(reversed(self.asked.values()), _PATIENCE))
            if len(last) == _PATIENCE and not any(one.status for one in last):
                self.given_up = answer.why
        return _NONE if self.given_up else self.asked[ask]

    def get(self, *paths: str, token: bool = False) -> Answer:
        """Send requests for paths in turn, with a token if EC2's tree needs one; return the last answer."""
        headers = self.token if token else ()
        return [self.ask(Ask(path, headers=headers)) for path in paths][-1]


def crawl(fetch: Callable[[Ask], Answer], *, direct: bool) -> Crawl:
    """Send all requests.

    `direct`: whether to send also the requests that need a server: tokens, headers, other clouds.
    """
    found = Crawl(fetch, direct)
    found.get("/")
    _openstack(found)
    if direct:
        found.ask(TOKEN)
    _ec2(found)
    found.get(*(f"/nocloud/{name}" for name in NOCLOUD_FILES))
    for ask in (GOOGLE, *_OTHERS) if direct else ():
        found.ask(ask)
    return found


def _openstack(found: Crawl) -> None:
    listing = found.get("/openstack")
    if not listing.ok:
        return
    there = listing.text.split()
    found.version = next((one for one in reversed(CLOUD_INIT_OPENSTACK) if one in there), "latest")
    for path in _OPENSTACK.format(version=found.version).split():
        found.get(f"/openstack/{path}")
    document = found.answer(f"/openstack/{found.version}/meta_data.json").json
    files = document.get("files") if isinstance(document, dict) else None
    for entry in files[:_MOST_CONTENT] if isinstance(files, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("content_path"), str):
            found.get(f"/openstack/{entry['content_path'].strip('/')}")


def _ec2(found: Crawl) -> None:
    """Find the tree, with a token if it requires one, and request everything below it."""
    for version in ("latest", "2009-04-04"):
        path = f"/{version}/meta-data/"
        listing, token = found.get(path), found.asked.get(TOKEN, _NONE)
        if listing.status in REFUSED and token.ok:
            found.token = ((TOKEN_HEADER, token.text.strip()),)
            listing = found.get(path, token=True)
        if listing.ok:
            found.base = f"/{version}"
            break
    else:
        return
    _list(found, f"{found.base}/meta-data/", 0)
    found.get(*_EC2.format(base=found.base).split(), token=True)
    zone = f"{found.base}/meta-data/placement/availability-zone"
    if found.answer(zone).status:
        found.get(f"{zone}/", token=True)


def _list(found: Crawl, directory: str, depth: int) -> None:
    """Request a directory and everything below it, as os-collect-config does."""
    listing = found.get(directory, token=True)
    if not listing.ok or depth > _DEEPEST:
        return
    found.listed[directory] = tuple(_children(directory, listing.text))
    for child in found.listed[directory]:
        if not child.endswith("/"):
            found.get(child, token=True)
        # The doctor reads no credentials.
        elif not child.endswith("/iam/"):
            _list(found, child, depth + 1)


def _children(directory: str, listing: str) -> Iterator[str]:
    keys = directory.endswith("/public-keys/")
    for line in listing.splitlines():
        if not line:
            continue
        number, equals, _ = line.partition("=")
        if keys and equals and number.isdecimal():
            yield f"{directory}{number}/"
        elif not (keys and " " in line):
            yield f"{directory}{line}"
