"""Attacks on the console by programs that ask as they like, and how its command ends."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final
from urllib.request import urlopen

import pytest

from imdsproxy.cli.main import main
from imdsproxy.console import access
from imdsproxy.console.server import run_console as run_until_over
from imdsproxy.host.servers import open_tcp_socket
from support.admin_server import INSTANCE, NETWORK, AdminServer, admin_server
from support.console import RunningConsole, run_console
from support.demonstration import REPOSITORY
from support.patience import patience

_SECRET: Final = "the-secret-of-web"
_NOBODY: Final = 65534
_PAGES: Final = (
    "/",
    "/networks",
    "/networks/blue",
    "/networks/blue/edit",
    "/guests",
    "/guests/web-1",
    "/guests/web-1/edit",
    "/guests/web-1/usage",
    "/guests/web-1/documents",
    "/live",
    "/live/stream",
    "/problems",
    "/static/console.css",
    "/nothing",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminServer]:
    with admin_server(tmp_path_factory.mktemp("console")) as made:
        record = {**INSTANCE, "user_data": _SECRET}
        made.client.request(
            "POST", "/v1/records", body={"networks": [NETWORK], "instances": [record]}
        )
        made.answer("/latest/user-data", _SECRET.encode())
        yield made


@pytest.fixture(scope="module")
def console(server: AdminServer) -> Iterator[RunningConsole]:
    """One whose session is open."""
    with run_console(server.socket) as running:
        yield running


@pytest.fixture(scope="module")
def cookie(console: RunningConsole) -> str:
    """The session's, as the browser sends it back."""
    opened = console.ask(console.link)
    assert opened.status == 200
    return opened.headers["set-cookie"].partition(";")[0]


def _own(console: RunningConsole, cookie: str) -> dict[str, str]:
    """The headers that a browser sends with a page's form."""
    return {
        "cookie": cookie,
        "origin": console.origin,
        "sec-fetch-site": "same-origin",
        "content-type": "application/x-www-form-urlencoded",
    }


def _token(console: RunningConsole, cookie: str) -> str:
    page = console.ask(f"{console.root}/guests/web-1/edit", {"cookie": cookie}).text
    return page.partition('name="token" value="')[2].partition('"')[0]


def test_the_link_opens_one_session_and_then_nothing(server: AdminServer) -> None:
    with run_console(server.socket) as console:
        wrong = console.ask(console.link[:-1])
        assert (wrong.status, "set-cookie" in wrong.headers) == (403, False)
        ahead = {"sec-purpose": "prefetch"}
        assert console.ask(console.link, ahead).status == 403
        assert console.ask(console.link, method="HEAD").status == 403
        # A link in a web mail is followed from another site.
        first = console.ask(console.link, {"sec-fetch-site": "cross-site"})
        assert first.status == 200
        again = console.ask(console.link)
        assert (again.status, "set-cookie" in again.headers) == (403, False)


def test_of_many_who_open_the_link_at_once_one_gets_the_session(server: AdminServer) -> None:
    with run_console(server.socket) as console, ThreadPoolExecutor(16) as pool:
        opened = [*pool.map(console.ask, [console.link] * 32)]
    assert sorted(reply.status for reply in opened) == [200] + [403] * 31


def test_a_link_that_is_not_opened_ends_the_command(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(access, "LINK_S", 0.0)
    assert main(["--socket", str(server.socket), "console"]) == 0
    assert capsys.readouterr().out.endswith("ended: the link was not opened in time\n")


def test_a_session_that_is_not_used_ends_the_command(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "IDLE_S", 0.0)
    opened: list[threading.Thread] = []

    def follow(link: str) -> None:
        opened.append(threading.Thread(target=lambda: urlopen(link).close()))  # noqa: S310 - ours
        opened[0].start()

    with open_tcp_socket("127.0.0.1", 0) as listener:
        reason = run_until_over(server.client, listener, follow)
    opened[0].join()
    assert reason == "the session was not used for an hour"


def test_the_cookie_goes_to_the_consoles_own_paths_only(
    console: RunningConsole, server: AdminServer
) -> None:
    del console
    with run_console(server.socket) as another:
        words = another.ask(another.link).headers["set-cookie"].lower().split("; ")
        assert {"httponly", "samesite=strict"} <= {*words}
        path = another.root.removeprefix(another.origin).lower()
        assert f"path={path}/" in words
        # It ends with the browser, and is of this host alone.
        assert not [one for one in words if one.startswith(("expires", "max-age", "domain"))]


@pytest.mark.parametrize("path", _PAGES)
@pytest.mark.parametrize("cookie", [None, "imdsproxy-console=guessed", "imdsproxy-console="])
def test_without_the_session_no_page_shows_anything(
    console: RunningConsole, path: str, cookie: str | None
) -> None:
    headers = {} if cookie is None else {"cookie": cookie}
    for target in (console.root + path, console.origin + path):
        reply = console.ask(target, headers)
        assert reply.status == 403
        assert "web-1" not in reply.text
        assert "blue" not in reply.text


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8169"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_with_the_cookie_a_page_of_others_still_gets_nothing(
    console: RunningConsole, cookie: str, headers: Mapping[str, str]
) -> None:
    for path in ("/guests/web-1", "/live/stream", "/static/console.js"):
        reply = console.ask(console.root + path, {"cookie": cookie, **headers})
        assert reply.status == 403
        assert "web-1" not in reply.text


