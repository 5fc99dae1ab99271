"""The console in Debian's Chromium."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from support.admin_server import INSTANCE, NETWORK, AdminServer, admin_server
from support.console import RunningConsole, chromium, open_page, run_console


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminServer]:
    with admin_server(tmp_path_factory.mktemp("console")) as made:
        body = {"networks": [NETWORK], "instances": [INSTANCE]}
        made.client.request("POST", "/v1/records", body=body)
        yield made


@pytest.fixture(scope="module")
def console(server: AdminServer) -> Iterator[RunningConsole]:
    with run_console(server.socket) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def page(browser: Browser, console: RunningConsole) -> Page:
    return open_page(browser, console)


def test_the_link_opens_a_table_of_networks(page: Page) -> None:
    row = page.get_by_role("row", name="blue")
    assert row.inner_text().split() == ["blue", "namespace", "blue", "1", "sqlite", "serving"]
