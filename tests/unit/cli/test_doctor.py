"""`imdsproxy doctor`: against servers on loopback, and through the admin API."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import pytest

from imdsproxy.cli.doctor import (
    HttpFetch,
    is_metadata_address,
    look_around,
    machine_macs,
    parse_url,
)
from imdsproxy.cli.main import main
from imdsproxy.tools.doctor import TOKEN, Answer, Ask
from support.cli import Cli
from support.metadata_server import GOOD, MetadataServer, Reply, metadata_server


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with metadata_server() as running:
        yield running


@pytest.fixture
def documented(filled: Cli) -> Cli:
    """`web-1` is answered good documents."""
    for path, reply in GOOD.items():
        for spelling in (path, f"{path}/"):
            filled.server.answer(spelling, reply.body)
    identity = GOOD["/latest/meta-data/instance-id"].body
    filled.server.answer("/latest//meta-data/instance-id", identity)
    return filled


_KEYS = "/latest/meta-data/public-keys"


@pytest.mark.parametrize(
    ("changes", "token", "status", "shown"),
    [
        ({}, 404, 0, ["documents served: ec2, openstack, nocloud", "\nnothing found\n"]),
        # Warnings alone are no failure.
        ({"/": b"latest"}, 404, 0, ["warning root-versions\n", "\n1 warning\n"]),
        ({"/": b"latest"}, 403, 1, ["error token-refused\n", "   breaks  cloud-init on a guest that looks like Amazon",
                                    "\n1 error, 1 warning\n"]),
        # Only some paths of many are shown.
        ({"/latest/meta-data": b"a\nb\nc\nd\ne"}, 404, 1, ["meta-data/c (404)\n", "and 2 more"]),
        # A server cannot colour the terminal.
        ({_KEYS: b"0=a=\x1b[31m[red]b"}, 404, 1, ["a=\\x1b[31m[red]b"]),
    ],
)  # fmt: skip
def test_people_see_what_is_found_and_the_exit_status_is_that_of_errors(
    server: MetadataServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, bytes],
    token: int,
    *,
    status: int,
    shown: list[str],
) -> None:
    # A busy machine is slow.
    monkeypatch.setattr("imdsproxy.tools.doctor.checks_http._FINE_S", 60.0)
    server.token = Reply(status=token)
    server.replies |= {path: Reply(body) for path, body in changes.items()}
    assert main(["doctor", server.url]) == status
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for text in shown:
        assert text in out


def test_what_a_server_sends_that_cannot_be_sent_on_is_a_finding(
    server: MetadataServer, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    half = "\ud800"
    links = {"links": [], "networks": [{"link": half}]}
    files = {"uuid": "1", "hostname": "h", "random_seed": half, "files": [{"content_path": half}]}
    for name, document in (("network_data", links), ("meta_data", files)):
        body = json.dumps(document).encode()
        server.replies[f"/openstack/2018-08-27/{name}.json"] = Reply(body)
    server.replies["/latest/meta-data"] = Reply(status=401)
    server.token = Reply(b"a\nb", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    assert main(["--json", "doctor", server.url]) == 1
    reported = json.loads(capfdbinary.readouterr().out)
    assert reported["subject"] == server.url
    found = {one["code"]: one for one in reported["findings"]}
    keys = {"code", "severity", "what", "change", "clients", "paths"}
    assert all(set(one) == keys for one in found.values())
    assert f"the link {half}," in found["link-missing"]["what"]
    assert found["no-answer"]["paths"][:2] == [f"/openstack/{half}", "/latest/meta-data/"]
    assert found.keys() >= {"random-seed", "token-form"}


def test_a_guest_is_asked_about_through_the_daemon(
    documented: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = ("--network", "blue", "--from", "10.0.0.5")
    ran = documented("doctor", *guest)
    assert ran.status == 0
    assert "10.0.0.5 in network blue (web-1)" in ran.out
    assert "not checked: times, session tokens" in ran.out
    assert "`imdsproxy snippet web-1 --for qemu|libvirt|proxmox|incus`" in ran.out

    unknown = documented("doctor", "--network", "blue", "--from", "10.0.0.66")
    assert (unknown.status, "error nothing-served" in unknown.out) == (1, True)

    documented.server.answer("/latest/meta-data/hostname", b"x\n")
    ran = documented("doctor", *guest, "--json")
    assert ran.status == 1
    assert [one["code"] for one in ran.json["findings"]] == ["leaf-newline", "smbios-unknown"]
    # The nics of its machine are on QEMU's command line on this host.
    macs = frozenset({"52:54:00:ff:ff:ff"})
    monkeypatch.setattr("imdsproxy.cli.doctor.machine_macs", lambda _: macs)
    codes = {one["code"] for one in documented("doctor", *guest, "--json").json["findings"]}
    assert codes == {"mac-mismatch", "leaf-newline", "smbios-unknown"}


_NEITHER = "either a URL or both --network and --from"
_NO_URL = "is not the URL of a server hint: use a URL as http://169.254.169.254"
_GUEST = ("--network", "blue", "--from", "10.0.0.5")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), _NEITHER),
        (("--network", "blue"), _NEITHER),
        (("http://x", *_GUEST), _NEITHER),
        ((*_GUEST, "--header", "A: b"), _NEITHER),
        (("ftp://x",), _NO_URL),
        (("http://x?y",), _NO_URL),
        (("http://[::1",), "is not a URL"),
        (("http://x:99999",), "is not a URL"),
        (("http://127.0.0.1", "--header", "no colon"), "is not a header"),
    ],
)
def test_what_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str
) -> None:
    assert main(["doctor", *arguments]) == 64
    assert text in " ".join(capsys.readouterr().err.split())


def test_a_server_that_is_not_there_is_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    assert main(["doctor", f"127.0.0.1:{port}"]) == 1
    assert "error unreachable" in capsys.readouterr().out


def test_a_question_goes_out_with_headers_prefix_and_escapes_and_a_put_has_no_length(
    server: MetadataServer,
) -> None:
    fetch = parse_url(f"{server.url}/nova/", ["X-Instance-ID: 1", "X-Tenant-ID:2"])
    fetch(Ask("/latest/meta-data/tags/instance/my key"))
    fetch(TOKEN)
    (get, path, headers), (put, _, sent) = server.asked
    assert (get, path, put) == ("GET", "/nova/latest/meta-data/tags/instance/my%20key", "PUT")
    assert (headers["x-instance-id"], headers["x-tenant-id"]) == ("1", "2")
    assert not {"content-length", "transfer-encoding"} & set(sent)


@pytest.mark.parametrize(
    ("url", "host", "is_guest"),
    [
        ("169.254.169.254", "169.254.169.254", True),
        ("http://[fe80::a9fe:a9fe%25eth0]", "fe80::a9fe:a9fe%eth0", True),
        ("https://nova:8775/", "nova", False),
        ("127.0.0.1", "127.0.0.1", False),
    ],
)
def test_a_url_says_who_is_asked_and_only_at_the_metadata_address_is_this_machine_the_guest(
    url: str, host: str, *, is_guest: bool
) -> None:
    assert (parse_url(url).host, is_metadata_address(host)) == (host, is_guest)


_ONE_1 = b"HTTP/1.1 200 OK\r\n"


def _url(port: int) -> SplitResult:
    return urlsplit(f"http://127.0.0.1:{port}")


def _serve_once(answer: bytes) -> int:
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            connection.recv(65_536)
            connection.sendall(answer)

    threading.Thread(target=run).start()
    return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("raw", "until_close", "version", "cut", "body"),
    [
        (_ONE_1 + b"Content-Length: 2\r\n\r\nab", False, 11, False, b"ab"),
        (_ONE_1 + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", False, 11, False, b"ab"),
        (_ONE_1 + b"\r\nab", True, 11, False, b"ab"),
        (b"HTTP/1.0 200 OK\r\n\r\nab", True, 10, False, b"ab"),
        (_ONE_1 + b"Content-Length: 9\r\n\r\nab", False, 11, True, b"ab"),
        (b"HTTP/1.1 204 No\r\n\r\n", False, 11, False, b""),
    ],
)  # fmt: skip
def test_how_an_answer_ends_and_when_it_began_is_seen(
    raw: bytes, version: int, body: bytes, *, until_close: bool, cut: bool
) -> None:
    ticks = iter((10.0, 10.75))
    answer = HttpFetch(_url(_serve_once(raw)), clock=lambda: next(ticks))(Ask("/"))
    assert (answer.until_close, answer.version, answer.cut) == (until_close, version, cut)
    assert (answer.body, answer.first_byte_s) == (body, 0.75)


@pytest.mark.parametrize("raw", [b"", b"nonsense\r\n\r\n"])
def test_what_is_no_answer_is_none(raw: bytes) -> None:
    answered = HttpFetch(_url(_serve_once(raw)))(Ask("/"))

    assert (answered.status, bool(answered.why)) == (0, True)


def test_silence_is_reported_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fetch = HttpFetch(_url(listener.getsockname()[1]), timeout_s=0.05)
        assert fetch(Ask("/")) == Answer(why="no answer within 0.05 s", timed_out=True)


def test_a_guest_looks_at_its_nics_and_its_smbios(tmp_path: Path) -> None:
    nothing = look_around(tmp_path)
    assert (nothing.macs, nothing.dmi, nothing.dmi_complete) == (frozenset(), {}, True)
    for name, mac in (("lo", "00:00:00:00:00:00"), ("eth0", "52:54:00:AB:00:01")):
        device = tmp_path / "sys/class/net" / name
        device.mkdir(parents=True)
        (device / "address").write_text(f"{mac}\n")
    dmi = tmp_path / "sys/class/dmi/id"
    dmi.mkdir(parents=True)
    (dmi / "product_name").write_text("OpenStack Nova\n")
    (tmp_path / "proc/1").mkdir(parents=True)
    (tmp_path / "proc/cmdline").write_text("root=/dev/vda1 ds=Ec2\n")
    (tmp_path / "proc/1/cmdline").write_text("/sbin/init\0ds=nocloud\0")
    (tmp_path / "proc/1/environ").write_text("A=b=c\0product_name=OpenStack Nova\0")

    around = look_around(tmp_path)
    assert around.macs == frozenset({"52:54:00:ab:00:01"})
    assert around.dmi == {"product_name": "OpenStack Nova"}
    assert around.kernel.strip() == "root=/dev/vda1 ds=Ec2"
    assert around.environment == {"A": "b=c", "product_name": "OpenStack Nova"}
    assert (around.container, around.dmi_complete, around.sources) == (False, True, None)

    (tmp_path / "run/systemd").mkdir(parents=True)
    (tmp_path / "run/systemd/container").write_text("lxc")
    (tmp_path / "run/cloud-init").mkdir()
    (tmp_path / "run/cloud-init/cloud.cfg").write_text("datasource_list: [ OpenStack, None ]\n")
    around = look_around(tmp_path)
    assert around.container
    assert around.kernel.split() == ["/sbin/init", "ds=nocloud"]
    assert around.sources == ("OpenStack", "None")


def test_a_hosts_virtual_machine_is_known_by_one_of_its_macs(tmp_path: Path) -> None:
    first, second, later = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:03"
    commands = {
        "7": f"/usr/bin/python3\0-c\0mac={first}\0",
        "8": "/usr/bin/qemu-system-x86_64\0-device\0virtio-net-pci,mac=52:54:00:00:00:09\0",
        "9": f'/usr/bin/qemu-system-x86_64\0-device\0{{"driver":"e1000","mac":"{first}"}}\0'
        f"-device\0virtio-net-pci,netdev=a,mac={second.upper()}\0",
    }
    for pid, command in commands.items():
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "cmdline").write_text(command)
    (tmp_path / "proc/self").mkdir()
    assert machine_macs(frozenset({second}), tmp_path) == frozenset({first, second})
    assert machine_macs(frozenset({later}), tmp_path) is None
    tap = tmp_path / "sys/class/net/vnet0"
    tap.mkdir(parents=True)
    (tap / "address").write_text("fe:54:00:00:00:03\n")
    assert machine_macs(frozenset({second, later}), tmp_path) == frozenset({first, second, later})
