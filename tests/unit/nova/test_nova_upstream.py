"""Nova as settings name it, and as HAProxy's counters show it."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from structlog.testing import capture_logs

from imdsproxy.config.nova import NovaSettings, NovaUrl, parse_nova_url
from imdsproxy.errors import ConfigUnreadable, SecretUnreadable
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.rules.model import NovaServer, NovaTls
from imdsproxy.model.entities import InstanceId, IpAddress, NetworkId
from imdsproxy.nova.routing import sign_instance
from imdsproxy.nova.upstream import NovaEndpointReport, NovaUpstream, NovaWatch


class Rig:
    """A Nova upstream, its files, and a host's names; `silent` where these cannot be looked up."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.known: dict[str, tuple[str, ...]] = {}
        self.silent = False
        self.nova = NovaUpstream(directory, self.look_up)

    async def look_up(self, name: str) -> tuple[IpAddress, ...]:
        if self.silent:
            raise OSError("Temporary failure in name resolution")
        return tuple(map(ip_address, self.known.get(name, ())))

    def file(self, name: str, text: str) -> str:
        file = self.directory / name
        file.write_text(text)
        file.chmod(0o600)
        return str(file)

    def settings(self, *urls: str, **fields: object) -> NovaSettings:
        endpoints = [{"url": url} for url in urls or ("http://192.0.2.1",)]
        chosen = {"endpoints": endpoints, "secret_file": self.file("secret", "s3cret\n"), **fields}
        return NovaSettings.model_validate({"endpoint_sets": {"default": chosen}})

    def read(self, *urls: str, **fields: object) -> bool:
        return self.nova.read(self.settings(*urls, **fields))

    def servers(self) -> tuple[NovaServer, ...]:
        return self.nova.backends()[0].servers

    def signatures(self) -> tuple[str, ...]:
        record = self.nova.routing.record(NetworkId("n"), InstanceId("i"), "p")
        assert record is not None
        return record.signatures


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_secret_is_read_without_the_blanks_around_it_and_the_next_is_the_second_slot(
    rig: Rig,
) -> None:
    endpoints = [{"url": "http://192.0.2.1"}, {"url": "http://192.0.2.2", "secret": "next"}]
    following = rig.file("next", " following \n")
    assert rig.read(endpoints=endpoints, next_secret_file=following)
    assert [server.slot for server in rig.servers()] == [0, 1]
    secrets = (b"s3cret", b"following")
    assert rig.signatures() == tuple(sign_instance(one, InstanceId("i")) for one in secrets)


def test_an_empty_secret_is_refused_and_what_was_in_force_stays(rig: Rig) -> None:
    rig.read()
    before = rig.nova.routing
    with pytest.raises(SecretUnreadable, match="empty"):
        rig.read(next_secret_file=rig.file("next", " \n"))
    assert rig.nova.routing == before


def test_only_what_changes_records_says_that_records_change(rig: Rig) -> None:
    assert rig.read()
    assert not rig.read("http://192.0.2.7")
    assert rig.read(projects=["p"])
    settings = rig.settings(projects=["p"])
    rig.file("secret", "another")
    assert rig.nova.read(settings)


async def test_addresses_are_servers_as_they_are_and_each_of_a_name_is_one(rig: Rig) -> None:
    rig.known["nova"] = ("192.0.2.9", "192.0.2.8", "2001:db8::8")
    rig.read("http://nova:80", "http://[2001:db8::1]")
    assert await rig.nova.resolve()
    (backend,) = rig.nova.backends()
    assert (backend.host, backend.tls) == ("nova:80", None)
    assert backend.servers == (
        NovaServer(ip_address("192.0.2.8"), 80),
        NovaServer(ip_address("192.0.2.9"), 80),
        NovaServer(ip_address("2001:db8::8"), 80),
        NovaServer(ip_address("2001:db8::1"), 8775),
    )
    # Another order is no change.
    rig.known["nova"] = ("2001:db8::8", "192.0.2.8", "192.0.2.9")
    assert not await rig.nova.resolve()


async def test_a_name_that_cannot_be_looked_up_keeps_its_addresses(rig: Rig) -> None:
    rig.read("http://nova")
    await rig.nova.resolve()
    assert rig.servers() == ()
    assert "no address" in rig.nova.unresolved[0].reason
    rig.known["nova"] = ("192.0.2.9",)
    assert await rig.nova.resolve()
    rig.silent = True
    assert not await rig.nova.resolve()
    assert rig.servers() == (NovaServer(ip_address("192.0.2.9"), 8775),)
    (problem,) = rig.nova.unresolved
    assert problem.field == "nova.endpoint_sets.default.endpoints[0].url"
    rig.silent, rig.known["nova"] = False, ("192.0.2.10",)
    assert await rig.nova.resolve()
    assert rig.nova.unresolved == ()


