"""How a host joins a fleet through the genuine HAProxy of a hub, and renews its certificate by itself."""

import contextlib
import json
import os
import pty
import ssl
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.api.client import FleetClient
from imdsproxy.errors import (
    AccessDenied,
    AdminUnavailable,
    AlreadyExists,
    SourceRefused,
    SourceUnavailable,
)
from imdsproxy.fleet.layout import HostId
from imdsproxy.fleet.members import Invitation, read_identity, render_invitation
from imdsproxy.host.certificates import parse_certificate, render_certificate
from imdsproxy.hub.pki.authority import parse_request
from imdsproxy.hub.pki.enrolment import Certified
from imdsproxy.hub.pki.files import (
    FleetFiles,
    HubNames,
    begin_rotation,
    finish_rotation,
    init_fleet,
    switch_rotation,
)
from imdsproxy.sources.fleet.client import HostFiles, HubClient
from imdsproxy.sources.fleet.membership import join, renew_if_due
from support.cli import run_main
from support.fleet_front import (
    Certificates,
    Fronted,
    client_context,
    make_certificates,
    open_front,
)
from support.lab import until
from support.patience import patience
from support.recorder import Answer, Received, reply

pytestmark = pytest.mark.root

_TOKEN = "one-time-token"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronted]:
    with open_front(tmp_path_factory.mktemp("front")) as one:
        yield one


@pytest.fixture
def front(shared: Fronted) -> Fronted:
    """Whose hub certifies any host that has the token, or a certificate."""
    shared.forget()
    shared.api.default = lambda request: _certify(shared, request)
    return shared


def _certify(
    front: Fronted,
    request: Received,
    ahead: timedelta = timedelta(),
    trusted: str | None = None,
) -> Answer:
    if not request.body:
        return reply()
    asked = json.loads(request.body)
    headers = {name.decode().lower(): value.decode() for name, value in request.headers}
    identity = read_identity(headers)
    if identity is None and asked["token"] != _TOKEN:
        problem = {
            "code": "access-denied",
            "message": "the token was used",
            "hint": "make a new one",
        }
        return reply(json.dumps(problem).encode(), status=403)
    name = asked["host"] if identity is None else identity.name
    authority, now = front.certificates.authority, datetime.now(UTC) + ahead
    signed = authority.certify_host(parse_request(asked["request"]), name, now)
    trusted = authority.trusted.decode() if trusted is None else trusted
    answer = Certified(render_certificate(signed).decode(), trusted)
    return reply(json.dumps(asdict(answer)).encode())


@pytest.fixture
def files(tmp_path: Path) -> HostFiles:
    return HostFiles.of(tmp_path / "fleet")


def _invitation(front: Fronted, **changed: Any) -> Invitation:
    urls = (f"https://127.0.0.1:{front.port}",)
    prints = front.certificates.authority.fingerprint
    return replace(Invitation(HostId("host-1"), urls, prints, _TOKEN), **changed)


def test_a_host_that_joins_has_a_key_for_itself_and_a_certificate_that_hubs_accept(
    front: Fronted, files: HostFiles
) -> None:
    dead = "https://127.0.0.1:1"
    invitation = _invitation(front)
    invitation = replace(invitation, urls=(dead, *invitation.urls))
    assert join(invitation, files) == invitation.urls[1]
    assert files.read_hubs() == invitation.urls
    assert oct(files.certificate.stat().st_mode)[-4:] == "0600"
    assert oct(files.certificate.parent.stat().st_mode)[-4:] == "0700"
    assert files.authority.read_bytes() == front.certificates.ca_file.read_bytes()
    held = files.certificate.read_bytes()
    assert held.count(b"PRIVATE KEY") == 2
    sent = front.api.only()
    assert b"PRIVATE" not in sent.raw_body
    with front.connect(context=files.context()) as sock:
        sock.sendall(
            b"GET /fleet/blob/"
            + b"0f" * 32
            + b" HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n"
        )
        sock.recv(1)
    assert front.api.heads[-1].values("x-imdsproxy-name") == (b"host-1",)


