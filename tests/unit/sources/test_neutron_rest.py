"""Neutron's client against servers that answer badly, late, or not at all; and with Keystone in front."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.errors import LibraryMissing, SourceUnavailable
from imdsproxy.sources.neutron.client import NeutronClient, QueryTimedOut
from imdsproxy.sources.neutron.ports import PortQuery
from support.patience import patience

# openstacksdk warns of a setting that is not set (its defaults for InfluxDB are not empty).
pytestmark = pytest.mark.filterwarnings("ignore:Support for InfluxDB:PendingDeprecationWarning")

_TIMEOUT_S: Final = 0.7
_PORT: Final = {
    "id": "p",
    "network_id": "n",
    "mac_address": "FA:16:3E:00:00:05",
    "fixed_ips": [{"subnet_id": "s", "ip_address": "10.0.0.5"}],
    "device_id": "i",
    "device_owner": "compute:nova",
    "project_id": "b",
}

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[str]:
    """A server on loopback; its URL."""
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await serve(reader, writer)
        writer.close()
        tasks.discard(task)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def client_of(
    endpoint: str | None, clouds: Path | None = None, *, timeout_s: float = 60
) -> AsyncIterator[NeutronClient]:
    """Of Neutron there, or by the clouds file's `here`."""
    place = {"endpoint": endpoint} if clouds is None else {"cloud": "here", "clouds_file": clouds}
    client = NeutronClient(NeutronSourceSettings.model_validate({**place, "timeout_s": timeout_s}))
    try:
        yield client
    finally:
        await client.close()
        async with asyncio.timeout(30):
            while any(each.name.startswith("imdsproxy-neutron") for each in threading.enumerate()):
                await asyncio.sleep(0.01)


def answer(body: bytes, status: str = "200 OK", *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + body


def always(data: bytes, *, times: int = 1_000, heads: list[str] | None = None) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            for _ in range(times):
                head = await reader.readuntil(b"\r\n\r\n")
                if heads is not None:
                    heads.append(head.decode())
                writer.write(data)
                await writer.drain()

    return serve


def once(data: bytes) -> Serve:
    return always(data, times=1)


_GOOD: Final = answer(json.dumps({"ports": [_PORT]}).encode())


@pytest.mark.parametrize("place", ["", "/", "/v2.0", "/v2.0/", "/networking", "/networking/v2.0"])
async def test_neutron_is_asked_below_its_endpoint_over_connections_that_are_kept(
    place: str,
) -> None:
    heads: list[str] = []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await always(_GOOD, heads=heads)(reader, writer)

    async with serving(serve) as url, client_of(url + place) as client:
        for _ in range(3):
            (port,) = await client.ports(PortQuery(limit=1))
            assert port.mac == "fa:16:3e:00:00:05"
    assert connections == 1
    prefix = "/networking" if "networking" in place else ""
    assert {head.partition("?")[0] for head in heads} == {f"GET {prefix}/v2.0/ports"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (answer(b"<html>"), "understood"),
        (answer(b"[" * 200_000), "understood"),
        (answer(b'{"networks": []}'), "no list of ports"),
        (answer(b'{"ports": [7]}'), "no object"),
        (answer(b'{"ports": [{}]}'), "no id"),
        (answer(b'{"ports": [{"id": 7}]}'), "id is no text"),
        (answer(b'{"ports": [{"id": "p", "fixed_ips": [{"ip_address": "x"}]}]}'), "'x'"),
        (answer(b'{"ports": [{"id": "p", "fixed_ips": ["x"]}]}'), "no ip_address"),
        (answer(b"\xff\xfe"), "understood"),
        (answer(b'{"ports": []}', length=100), ""),
        (answer(b"no", "401 Unauthorized"), "401"),
        (answer(b"", "204 No Content"), "204"),
        (answer(b"\x1b[2J\x07", "500 Internal Server Error"), r"500: \x1b[2J\x07"),
        (b"SSH-2.0-OpenSSH\r\n", ""),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", ""),
    ],
)
async def test_what_is_no_good_answer_is_a_failure_in_words(data: bytes, words: str) -> None:
    async with serving(once(data)) as url, client_of(url) as client:
        with pytest.raises(SourceUnavailable) as caught:
            await client.ports(PortQuery(limit=1))
        assert words in caught.value.message
        assert caught.value.hint
        assert len(caught.value.message) < 400
        assert not isinstance(caught.value, QueryTimedOut)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect"])
