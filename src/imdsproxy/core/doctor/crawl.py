"""What the doctor asks: as the known clients do, each path once, and not for ever; and what it is answered."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from imdsproxy.core.model import Dialect
from imdsproxy.core.path_rules import TOKEN_PATH
from imdsproxy.core.tokens import TOKEN_HEADER, TTL_HEADER

CLOUD_INIT_OPENSTACK: Final = (
    "2012-08-10", "2013-04-04", "2013-10-17", "2015-10-15",
    "2016-06-30", "2016-10-06", "2017-02-22", "2018-08-27",
)  # fmt: skip
"""The versions that cloud-init knows (`cloudinit/sources/helpers/openstack.py`), oldest first."""

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
"""Beside what is listed: cloud-init's versions, those of EC2's look-alikes, and other ways to write a path."""

NOCLOUD_FILES: Final = ("network-config", "meta-data", "user-data", "vendor-data")
"""In the order in which cloud-init reads them."""

ODD_LEAF: Final = "/meta-data/instance-id/x"
"""Below a leaf: Nova answers 500 there."""

_OK: Final = 200
REFUSED: Final = (401, 403)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request without a body."""

    path: str
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came; with the status 0 none did, or the question was not asked.

    Attributes:
        headers: With lower-case names; of several with one name the first.
        first_byte_s: Seconds from the request to the answer's first byte; 0 where it was not measured.
        until_close: Its end is that of the connection: it has no length and is not chunked.
        version: Of HTTP: 10 or 11.
        cut: The body is shorter than its length says.
        why: Why no answer came, in one line.
        timed_out: The server took the request and did not answer.
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
        """Whether it is 200."""
        return self.status == _OK

    @property
    def text(self) -> str:
        """The body as text, whatever it is."""
        return self.body.decode("utf-8", "replace")

    @property
    def json(self) -> object:
        """The body of a 200 read as JSON; `None` where it is none, or null."""
        try:
            return json.loads(self.body) if self.ok else None
        except (ValueError, RecursionError):
            return None


TOKEN: Final = Ask(TOKEN_PATH, "PUT", ((TTL_HEADER, "21600"),))
"""As curl and awscrt ask: a PUT with neither a body nor a length."""

GOOGLE: Final = Ask("/", headers=(("metadata-flavor", "Google"),))
"""google-auth's question whether this is Google's cloud."""

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
    """Every question and its answer.

    Attributes:
        fetch: Asks one question.
        direct: It is asked over HTTP; else the daemon computes its answers, and there is nothing of
            times, framing, tokens and headers.
        asked: Each question once, in order.
        base: What the EC2 documents lie below, as `/latest`; `None` where there are none.
        version: Of the OpenStack documents that cloud-init takes; `None` where there are none.
        listed: Leaves and directories by the listing that names them, as full paths.
        given_up: Why it ended early; empty when it did not.
        token: The header that EC2's questions carry; empty where they need none.
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
        """The answer to a GET, with a token where it was asked with one only."""
        plain = self.asked.get(Ask(path))
        return plain or self.asked.get(Ask(path, headers=self.token), _NONE)

    def good(self, path: str) -> Answer:
        """The answer for a path, if it is 200; else none."""
        answer = self.answer(path)
        return answer if answer.ok else _NONE

    def where(
        self, fault: Callable[[Answer], bool], paths: Iterable[str] | None = None
    ) -> dict[str, Answer]:
        """The paths, of these or of all, whose answer has a fault."""
        answers = [(ask.path, answer) for ask, answer in self.asked.items()]
        if paths is not None:
            answers = [(path, self.answer(path)) for path in paths]
        return {path: answer for path, answer in answers if answer.status and fault(answer)}

    def missing(self, paths: Iterable[str]) -> dict[str, str]:
        """The paths whose answer is not 200, each with its status in brackets."""
        gone = self.where(lambda one: not one.ok, paths)
        return {path: f"{path} ({answer.status})" for path, answer in gone.items()}

    @property
    def served(self) -> list[Dialect]:
        """The dialects whose documents are there."""
        places = {
            Dialect.EC2: self.base,
            Dialect.OPENSTACK: self.version,
            Dialect.NOCLOUD: self.good("/nocloud/meta-data").status,
        }
        return [one for one in Dialect if places[one]]

    def ask(self, ask: Ask) -> Answer:
        """Ask a question, unless it was asked or the server given up; its answer."""
        if not self.given_up and ask not in self.asked:
            if len(self.asked) >= _MOST:
                self.given_up = f"more than {_MOST} questions"
                return _NONE
            self.asked[ask] = answer = self.fetch(ask)
            # A server that is not there need not be asked six hundred times.
            last = list(islice(reversed(self.asked.values()), _PATIENCE))
            if len(last) == _PATIENCE and not any(one.status for one in last):
                self.given_up = answer.why
        return _NONE if self.given_up else self.asked[ask]

    def get(self, *paths: str, token: bool = False) -> Answer:
        """Ask for paths one after the other, with a token if EC2's need one; the last one's answer."""
        headers = self.token if token else ()
        return [self.ask(Ask(path, headers=headers)) for path in paths][-1]


def crawl(fetch: Callable[[Ask], Answer], *, direct: bool) -> Crawl:
    """Ask everything.

    Args:
        fetch: Asks one question.
        direct: Also what only a server can be asked: tokens, headers, other clouds.
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
    """Find the tree, and whether it takes a token to see it; then everything below it."""
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
    """A directory and everything below it, as os-collect-config reads it."""
    listing = found.get(directory, token=True)
    if not listing.ok or depth > _DEEPEST:
        return
    found.listed[directory] = tuple(_children(directory, listing.text))
    for child in found.listed[directory]:
        if not child.endswith("/"):
            found.get(child, token=True)
        # No credentials are read for a check.
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