def test_the_token_is_sent_to_no_server_whose_ca_or_name_is_another(
    front: Fronted, files: HostFiles
) -> None:
    for changed in (
        {"fingerprint": "0f" * 32},
        {"urls": (f"https://localhost:{front.port}",)},
    ):
        with pytest.raises(SourceRefused) as raised:
            join(_invitation(front, **changed), files)
        assert _TOKEN not in f"{raised.value!r}{raised.value.__cause__!r}"
    assert not front.api.heads
    assert not files.certificate.parent.exists()


def test_a_host_that_is_refused_learns_why_and_keeps_nothing(
    front: Fronted, files: HostFiles
) -> None:
    with pytest.raises(AccessDenied, match="the token was used") as denied:
        join(_invitation(front, token="another"), files)
    assert denied.value.hint == "make a new one"
    with pytest.raises(SourceUnavailable):
        join(_invitation(front, urls=("https://127.0.0.1:1",)), files)
    other = front.certificates.host("other")
    swapped = parse_certificate(other.pem.read_bytes(), "other")
    trusted = front.certificates.authority.trusted.decode()
    answer = Certified(render_certificate(swapped).decode(), trusted)
    front.api.always(reply(json.dumps(asdict(answer)).encode()))
    with pytest.raises(SourceUnavailable, match="another key"):
        join(_invitation(front), files)
    assert not files.certificate.parent.exists()


@pytest.mark.parametrize("given", ["own and fleet's", "fleet's and own", "fleet's"])
def test_a_server_that_gives_the_fleets_ca_and_has_a_certificate_of_another_gets_no_token(
    front: Fronted, files: HostFiles, tmp_path: Path, given: str
) -> None:
    attacker = make_certificates(tmp_path / "attacker")
    cas = {
        "fleet's": front.certificates.ca_file.read_bytes(),
        "own": attacker.ca_file.read_bytes(),
    }
    own = tmp_path / "attackers.crt"
    own.write_bytes(cas["own"])
    attacker.ca_file.write_bytes(b"".join(cas[one] for one in given.split(" and ")))
    with open_front(tmp_path, attacker) as attacked:
        attacked.api.default = lambda request: _certify(attacked, request)
        # Its certificate is good for its address.
        with attacked.connect(context=client_context(own)):
            pass
        urls = (f"https://127.0.0.1:{attacked.port}",)
        with pytest.raises(SourceRefused, match="no certificate of this fleet's CA for that name"):
            join(_invitation(front, urls=urls), files)
        assert not attacked.api.heads
        assert not files.certificate.parent.exists()
        # A hub of the fleet behind it in the list is asked; the host trusts the fleet's CA alone.
        both = (*urls, f"https://127.0.0.1:{front.port}")
        assert join(_invitation(front, urls=both), files) == both[1]
        assert not attacked.api.heads
    assert files.authority.read_bytes() == cas["fleet's"]


@pytest.mark.parametrize("of_another", [True, False])
def test_a_host_takes_no_answer_without_the_ca_that_it_was_invited_by(
    front: Fronted, files: HostFiles, tmp_path: Path, *, of_another: bool
) -> None:
    other = make_certificates(tmp_path / "other").ca_file.read_text()
    trusted = other if of_another else "no certificate"
    front.api.default = lambda request: _certify(front, request, trusted=trusted)
    with pytest.raises(SourceUnavailable, match=r"CA that it does not name|authority"):
        join(_invitation(front), files)
    assert not files.certificate.parent.exists()


def test_a_host_does_not_change_its_fleet_by_itself(
    front: Fronted, files: HostFiles, tmp_path: Path
) -> None:
    join(_invitation(front), files)
    before = files.certificate.read_bytes()
    join(_invitation(front), files)
    again = files.certificate.read_bytes()
    assert again != before
    other = make_certificates(tmp_path / "other").authority.fingerprint
    with pytest.raises(AlreadyExists, match="another fleet"):
        join(_invitation(front, fingerprint=other), files)
    assert files.certificate.read_bytes() == again