async def test_no_token_goes_where_a_redirection_leads(status: str) -> None:
    asked = asyncio.Event()

    async def elsewhere(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await once(_GOOD)(reader, writer)

    async with serving(elsewhere) as other:
        data = f"HTTP/1.1 {status}\r\nLocation: {other}/v2.0/ports\r\nContent-Length: 0\r\n\r\n"
        async with serving(always(data.encode())) as url, client_of(url) as client:
            with pytest.raises(SourceUnavailable, match=f"{status[:3]}: go to {other}") as caught:
                await client.ports(PortQuery(limit=1))
    assert "no token is sent" in str(caught.value.hint)
    assert not asked.is_set()


async def test_the_same_failure_has_the_same_message_whatever_was_asked() -> None:
    async with serving(once(_GOOD)) as url:
        pass
    async with client_of(url) as client:
        for number in range(2):
            with pytest.raises(SourceUnavailable) as caught:
                await client.ports(PortQuery(ids=(f"p-{number}",)))
            assert caught.value.message == f"Neutron cannot be asked: {url}: Connection refused"


async def _silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read(-1)


async def _slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(answer(b"", length=1_000_000))
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("serve", [_silent, _slow])
async def test_an_answer_that_does_not_come_in_time_is_given_up(serve: Serve) -> None:
    async with serving(serve) as url, client_of(url, timeout_s=_TIMEOUT_S) as client:
        began = time.monotonic()
        with pytest.raises(QueryTimedOut) as caught:
            await client.ports(PortQuery(limit=1))
        assert caught.value.code == "source-unavailable"
        assert time.monotonic() - began < _TIMEOUT_S + 1 * patience()
        # `client_of` has seen to it that its threads end as well.


async def test_an_endless_answer_is_cut_off() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(b"", length=10**12))
        while True:
            writer.write(b" " * 1_000_000)
            await writer.drain()

    async with serving(serve) as url, client_of(url, timeout_s=20) as client:
        with pytest.raises(SourceUnavailable, match="longer than 32 MiB"):
            await client.ports(PortQuery(limit=1))


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import imdsproxy.sources.neutron.source", "openstack keystoneauth1 requests urllib3"),
        (
            "import imdsproxy.sources.neutron.client as c; c._connect(c.NEUTRON, c.Place(None, c.Path(), None, 5))",
            "openstack cryptography",
        ),
    ],
    ids=["before the first query", "without Keystone"],
)
async def test_libraries_are_imported_when_they_are_needed(code: str, modules: str) -> None:
    code = f"{code}; import sys; print(sys.modules.keys() & set({modules.split()!r}))"
    done = await asyncio.to_thread(subprocess.check_output, [sys.executable, "-c", code])
    assert done.strip() == b"set()"


@pytest.mark.parametrize("missing", ["keystoneauth1.adapter", "openstack.config"])
async def test_without_its_library_a_query_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    async with client_of(None, tmp_path / "clouds.yaml") as client:
        with pytest.raises(LibraryMissing) as caught:
            await client.ports(PortQuery())
    assert (caught.value.code, caught.value.http_status) == ("library-missing", 503)
    assert "apt install python3-openstacksdk" in caught.value.hint


# Keystone