def test_a_name_that_is_rebound_to_this_host_does_not_use_up_the_link(server: AdminServer) -> None:
    with run_console(server.socket) as console:
        assert console.ask(console.link, {"host": "evil.example"}).status == 403
        assert console.ask(console.link, {"host": "localhost:1234"}).status == 200


@pytest.mark.parametrize(
    "forged",
    [
        {"origin": ""},
        {"origin": "null"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"host": "localhost:1"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site"},
        {"cookie": "imdsproxy-console=guessed"},
    ],
)
@pytest.mark.parametrize("path", ["edit", "documents"])
def test_a_forged_form_changes_and_reveals_nothing_even_with_the_token(
    console: RunningConsole, server: AdminServer, cookie: str, forged: dict[str, str], path: str
) -> None:
    before = server.instance_record("web-1")
    form = {"token": _token(console, cookie), "name": "forged", "path": "/latest/user-data"}
    headers = {name: one for name, one in {**_own(console, cookie), **forged}.items() if one}
    reply = console.ask(f"{console.root}/guests/web-1/{path}", headers, method="POST", form=form)
    assert reply.status == 403
    assert _SECRET not in reply.text
    assert server.instance_record("web-1") == before


@pytest.mark.parametrize("token", ["", "guessed", "ä"])
def test_a_form_without_the_sessions_token_changes_and_reveals_nothing(
    console: RunningConsole, server: AdminServer, cookie: str, token: str
) -> None:
    before = server.instance_record("web-1")
    for path in ("edit", "documents"):
        reply = console.ask(
            f"{console.root}/guests/web-1/{path}",
            _own(console, cookie),
            method="POST",
            form={"token": token, "name": "forged", "path": "/latest/user-data"},
        )
        assert reply.status == 403
        assert _SECRET not in reply.text
    assert server.instance_record("web-1") == before


def test_a_form_of_the_console_itself_is_taken(console: RunningConsole, cookie: str) -> None:
    form = {"token": _token(console, cookie), "path": "/latest/user-data"}
    target = f"{console.root}/guests/web-1/documents"
    reply = console.ask(target, _own(console, cookie), method="POST", form=form)
    assert reply.status == 200
    assert _SECRET in reply.text


@pytest.mark.parametrize(
    "query",
    [
        "path=/latest/user-data",
        "path=/latest/user-data&revealed=true",
        "path=/latest//user-data",
        "path=%2Flatest%2Fuser%252Ddata",
        "path=/latest/meta-data/../user-data",
        "path=/latest/user-data&token=TOKEN",
    ],
)
def test_no_link_shows_a_secret(console: RunningConsole, cookie: str, query: str) -> None:
    asked = query.replace("TOKEN", _token(console, cookie))
    reply = console.ask(f"{console.root}/guests/web-1/documents?{asked}", {"cookie": cookie})
    assert _SECRET not in reply.text


@pytest.mark.parametrize("path", [one for one in _PAGES if one != "/live/stream"])
def test_every_answer_has_the_headers_that_keep_others_out(
    console: RunningConsole, cookie: str, path: str
) -> None:
    for headers in ({"cookie": cookie}, {}, {"host": "evil.example"}):
        reply = console.ask(console.root + path, headers)
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        is_file = path.startswith("/static/") and reply.status == 200
        kept = "private, max-age=3600" if is_file else "no-store"
        assert reply.headers["cache-control"] == kept
        assert reply.headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in reply.headers
        assert "server" not in reply.headers


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/static/",
    ],
)
def test_only_the_consoles_own_files_are_given(
    console: RunningConsole, cookie: str, path: str
) -> None:
    assert console.ask(console.root + path, {"cookie": cookie}).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_pages_that_change_nothing_take_no_other_method(
    console: RunningConsole, cookie: str, method: str
) -> None:
    for path in ("/guests", "/live/stream", "/open"):
        reply = console.ask(console.root + path, _own(console, cookie), method=method)
        assert reply.status in {403, 405}


