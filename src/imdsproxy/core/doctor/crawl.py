"""What the known clients ask, in their order, as a generator of questions that takes their answers.

Taken from what they did against a logging server: cloud-init's OpenStack, Ec2 and NoCloud sources, cloudbase-init,
os-collect-config (every listed leaf), the AWS SDKs' token, Ohai, Facter, heat-cfntools, and the libraries that look
for other clouds. Every path is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from imdsproxy.core.doctor.exchange import Answer, Answered, Ask, Exchange, Unanswered, json_of
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

_CLOUD_INIT_EC2: Final = ("2021-03-23", "2018-09-24", "2016-09-02")
_OLD_EC2: Final = "2009-04-04"
_LATEST: Final = "latest"

NOCLOUD_FILES: Final = ("network-config", "meta-data", "user-data", "vendor-data")
"""In the order in which cloud-init reads them."""

ODD_LEAF: Final = "/meta-data/instance-id/x"
"""Below a leaf: Nova answers 500 there."""

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
        direct: It was asked over HTTP; else the daemon computed its answer, and there is nothing of
            times, framing, tokens and headers.
        base: What the EC2 documents lie below, as `/latest`; `None` where there are none.
        version: Of the OpenStack documents that cloud-init takes; `None` where there are none.
        listed: Leaves and directories by the listing that names them, as full paths.
        given_up: Why it ended early; empty when it did not.
        token: The header that EC2's questions carry; empty where they need none.
    """

    direct: bool
    exchanges: list[Exchange] = field(default_factory=list)
    base: str | None = None
    version: str | None = None
    listed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    given_up: str = ""
    token: tuple[tuple[str, str], ...] = ()
    _asked: dict[Ask, Answered] = field(default_factory=dict)

    def answer(self, ask: Ask | str) -> Answer | None:
        """The answer to a question; `None` where it was not asked, or not answered."""
        answered = self._asked.get(Ask(ask) if isinstance(ask, str) else ask)
        if answered is None and self.token and isinstance(ask, str):
            answered = self._asked.get(Ask(ask, headers=self.token))
        return answered if isinstance(answered, Answer) else None

    def answers(self) -> Iterator[tuple[Ask, Answer]]:
        """Every answer, in order."""
        for exchange in self.exchanges:
            if exchange.answer is not None:
                yield exchange.ask, exchange.answer

    def serves(self, dialect: Dialect) -> bool:
        """Whether a dialect's documents are there."""
        match dialect:
            case Dialect.OPENSTACK:
                return self.version is not None
            case Dialect.EC2:
                return self.base is not None
            case Dialect.NOCLOUD:
                answer = self.answer("/nocloud/meta-data")
                return answer is not None and answer.ok

    def record(self, ask: Ask, answered: Answered) -> None:
        """Keep an answer."""
        self._asked[ask] = answered
        self.exchanges.append(Exchange(ask, answered))

    def knows(self, ask: Ask) -> bool:
        """Whether it was asked already."""
        return ask in self._asked


Crawling: TypeAlias = Generator[Ask, Answered, Crawl]
_Step: TypeAlias = Generator[Ask, Answered, Answer | None]
_Steps: TypeAlias = Generator[Ask, Answered, None]


def run_crawl(crawling: Crawling, fetch: Callable[[Ask], Answered]) -> Crawl:
    """Drive a crawl to its end."""
    try:
        ask = next(crawling)
        while True:
            ask = crawling.send(fetch(ask))
    except StopIteration as end:
        done: Crawl = end.value
        return done


def crawl(*, direct: bool) -> Crawling:
    """Ask everything.

    Args:
        direct: Also what only a server can be asked: tokens, headers, other clouds.
    """
    found = Crawl(direct)
    yield from _get(found, "/")
    yield from _openstack(found)
    if direct:
        yield from _ask(found, TOKEN)
    yield from _ec2(found)
    yield from _nocloud(found)
    if direct:
        for ask in (GOOGLE, *_OTHERS):
            yield from _ask(found, ask)
    return found