async def test_a_certificate_is_renewed_with_a_new_key_once_two_thirds_of_its_life_are_over(
    front: Fronted, files: HostFiles
) -> None:
    join(_invitation(front), files)
    first = files.certificate.read_bytes()
    client, now = HubClient(files, 10), datetime.now(UTC)
    hubs = ("https://127.0.0.1:1", *files.read_hubs())
    assert not await renew_if_due(files, client, hubs, now + timedelta(days=19))
    assert await renew_if_due(files, client, hubs, now + timedelta(days=21))
    second = files.certificate.read_bytes()
    assert second.partition(b"-----END PRIVATE")[0] != first.partition(b"-----END PRIVATE")[0]
    request = front.api.requests[-1]
    assert (request.target, request.values("x-imdsproxy-name")) == (b"/fleet/renew", (b"host-1",))
    assert isinstance(files.context(), ssl.SSLContext)
    front.api.always(reply(b'{"message": "it is revoked"}', status=403))
    with pytest.raises(AccessDenied, match="it is revoked"):
        await renew_if_due(files, client, hubs, now + timedelta(days=21))
    assert files.certificate.read_bytes() == second


@pytest.mark.parametrize("ahead", [timedelta(days=60), timedelta(days=-40)])
async def test_a_host_keeps_its_certificate_where_that_of_a_hub_with_a_wrong_clock_is_not_good_now(
    front: Fronted, files: HostFiles, ahead: timedelta
) -> None:
    join(_invitation(front), files)
    first = files.certificate.read_bytes()
    front.api.default = lambda request: _certify(front, request, ahead)
    client, now = HubClient(files, 10), datetime.now(UTC) + timedelta(days=21)
    with pytest.raises(SourceUnavailable, match="is not valid now by this host's clock"):
        await renew_if_due(files, client, files.read_hubs(), now)
    assert files.certificate.read_bytes() == first


def test_the_command_with_which_a_host_joins_shows_no_secret(
    front: Fronted, tmp_path: Path
) -> None:
    text = render_invitation(_invitation(front))
    config = tmp_path / "imdsproxy.yaml"
    config.write_text(f"paths:\n  state_dir: {tmp_path}/state\n")
    words = ("--config", str(config), "fleet", "join")
    argued = run_main(*words, text)
    assert (argued.status, front.api.heads) == (64, [])
    joined = run_main(*words, stdin=text)
    assert joined.status == 0, joined
    assert "host-1" in joined.out
    cut = run_main(*words, "-", stdin=text[:-8])
    assert cut.status == 64
    printed = "".join(ran.out + ran.err for ran in (argued, joined, cut))
    assert (_TOKEN in printed, text[-40:-8] in printed) == (False, False)


def test_the_command_with_which_a_host_joins_asks_for_the_string_on_a_terminal_and_does_not_show_it(
    front: Fronted, tmp_path: Path
) -> None:
    text = render_invitation(_invitation(front))
    config = tmp_path / "imdsproxy.yaml"
    config.write_text(f"paths:\n  state_dir: {tmp_path}/state\n")
    ours, its = pty.openpty()
    command = (sys.executable, "-m", "imdsproxy", "--config", str(config), "fleet", "join")
    with (
        contextlib.closing(os.fdopen(ours, "r+b", buffering=0)) as terminal,
        subprocess.Popen(command, stdin=its, stdout=its, stderr=its, start_new_session=True) as ran,
    ):
        os.close(its)
        shown = b""
        while b"fleet enrol" not in shown:
            shown += terminal.read(4096)
        # What is typed before is thrown away.
        until(lambda: not termios.tcgetattr(ours)[3] & termios.ECHO, what="no echo")
        terminal.write(text.encode() + b"\n")
        # At its end a terminal gives an error.
        with contextlib.suppress(OSError):
            while chunk := terminal.read(4096):
                shown += chunk
        assert ran.wait(10 * patience()) == 0, shown
    assert (b"host-1" in shown, text[-40:].encode() in shown) == (True, False)