def test_certificate_and_key_are_joined_for_haproxy_alone(rig: Rig) -> None:
    cert, key = rig.file("cert", "CERT\n"), rig.file("key", "KEY\n")
    rig.read("https://nova.example", client_cert_file=cert, client_key_file=key)
    tls = rig.nova.backends()[0].tls
    joined = rig.directory / "nova-default.pem"
    assert tls is not None
    assert replace(tls, contents=None) == NovaTls("nova.example", "@system-ca", True, str(joined))
    assert joined.read_bytes() == b"CERT\nKEY\n"
    assert joined.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["ca_file", "client_cert_file"])
def test_a_renewed_certificate_is_another_configuration_and_no_other_record(
    rig: Rig, name: str
) -> None:
    path = str(rig.directory / "certificate")
    with pytest.raises(ConfigUnreadable) as caught:
        rig.read("https://nova.example", **{name: path})
    assert caught.value.problems[0].field == f"nova.endpoint_sets.default.{name}"
    rig.file("certificate", "OLD")
    assert rig.read("https://nova.example", **{name: path})
    before = rig.nova.backends()
    assert not rig.read("https://nova.example", **{name: path})
    assert rig.nova.backends() == before
    rig.file("certificate", "NEW")
    assert not rig.read("https://nova.example", **{name: path})
    assert rig.nova.backends() != before


_ONE = "192.0.2.1:8775"
_TWO = "192.0.2.2:8775"


def _row(
    proxy: str,
    server: str = _ONE,
    status: str = "UP",
    *,
    good: int = 0,
    requests: int = 0,
    failed: int = 0,
    kind: str = "2",
) -> dict[str, str]:
    return {
        "pxname": proxy,
        "svname": server,
        "type": kind,
        "status": status,
        "check_status": "L4CON",
        "last_chk": "Connection refused",
        "stot": str(requests),
        "hrsp_2xx": str(good),
        "econ": str(failed),
        "eresp": "",
    }


@pytest.fixture
def watch() -> NovaWatch:
    return NovaWatch(cast("Haproxy", None), lambda: ["default"])


def _look(
    watch: NovaWatch, rows: Iterable[Mapping[str, str]], *, refused: int = 0, worker: int = 7
) -> list[str]:
    with capture_logs() as logs:
        watch.take(worker, list(rows), {"default": refused})
    return [entry["event"] for entry in logs]


def test_each_endpoint_is_listed_once_with_all_its_backends_added_up(watch: NovaWatch) -> None:
    _look(
        watch,
        [
            _row("documents", "documents-0"),
            _row("documents.checked", "documents-0"),
            _row("documents.sampled", "documents-0"),
            _row("nova.default", "BACKEND", kind="1"),
            _row("nova.default", requests=5),
            _row("nova.default", _TWO, "DOWN", failed=2),
            _row("nova.default.once", requests=3),
            _row("nova.default.checked", requests=4),
            _row("nova.default.once.checked", requests=1),
            _row("nova.default.sampled", requests=2, failed=1),
            _row("nova.default.once", _TWO, "DOWN"),
            _row("nova.default.again", requests=1),
            _row("nova.default", "again-1", requests=1),
            _row("nova.default.hop.192.0.2.1:8775"),
        ],
    )
    assert watch.endpoints == (
        NovaEndpointReport("default", _ONE, True, "", 16, 1),
        NovaEndpointReport("default", _TWO, False, "L4CON Connection refused", 0, 2),
    )
    assert watch.problems() == ()


def test_no_endpoint_that_answers_is_a_problem(watch: NovaWatch) -> None:
    _look(watch, [_row("nova.default", status="DOWN"), _row("nova.default", _TWO, "DOWN 1/2")])
    assert [problem.field for problem in watch.problems()] == [
        "nova.endpoint_sets.default.endpoints"
    ]
    for status in ("UP", "UP 1/2", "no check"):
        _look(watch, [_row("nova.default", status=status)])
        assert watch.endpoints[0].up