@dataclass
class Keystone:
    """A Keystone and a Neutron behind one server; the last token is good while `valid`."""

    url: str = ""
    has_neutron: bool = True
    lifetime_s: float = 3600
    password: str = "right"
    tokens: int = 0
    valid: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(0 if length is None else int(length[1]))
                writer.write(self._answer(head, body))
                await writer.drain()

    def _answer(self, head: str, body: bytes) -> bytes:
        if head.startswith("POST /v3/auth/tokens "):
            return self._token(json.loads(body)["auth"]["identity"]["password"]["user"])
        good = self.valid and f"X-Auth-Token: token-{self.tokens}\r\n" in head
        return _GOOD if good else answer(b"{}", "401 Unauthorized")

    def _token(self, user: dict[str, str]) -> bytes:
        if user["password"] != self.password:
            return answer(b'{"error": {"message": "no", "code": 401}}', "401 Unauthorized")
        self.tokens, self.valid = self.tokens + 1, True
        ends = datetime.now(UTC) + timedelta(seconds=self.lifetime_s)
        endpoint = {"interface": "public", "region": "one", "region_id": "one", "url": self.url}
        catalogue = [{"type": "network", "name": "neutron", "endpoints": [endpoint]}]
        token = {
            "methods": ["password"],
            "expires_at": f"{ends:%Y-%m-%dT%H:%M:%S}Z",
            "catalog": catalogue if self.has_neutron else [],
        }
        made = answer(json.dumps({"token": token}).encode(), "201 Created")
        return made.replace(b"\r\n", f"\r\nX-Subject-Token: token-{self.tokens}\r\n".encode(), 1)


@contextlib.asynccontextmanager
async def keystone(
    tmp_path: Path, **options: object
) -> AsyncIterator[tuple[Keystone, NeutronClient]]:
    made = Keystone(**options)  # type: ignore[arg-type]
    async with serving(made.serve) as url:
        made.url = url
        clouds = tmp_path / "clouds.yaml"
        auth = {
            "auth_url": f"{url}/v3",
            "username": "imds",
            "project_name": "service",
            "user_domain_name": "Default",
            "project_domain_name": "Default",
        }
        cloud = {"auth_type": "v3password", "auth": auth, "region_name": "one"}
        secure = {"auth": {"password": "right"}}
        for path, here in (clouds, cloud), (clouds.with_name("secure.yaml"), secure):
            await asyncio.to_thread(path.write_text, json.dumps({"clouds": {"here": here}}))
        async with client_of(None, clouds) as client:
            yield made, client


async def test_a_token_that_is_refused_or_about_to_end_is_fetched_again(tmp_path: Path) -> None:
    async with keystone(tmp_path) as (one, client):
        for _ in range(3):
            assert len(await client.ports(PortQuery(limit=1))) == 1
        assert one.tokens == 1
        one.valid, one.lifetime_s = False, 10
        for _ in range(2):
            assert len(await client.ports(PortQuery(limit=1))) == 1
        assert one.tokens >= 3


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        ({"password": "another"}, "401", "password"),
        ({"has_neutron": False}, "catalogue has no Neutron", ""),
    ],
)
async def test_a_wrong_password_and_a_catalogue_without_neutron_are_reported_without_the_password(
    tmp_path: Path, options: dict[str, object], words: str, hint: str
) -> None:
    async with keystone(tmp_path, **options) as (_, client):
        with pytest.raises(SourceUnavailable, match=words) as caught:
            await client.ports(PortQuery(limit=1))
        assert hint in caught.value.hint
        assert "right" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "clouds: {}", "clouds: [", "clouds: {here: {auth: 7}}"])
async def test_a_clouds_file_that_cannot_be_used_is_reported(
    tmp_path: Path, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere" / "clouds.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(
        "clouds: {here: {auth_type: none, network_endpoint_override: 'http://127.0.0.1:9'}}"
    )
    monkeypatch.chdir(elsewhere.parent)
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(elsewhere))
    clouds = tmp_path / "clouds.yaml"
    if text is not None:
        clouds.write_text(text)
    async with client_of(None, clouds) as client:
        with pytest.raises(SourceUnavailable) as caught:
            await client.ports(PortQuery(limit=1))
        assert str(clouds) in caught.value.message
        assert "sources.neutron.cloud" in caught.value.hint