async def test_hosts_follow_a_ca_that_is_replaced_and_none_is_cut_off_by_a_step(
    tmp_path: Path, files: HostFiles
) -> None:
    fleet, now = FleetFiles(tmp_path / "hub"), datetime.now(UTC)
    init_fleet(fleet, None, HubNames("hub-1", ("127.0.0.1",)), now)

    @contextmanager
    def opened() -> Iterator[Fronted]:
        certificates = Certificates(fleet.directory, fleet.load_authority())
        with open_front(tmp_path, certificates) as front:
            front.api.default = lambda request: _certify(front, request)
            yield front

    async def renews(front: Fronted) -> bool:
        hubs = (f"https://127.0.0.1:{front.port}",)
        return await renew_if_due(files, HubClient(files, 10), hubs, now)

    with opened() as front:
        join(_invitation(front), files)
        assert not await renews(front)
    old, invited = fleet.load_authority(), _invitation(front)
    for step in (begin_rotation, switch_rotation):
        step(fleet, now)
        before = files.certificate.read_bytes()
        with opened() as front:
            assert await renews(front)
            assert files.certificate.read_bytes() != before
            assert files.authority.read_bytes() == fleet.ca_certificate.read_bytes()
            assert not await renews(front)
            # A host that joins between two steps trusts both CAs.
            late = HostFiles.of(tmp_path / step.__name__)
            join(_invitation(front), late)
            assert late.authority.read_bytes() == fleet.ca_certificate.read_bytes()
            if step is switch_rotation:
                urls = (f"https://127.0.0.1:{front.port}",)
                with pytest.raises(SourceRefused, match="no certificate of this fleet's CA"):
                    join(replace(invited, urls=urls), HostFiles.of(tmp_path / "refused"))
    stale = files.certificate.with_name("stale.pem")
    stale.write_bytes(before)
    present = parse_certificate(files.certificate.read_bytes(), "the host's")
    new = fleet.load_authority()
    assert (new.has_signed(present), old.has_signed(present)) == (True, False)
    assert new.others == (old.certificate,)
    finish_rotation(fleet)
    with opened() as front:
        assert await renews(front)
        assert files.authority.read_bytes() == render_certificate(new.certificate)
        # What the CA before has signed is good for nothing, and proves nothing.
        request = b"GET /fleet/blob/" + b"0f" * 32 + b" HTTP/1.1\r\nHost: hub\r\n\r\n"
        with front.connect(context=files.context()) as sock:
            sock.sendall(request)
            assert sock.recv(64).startswith(b"HTTP/1.1 200")
        signed_before = replace(files, certificate=stale, key=stale).context()
        with front.connect(context=signed_before) as sock, pytest.raises(ssl.SSLError, match="CA"):
            sock.recv(64)
        files.authority.write_bytes(old.trusted)
        assert not await renews(front)
        assert files.authority.read_bytes() == old.trusted


async def test_a_host_whose_settings_name_a_file_of_cas_leaves_it_as_it_is(
    front: Fronted, files: HostFiles, tmp_path: Path
) -> None:
    join(_invitation(front), files)
    own = tmp_path / "own.crt"
    other = make_certificates(tmp_path / "other").ca_file.read_bytes()
    own.write_bytes(files.authority.read_bytes() + other)
    files = replace(files, authority=own)
    assert not await renew_if_due(files, HubClient(files, 10), files.read_hubs(), datetime.now(UTC))
    assert own.read_bytes().endswith(other)


def test_an_operator_whose_certificate_is_of_another_ca_learns_that_the_hub_refuses_it(
    front: Fronted, tmp_path: Path
) -> None:
    other, pem = make_certificates(tmp_path / "other"), tmp_path / "anna.pem"
    own = other.operator("anna").pem.read_bytes()
    pem.write_bytes(own + front.certificates.ca_file.read_bytes())
    client = FleetClient(pem, waiting=None, urls=(f"https://127.0.0.1:{front.port}",))
    with pytest.raises(AccessDenied, match="refuses the operator's certificate"):
        client.get("/v1/networks")
    # A server whose own certificate is not of the fleet is something else.
    pem.write_bytes(own + other.ca_file.read_bytes())
    with pytest.raises(AdminUnavailable, match="does not prove that it is a hub"):
        client.get("/v1/networks")
