"""Who may use the console, by the clock and by what requests say of themselves."""

from collections.abc import Mapping

import pytest

from imdsproxy.console.access import IDLE_S, LINK_S, Access, refuse_foreign

_HOST = "127.0.0.1:8169"
_ORIGIN = f"http://{_HOST}"


class _Hand:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        return self.at


def test_a_link_opens_one_session_and_only_with_its_key() -> None:
    access = Access(lambda: 0.0)
    assert not access.has_session(access.cookie)
    assert not access.open("")
    assert not access.open(access.key[:-1])
    assert access.open(access.key)
    assert access.has_session(access.cookie)
    assert not access.has_session(access.key)
    assert not access.has_session(None)
    assert not access.open(access.key)


def test_a_link_that_is_not_opened_in_time_opens_nothing() -> None:
    clock = _Hand()
    access = Access(clock)
    clock.at = LINK_S
    assert not access.is_over()
    clock.at += 1
    assert access.is_over()
    assert not access.open(access.key)


def test_a_session_ends_once_it_was_not_used_for_long() -> None:
    clock = _Hand()
    access = Access(clock)
    access.open(access.key)
    for _ in range(3):
        clock.at += IDLE_S
        assert access.has_session(access.cookie)
        access.see()
    clock.at += IDLE_S + 1
    assert access.is_over()
    assert not access.has_session(access.cookie)


def test_no_two_secrets_of_two_runs_are_alike() -> None:
    every = [
        secret
        for access in (Access(lambda: 0.0), Access(lambda: 0.0))
        for secret in (access.place, access.key, access.cookie, access.token)
    ]
    assert len({*every}) == 8
    assert all(len(secret) == 32 for secret in every)


@pytest.mark.parametrize("host", ["127.0.0.1", _HOST, "localhost:1", "localhost"])
def test_requests_to_this_host_by_whatever_port_are_the_consoles(host: str) -> None:
    assert refuse_foreign("GET", {"host": host}, opens=False) is None
    origin = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    assert refuse_foreign("POST", origin, opens=False) is None


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8169",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8169",
        "127.0.0.1:8169, evil.example",
        "evil.example#127.0.0.1",
        "127.0.0.1:8169\n",
        "127.0.0.2:8169",
        "[::1]:8169",
        "0.0.0.0:8169",
    ],
)
def test_a_name_of_others_that_resolves_to_this_host_is_refused(host: str) -> None:
    for opens in (False, True):
        assert refuse_foreign("GET", {"host": host}, opens=opens) is not None


@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense"])
def test_what_another_sites_or_ports_page_sends_is_refused_but_for_the_link(site: str) -> None:
    headers = {"host": _HOST, "sec-fetch-site": site}
    assert refuse_foreign("GET", headers, opens=False) is not None
    assert refuse_foreign("GET", headers, opens=True) is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8170"},
        {"origin": "https://127.0.0.1:8169"},
        {"origin": "http://localhost:8169"},
        {"origin": "http://evil.example"},
        {"origin": f"{_ORIGIN}, {_ORIGIN}"},
        {"origin": _ORIGIN, "sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_what_changes_something_must_come_from_a_page_of_the_console(
    method: str, headers: Mapping[str, str]
) -> None:
    assert refuse_foreign(method, {"host": _HOST, **headers}, opens=False) is not None


def test_a_browser_that_fetches_ahead_does_not_use_up_the_link() -> None:
    headers = {"host": _HOST, "sec-purpose": "prefetch;prerender"}
    assert refuse_foreign("GET", headers, opens=True) is not None