def test_a_refused_signature_is_told_once_until_nova_has_answered_well(watch: NovaWatch) -> None:
    refuses = ["nova refuses our signature"]
    steps = [
        (0, 0, []),
        (0, 3, refuses),
        *[(0, 500, [])] * 2,
        (4, 500, ["nova takes our signature again"]),
        (4, 501, refuses),
        # Of two, one that refuses is enough.
        (8, 502, []),
        (12, 502, ["nova takes our signature again"]),
    ]
    for good, refused, events in steps:
        assert _look(watch, [_row("nova.default", good=good)], refused=refused) == events
        fields = [problem.field for problem in watch.problems()]
        wrong = bool(refused) and events != steps[-1][2]
        assert fields == (["nova.endpoint_sets.default.secret_file"] if wrong else [])
    # Counters that begin again with another worker are added up.
    for refused in (1, 2):
        _look(watch, [_row("nova.default")], refused=refused, worker=8)
    assert watch.refused.totals == {"default": 504}


def test_what_nova_refused_before_a_start_is_a_problem_only_if_it_has_answered_nothing_well(
    watch: NovaWatch,
) -> None:
    assert _look(watch, [_row("nova.default", good=4)], refused=3) == []
    assert watch.problems() == ()
    assert watch.refused.totals == {"default": 3}
    assert _look(watch, [_row("nova.default", good=4)], refused=4) == ["nova refuses our signature"]


async def test_only_one_read_of_haproxys_counters_is_under_way() -> None:
    asked: list[int] = []
    answering = asyncio.Event()

    async def read_stat(worker: int, _columns: object) -> list[dict[str, str]]:
        asked.append(worker)
        await answering.wait()
        return []

    async def read_number(_worker: int, _variable: str) -> int:
        return 4

    master = SimpleNamespace(read_stat=read_stat, read_number=read_number)
    watch = NovaWatch(
        cast("Haproxy", SimpleNamespace(worker=7, master=master)), lambda: ["default"]
    )
    assert watch.nova_refused() is None
    async with asyncio.TaskGroup() as reads:
        for _ in range(2):
            reads.create_task(watch.refresh())
        for _ in range(5):
            await asyncio.sleep(0)
        assert asked == [7]
        answering.set()
    assert asked == [7, 7]
    assert watch.nova_refused() == {"default": 4}


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://192.0.2.10", NovaUrl("http", "192.0.2.10", 8775)),
        ("http://192.0.2.10/", NovaUrl("http", "192.0.2.10", 8775)),
        ("https://nova.example.org:443", NovaUrl("https", "nova.example.org", 443)),
        ("http://Nova:1", NovaUrl("http", "nova", 1)),
        ("HTTP://nova-1.", NovaUrl("http", "nova-1.", 8775)),
        ("http://[2001:DB8:0::5]:65535", NovaUrl("http", "2001:db8::5", 65535)),
        ("http://1and1", NovaUrl("http", "1and1", 8775)),
    ],
)
def test_a_url_is_scheme_host_and_port_and_written_as_it_is_read(text: str, url: NovaUrl) -> None:
    assert parse_nova_url(text) == parse_nova_url(str(url)) == url


_NO_NAME = f"http:// http://:80 http://a_b http://-a http://a..b http://a%20b http://{'a' * 64} http://{'a.' * 127}"
_REFUSED = {
    "must begin with": "nova:8775 ftp://nova //nova",
    "user or password": "http://user@nova http://user:pw@nova http://:pw@nova",
    "end after the port": "http://nova/latest http://nova// http://nova? http://nova/?a=b http://nova#",
    "no TCP port": "http://nova:0 http://nova:",
    "is not a URL": "http://nova:65536 http://nova:-1 http://nova:x http://[::1",
    "is not a URL|not an IPv6 address": "http://[nova] http://[192.0.2.1]",
    "must not name a device": "http://[fe80::1%eth0]",
    "neither a name nor an address": _NO_NAME,
    "neither a name nor an address|is not a URL": "http://2001:db8::5",
    "not an IPv4 address": "http://192.0.2 http://192.0.2.256 http://010.0.0.1 http://1234",
    "not ASCII": "http://növa",
    "would come back to imdsproxy": "http://169.254.169.254 http://[fe80::a9fe:a9fe]",
    "not an address to connect to": "http://0.0.0.0 http://[::]",
}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must begin with"),
        *((text, "blanks") for text in ("http://no va", "http://nova\n", "ht\ttp://nova")),
        *((text, why) for why, texts in _REFUSED.items() for text in texts.split()),
    ],
)
def test_what_is_no_place_of_an_api_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_nova_url(text)