def test_where_the_daemon_does_not_answer_the_page_says_so(
    console: RunningConsole, server: AdminServer, cookie: str
) -> None:
    away = server.socket.with_suffix(".away")
    server.socket.rename(away)
    try:
        reply = console.ask(f"{console.root}/guests", {"cookie": cookie})
    finally:
        away.rename(server.socket)
    assert reply.status == 503
    assert "no daemon answers" in reply.text


def test_ctrl_c_ends_the_session_and_the_streams_in_it(server: AdminServer) -> None:
    with run_console(server.socket) as console:
        cookie = console.ask(console.link).headers["set-cookie"].partition(";")[0]
        stream = http.client.HTTPConnection(console.host, timeout=20 * patience())
        path = console.root.removeprefix(console.origin)
        stream.request("GET", f"{path}/live/stream", headers={"cookie": cookie})
        answer = stream.getresponse()
        assert answer.readline().startswith(b"data: ")
        console.process.send_signal(signal.SIGINT)
        assert console.process.wait(20 * patience()) == 130
        stream.close()
        host, _, port = console.host.partition(":")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))


_PAGE: Final = (REPOSITORY / "docs/how-to/console.md").read_text()


@pytest.mark.parametrize(
    "line", re.findall(r"^    .*\bimdsproxy (console\b.*)$", _PAGE, re.MULTILINE)
)
def test_each_command_of_the_page_about_the_console_prints_what_the_page_says(
    server: AdminServer, line: str
) -> None:
    wanted = _PAGE.partition("```text\n")[2].partition("```")[0]
    words = (sys.executable, "-m", "imdsproxy", "--socket", str(server.socket), *line.split())
    # Python would hide a link that waits in a buffer.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        assert process.stdout is not None
        printed = process.stdout.readline() + process.stdout.readline()
        process.send_signal(signal.SIGINT)
    assert re.fullmatch(re.escape(wanted).replace("…", "[^/ ]+"), printed)
    port = re.search("--port ([0-9]+)", line)
    assert port is None or f"127.0.0.1:{port[1]}/" in printed


def test_it_listens_on_this_host_alone(console: RunningConsole) -> None:
    port = int(console.host.partition(":")[2])
    sockets = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()]
    mine = {
        local for local, _, state in sockets if state == "0A" and local.endswith(f":{port:04X}")
    }
    assert mine == {f"0100007F:{port:04X}"}


def test_an_account_that_may_not_use_the_socket_gets_no_console(server: AdminServer) -> None:
    words = (sys.executable, "-m", "imdsproxy", "--socket", str(server.socket), "console")
    ran = subprocess.run(
        words, capture_output=True, text=True, user=_NOBODY, group=_NOBODY, cwd="/", check=False
    )
    assert ran.returncode == 77
    assert "not open to this account" in ran.stderr
    assert ran.stdout == ""


def test_without_jinja_the_command_says_how_to_install_it(
    server: AdminServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [one for one in sys.modules if one.startswith("imdsproxy.console")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["--socket", str(server.socket), "console"]) == 69
    assert "apt install python3-jinja2" in capsys.readouterr().err


def test_a_port_that_there_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["console", "--port", "65536"]) == 64
    assert "there is no port 65536" in capsys.readouterr().err


def test_a_port_that_is_in_use_is_reported(
    server: AdminServer, console: RunningConsole, capsys: pytest.CaptureFixture[str]
) -> None:
    port = console.host.partition(":")[2]
    assert main(["--socket", str(server.socket), "console", "--port", port]) == 71
    assert f"127.0.0.1 port {port}" in capsys.readouterr().err
