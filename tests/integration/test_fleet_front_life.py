"""HAProxy in front of a hub: its start, its end, and a certificate that is renewed under open streams."""

import asyncio
import contextlib
import signal
import socket
import ssl
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from imdsproxy.config.hub import HubSettings
from imdsproxy.errors import ConfigRejected, HostRefused, RuntimeUnavailable
from imdsproxy.host.process import find_processes
from imdsproxy.hub import front as module
from imdsproxy.hub.front import Front, FrontSpec
from imdsproxy.hub.hub import renew_certificate
from imdsproxy.hub.pki.authority import HUB_LIFE
from imdsproxy.hub.pki.files import FleetFiles, HubNames, init_fleet
from support.fleet_front import Certificates, client_context, expired_at, make_certificates
from support.lab import until
from support.patience import patience

pytestmark = pytest.mark.root

_HUB = """
import asyncio, sys
from pathlib import Path
from imdsproxy.hub.front import Front, FrontSpec

async def main(port, directory):
    directory = Path(directory)
    spec = FrontSpec((f"127.0.0.1:{port}",), directory / "hub.pem", directory / "ca.crt",
                     directory / "s.sock", directory / "a.sock", directory / "c.sock", maxconn=50)
    await Front("haproxy", spec, directory / "front.cfg").start()
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


def _free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("fleet") / "certificates")


@pytest.fixture
def spec(certificates: Certificates, tmp_path: Path) -> FrontSpec:
    return FrontSpec(
        listen=(f"127.0.0.1:{_free_port()}",),
        certificate=certificates.hub().pem,
        authority=certificates.ca_file,
        stream_socket=tmp_path / "stream.sock",
        api_socket=tmp_path / "api.sock",
        control=tmp_path / "control.sock",
        maxconn=50,
    )


async def _shown(spec: FrontSpec, ca_file: Path) -> int:
    """The number of the certificate that a new connection is shown."""
    port = int(spec.listen[0].rpartition(":")[2])
    context = client_context(ca_file)
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    found = writer.get_extra_info("peercert")
    writer.transport.abort()
    return int(found["serialNumber"], 16)


async def test_a_renewed_certificate_is_shown_to_new_connections_and_no_stream_ends(
    certificates: Certificates, spec: FrontSpec, tmp_path: Path
) -> None:
    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: imdsproxy-fleet\r\n\r\n"
        )
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    host = certificates.host("host-1")
    server = await asyncio.start_unix_server(stream, spec.stream_socket)
    front = Front("haproxy", spec, tmp_path / "front.cfg")
    await front.start()
    try:
        port = int(spec.listen[0].rpartition(":")[2])
        context = client_context(certificates.ca_file, host)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.write(
            b"GET /fleet/stream HTTP/1.1\r\nHost: hub\r\nConnection: upgrade\r\nUpgrade: imdsproxy-fleet\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        before = await _shown(spec, certificates.ca_file)
        renewed = certificates.hub()
        await front.replace_certificate(renewed.pem.read_bytes())
        after = await _shown(spec, certificates.ca_file)
        assert (f"{before:X}" != renewed.serial, f"{after:X}".lstrip("0")) == (
            True,
            renewed.serial.lstrip("0"),
        )
        writer.write(b"still here\n")
        assert await reader.readline() == b"still here\n"
        with pytest.raises(ConfigRejected):
            await front.replace_certificate(b"-----BEGIN CERTIFICATE-----\nno\n")
        assert await _shown(spec, certificates.ca_file) == after
        writer.transport.abort()
    finally:
        await front.stop()
        server.close()
        await server.wait_closed()


async def test_a_hubs_certificate_that_haproxy_did_not_take_is_renewed_again(
    spec: FrontSpec, tmp_path: Path
) -> None:
    files, now = FleetFiles(tmp_path / "hub"), datetime.now(UTC)
    long_ago = now - HUB_LIFE * 3 / 4
    init_fleet(files, None, HubNames("hub-1", ("127.0.0.1",)), long_ago)
    authority, before = files.load_authority(), files.hub.read_bytes()
    spec = replace(spec, certificate=files.hub, authority=files.ca_certificate)
    front = Front("haproxy", spec, tmp_path / "front.cfg")
    with pytest.raises(RuntimeUnavailable):
        await renew_certificate(files, authority, front, now)
    assert files.hub.read_bytes() == before
    await front.start()
    try:
        assert await renew_certificate(files, authority, front, now)
        assert await _shown(spec, files.ca_certificate) == files.load_hub().serial_number
        assert files.hub.read_bytes() != before
        assert not await renew_certificate(files, authority, front, now)
    finally:
        await front.stop()


async def test_a_front_takes_connections_by_ipv4_and_by_ipv6_on_all_addresses(
    spec: FrontSpec, tmp_path: Path
) -> None:
    port = spec.listen[0].rpartition(":")[2]
    everywhere = tuple(f"{one.rpartition(':')[0]}:{port}" for one in HubSettings().listen)
    front = Front("haproxy", replace(spec, listen=everywhere), tmp_path / "front.cfg")
    await front.start()
    try:
        for address in ("127.0.0.1", "::1"):
            _, writer = await asyncio.open_connection(address, int(port))
            writer.transport.abort()
    finally:
        await front.stop()


async def test_a_front_that_cannot_start_says_why(spec: FrontSpec, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    front = Front("haproxy", replace(spec, certificate=broken), tmp_path / "broken.cfg")
    with pytest.raises(ConfigRejected, match=r"broken\.pem"):
        await front.start()
    one = Front("haproxy", spec, tmp_path / "front.cfg")
    await one.start()
    try:
        other = Front(
            "haproxy", replace(spec, control=tmp_path / "other.sock"), tmp_path / "other.cfg"
        )
        with capture_logs() as logs, pytest.raises(HostRefused, match="in use") as raised:
            await other.start()
        assert (raised.value.exit_status, "hub.listen" in raised.value.hint) == (71, True)
        elsewhere = Front("haproxy", replace(spec, listen=("192.0.2.77:8469",)), tmp_path / "e.cfg")
        with pytest.raises(HostRefused, match="Cannot assign"):
            await elsewhere.start()
        assert [one["log_level"] for one in logs if "in use" in one["haproxy"]] == ["error"]
    finally:
        await one.stop()


async def test_the_log_says_why_a_client_was_refused_and_nothing_of_its_query(
    certificates: Certificates, spec: FrontSpec, tmp_path: Path
) -> None:
    front = Front("haproxy", spec, tmp_path / "front.cfg")
    port = int(spec.listen[0].rpartition(":")[2])
    with capture_logs() as logs:
        await front.start()
        try:
            late = client_context(certificates.ca_file, certificates.host("late", at=expired_at()))
            # In TLS 1.3 a client learns at its first read that its certificate is not accepted.
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=late)
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                await reader.read(1)
            writer.transport.abort()
            stranger = client_context(certificates.ca_file)
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=stranger)
            writer.write(b"GET /v1/x?secret HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n")
            await reader.read()
            writer.transport.abort()
            async with asyncio.timeout(10 * patience()):
                while not (" 401 " in str(logs) and "verify 10" in str(logs)):
                    await asyncio.sleep(0.02)
        finally:
            await front.stop()
    assert "secret" not in str(logs)


async def test_of_many_connections_that_fail_some_are_logged(
    spec: FrontSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGGED", 3)
    front = Front("haproxy", spec, tmp_path / "front.cfg")
    port = int(spec.listen[0].rpartition(":")[2])
    with capture_logs() as logs:
        await front.start()
        try:
            for _ in range(10):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
                await reader.read()
                writer.close()
        finally:
            await front.stop()
    assert len([one for one in logs if "handshake" in str(one.get("haproxy"))]) == 3


async def test_the_end_of_a_front_is_noticed_with_its_reason(
    spec: FrontSpec, tmp_path: Path
) -> None:
    front = Front("haproxy", spec, tmp_path / "front.cfg")
    await front.start()
    ending = asyncio.create_task(front.wait())
    (child,) = find_processes("haproxy", {str(tmp_path / "front.cfg")})
    child.kill(signal.SIGKILL)
    async with asyncio.timeout(10 * patience()):
        assert "137" in await ending
    child.close()
    await front.stop()


def test_a_front_ends_with_its_hub_that_is_killed(
    certificates: Certificates, tmp_path: Path
) -> None:
    (tmp_path / "hub.pem").write_bytes(certificates.hub().pem.read_bytes())
    (tmp_path / "ca.crt").write_bytes(certificates.ca_file.read_bytes())
    command = [sys.executable, "-c", _HUB, str(_free_port()), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as hub:
        assert hub.stdout is not None
        assert hub.stdout.readline() == b"up\n"
        (child,) = find_processes("haproxy", {str(tmp_path / "front.cfg")})
        hub.kill()
    until(lambda: not child.alive(), what="HAProxy's end")
    child.close()
