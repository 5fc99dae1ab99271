"""What the doctor asks: as the known clients do, each path once, and not for ever; and what it is answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Final, TypeAlias

from imdsproxy.core.model import Dialect

CLOUD_INIT_OPENSTACK: Final = (
    "2012-08-10",
    "2013-04-04",
    "2013-10-17",
    "2015-10-15",
    "2016-06-30",
    "2016-10-06",
    "2017-02-22",
    "2018-08-27",
)
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


class Framing(StrEnum):
    """How the end of an answer is marked."""

    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until-close"
    """By closing the connection."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request without a body."""

    path: str
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came.

    Attributes:
        headers: With lower-case names, in their order.
        first_byte_s: Seconds from the request to the answer's first byte; `None` where it was not measured.
        framing: `None` where it is not known.
        version: Of HTTP.
        cut: The body is shorter than its length says.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    first_byte_s: float | None = None
    framing: Framing | None = None
    version: str = "1.1"
    cut: bool = False

    @property
    def ok(self) -> bool:
        """Whether it is 200."""
        return self.status == _OK

    @property
    def text(self) -> str:
        """The body as text, whatever it is."""
        return self.body.decode("utf-8", "replace")

    def header(self, name: str) -> str | None:
        """The first header of a lower-case name."""
        return next((value for one, value in self.headers if one == name), None)


@dataclass(frozen=True, slots=True)
class Unanswered:
    """No answer: refused, cut off, or not in time.

    Attributes:
        why: In one line.
        timed_out: The server took the request and did not answer.
    """

    why: str
    timed_out: bool = False


Answered: TypeAlias = Answer | Unanswered


TTL_HEADER: Final = "x-aws-ec2-metadata-token-ttl-seconds"
TOKEN_HEADER: Final = "x-aws-ec2-metadata-token"  # noqa: S105 - a header's name
TOKEN: Final = Ask("/latest/api/token", "PUT", ((TTL_HEADER, "21600"),))
"""As curl and awscrt ask: a PUT with neither a body nor a length."""

GOOGLE: Final = Ask("/", headers=(("metadata-flavor", "Google"),))
"""google-auth's question whether this is Google's cloud."""

_OTHERS: Final = (
    Ask("/computeMetadata/v1/instance/id", headers=(("metadata-flavor", "Google"),)),
    Ask("/metadata/instance?api-version=2021-02-01", headers=(("metadata", "true"),)),
)
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

    fetch: Callable[[Ask], Answered]
    direct: bool
    asked: dict[Ask, Answered] = field(default_factory=dict)
    base: str | None = None
    version: str | None = None
    listed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    given_up: str = ""
    token: tuple[tuple[str, str], ...] = ()

    def answer(self, ask: Ask | str) -> Answer | None:
        """The answer to a question; `None` where it was not asked, or not answered."""
        answered = self.asked.get(Ask(ask) if isinstance(ask, str) else ask)
        if answered is None and self.token and isinstance(ask, str):
            answered = self.asked.get(Ask(ask, headers=self.token))
        return answered if isinstance(answered, Answer) else None

    def good(self, path: str) -> Answer | None:
        """The answer for a path, if it is 200."""
        answer = self.answer(path)
        return answer if answer is not None and answer.ok else None

    def answers(self) -> Iterator[tuple[Ask, Answer]]:
        """Every answer, in order."""
        for ask, answered in self.asked.items():
            if isinstance(answered, Answer):
                yield ask, answered

    def where(
        self, fault: Callable[[Answer], bool], paths: Iterable[str] | None = None
    ) -> dict[str, Answer]:
        """The paths, of these or of all, whose answer has a fault."""
        answers = [(ask.path, answer) for ask, answer in self.answers()]
        if paths is not None:
            answers = [(path, one) for path in paths if (one := self.answer(path)) is not None]
        return {path: answer for path, answer in answers if fault(answer)}

    def serves(self, dialect: Dialect) -> bool:
        """Whether a dialect's documents are there."""
        match dialect:
            case Dialect.OPENSTACK:
                return self.version is not None
            case Dialect.EC2:
                return self.base is not None
            case Dialect.NOCLOUD:
                return self.good("/nocloud/meta-data") is not None

    def ask(self, ask: Ask) -> Answer | None:
        """Ask a question, unless it was asked or the server given up; its answer."""
        if not self.given_up and ask not in self.asked:
            if len(self.asked) >= _MOST:
                self.given_up = f"more than {_MOST} questions"
                return None
            self.asked[ask] = answered = self.fetch(ask)
            # A server that is not there need not be asked six hundred times.
            last = list(islice(reversed(self.asked.values()), _PATIENCE))
            if len(last) == _PATIENCE and not any(isinstance(one, Answer) for one in last):
                self.given_up = answered.why if isinstance(answered, Unanswered) else ""
        return None if self.given_up else self.answer(ask)

    def get(self, *paths: str, token: bool = False) -> Answer | None:
        """Ask for paths one after the other, with a token if EC2's need one; the last one's answer."""
        headers = self.token if token else ()
        answers = [self.ask(Ask(path, headers=headers)) for path in paths]
        return answers[-1] if answers else None


def crawl(fetch: Callable[[Ask], Answered], *, direct: bool) -> Crawl:
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
    if listing is None or not listing.ok:
        return
    there = listing.text.split()
    found.version = next((one for one in reversed(CLOUD_INIT_OPENSTACK) if one in there), "latest")
    for path in _OPENSTACK.format(version=found.version).split():
        found.get(f"/openstack/{path}")
    found.get(*_contents(found))


def _contents(found: Crawl) -> Iterator[str]:
    document = json_of(found.answer(f"/openstack/{found.version}/meta_data.json"))
    files = document.get("files") if isinstance(document, dict) else None
    for entry in files[:_MOST_CONTENT] if isinstance(files, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("content_path"), str):
            yield f"/openstack/{entry['content_path'].strip('/')}"


def _ec2(found: Crawl) -> None:
    """Find the tree, and whether it takes a token to see it; then everything below it."""
    for version in ("latest", "2009-04-04"):
        path = f"/{version}/meta-data/"
        listing = found.get(path)
        token = found.answer(TOKEN)
        if listing is not None and listing.status in {401, 403} and token is not None and token.ok:
            found.token = ((TOKEN_HEADER, token.text.strip()),)
            listing = found.get(path, token=True)
        if listing is not None and listing.ok:
            found.base = f"/{version}"
            break
    else:
        return
    _list(found, f"{found.base}/meta-data/", 0)
    found.get(*_EC2.format(base=found.base).split(), token=True)
    zone = f"{found.base}/meta-data/placement/availability-zone"
    if found.answer(zone) is not None:
        found.get(f"{zone}/", token=True)


def _list(found: Crawl, directory: str, depth: int) -> None:
    """A directory and everything below it, as os-collect-config reads it."""
    listing = found.get(directory, token=True)
    if listing is None or not listing.ok or depth > _DEEPEST:
        return
    found.listed[directory] = tuple(_children(directory, listing.text))
    for child in found.listed[directory]:
        # No credentials are read for a check.
        if child.endswith("/") and not child.endswith("/iam/"):
            _list(found, child, depth + 1)
        elif not child.endswith("/"):
            found.get(child, token=True)


def json_of(answer: Answer | None) -> object:
    """A body read as JSON; `None` where it is none, or null."""
    if answer is None or not answer.ok:
        return None
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError):
        return None


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