def _ask(found: Crawl, ask: Ask) -> _Step:
    if found.given_up:
        return None
    if not found.knows(ask):
        if len(found.exchanges) >= _MOST:
            found.given_up = f"more than {_MOST} questions"
            return None
        answered = yield ask
        found.record(ask, answered)
        last = found.exchanges[-_PATIENCE:]
        # A server that is not there need not be asked six hundred times.
        if isinstance(answered, Unanswered) and len(last) == _PATIENCE:
            found.given_up = "" if any(one.answer for one in last) else answered.why
    return found.answer(ask)


def _get(found: Crawl, path: str) -> _Step:
    return (yield from _ask(found, Ask(path)))


def _get_ec2(found: Crawl, path: str) -> _Step:
    return (yield from _ask(found, Ask(path, headers=found.token)))


def _openstack(found: Crawl) -> _Steps:
    listing = yield from _get(found, "/openstack")
    if listing is None or not listing.ok:
        return
    there = listing.text.split()
    known = [one for one in reversed(CLOUD_INIT_OPENSTACK) if one in there]
    found.version = known[0] if known else _LATEST
    for version in dict.fromkeys((found.version, _LATEST)):
        for name in ("meta_data.json", "user_data", "network_data.json"):
            yield from _get(found, f"/openstack/{version}/{name}")
    for name in ("vendor_data.json", "vendor_data2.json"):
        yield from _get(found, f"/openstack/{found.version}/{name}")
    for path in ("2013-04-04/meta_data.json", "2013-04-04/password", "2012-08-10/meta_data.json"):
        yield from _get(found, f"/openstack/{path}")
    for path in _contents(found):
        yield from _get(found, path)


def _contents(found: Crawl) -> Iterator[str]:
    document = json_of(found.answer(f"/openstack/{found.version}/meta_data.json"))
    files = document.get("files") if isinstance(document, dict) else None
    for entry in files[:_MOST_CONTENT] if isinstance(files, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("content_path"), str):
            yield f"/openstack/{entry['content_path'].strip('/')}"


def _ec2(found: Crawl) -> _Steps:
    yield from _enter_ec2(found)
    if found.base is None:
        return
    base = f"{found.base}/meta-data/"
    yield from _list(found, base, 0)
    for version in (*_CLOUD_INIT_EC2, _OLD_EC2):
        yield from _get_ec2(found, f"/{version}/meta-data/instance-id")
    for name in ("local-hostname", "public-keys"):
        yield from _get_ec2(found, f"/{_OLD_EC2}/meta-data/{name}")
    yield from _get_ec2(found, f"/{_OLD_EC2}/user-data")
    for path in ("/user-data", "/user-data/", "/meta-data", "//meta-data/instance-id"):
        yield from _get_ec2(found, f"{found.base}{path}")
    yield from _get_ec2(found, f"{found.base}/dynamic/instance-identity")
    yield from _get_ec2(found, f"{found.base}{ODD_LEAF}")
    zone = f"{base}placement/availability-zone"
    if found.answer(zone) is not None:
        yield from _get_ec2(found, f"{zone}/")


def _enter_ec2(found: Crawl) -> _Steps:
    """Find the tree, and whether it takes a token to see it."""
    for version in (_LATEST, _OLD_EC2):
        path = f"/{version}/meta-data/"
        listing = yield from _get(found, path)
        token = found.answer(TOKEN)
        if listing is not None and listing.status in {401, 403} and token is not None and token.ok:
            found.token = ((TOKEN_HEADER, token.text.strip()),)
            listing = yield from _get_ec2(found, path)
        if listing is not None and listing.ok:
            found.base = f"/{version}"
            return


def _list(found: Crawl, directory: str, depth: int) -> _Steps:
    """A directory and everything below it, as os-collect-config reads it."""
    listing = yield from _get_ec2(found, directory)
    if listing is None or not listing.ok or depth > _DEEPEST:
        return
    children = tuple(_children(directory, listing.text))
    found.listed[directory] = children
    for child in children:
        # No credentials are read for a check.
        if child.endswith("/iam/"):
            continue
        if child.endswith("/"):
            yield from _list(found, child, depth + 1)
        else:
            yield from _get_ec2(found, child)


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


def _nocloud(found: Crawl) -> _Steps:
    for name in NOCLOUD_FILES:
        yield from _get(found, f"/nocloud/{name}")
