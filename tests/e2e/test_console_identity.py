"""A guest's identity tokens in the console, in Debian's Chromium.

With `CONSOLE_IMAGES=docs/images` the test of looks writes the picture of the documentation.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import Locator, expect

from support.console import Looker, open_looker, run_console
from support.daemon import instance
from support.demonstration import REPOSITORY
from support.identity.requests import claims_of, identity_settings, request_token, wait_token
from support.world import World, open_world

pytestmark = pytest.mark.root

_PROJECT: Final = "11111111111111111111111111111111"
_POLICY: Final = {
    "projects": {_PROJECT: {"audiences": ["vault", "https://kubernetes.example"]}},
    "instances": {"red-5": {"identity_document": True}},
}
_SCHEMES: Final = ("light", "dark")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    section, _ = identity_settings(tmp_path_factory.mktemp("issuer"))
    settings = {"resolver": {"hold_s": 1.0}, "identity": section, "policy": _POLICY}
    with open_world(settings) as world:
        fields = {"name": "web-1", "project": _PROJECT}
        world.daemon.put(instances=[instance("red-5", "red", fields=fields)])
        wait_token(world.red)
        yield world


@pytest.fixture(scope="module")
def opened(world: World) -> Iterator[Looker]:
    with run_console(world.daemon.admin.socket) as console, open_looker(console) as looker:
        yield looker


@pytest.fixture
def looker(opened: Looker) -> Iterator[Looker]:
    """A browser; a complaint of the browser fails the test."""
    opened.complaints.clear()
    yield opened
    assert opened.complaints == []


def _open(looker: Looker, guest: str) -> Locator:
    return looker.open(f"/guests/{guest}").get_by_role("region", name="Identity tokens")


def _ask_all(world: World) -> str:
    """Have the guest of red request an audience with and without nonce, and one that is not allowed."""
    nonce = ("X-imdsproxy-nonce: n0nce-of-the-guest",)
    assert request_token(world.red, "https://kubernetes.example", more=nonce).status == 200
    assert request_token(world.red, "mail").status == 403
    return wait_token(world.red)


def test_a_guests_page_shows_its_audiences_and_the_last_token_of_each(
    looker: Looker, world: World
) -> None:
    token = _ask_all(world)
    shown = _open(looker, "red-5")
    row = shown.get_by_role("row", name="vault")
    expect(row).to_contain_text("the guest got a token")
    expect(row).to_contain_text(str(claims_of(token)["jti"]))
    refused = shown.get_by_role("row", name="mail")
    expect(refused).to_contain_text("not allowed")
    content = looker.page.content()
    assert token.rpartition(".")[2] not in content
    assert "n0nce" not in content


def test_a_guest_that_may_request_nothing_is_shown_with_the_reason(looker: Looker) -> None:
    shown = _open(looker, "blue-5")
    requests = shown.get_by_role("listitem")
    expect(requests).to_have_count(3)
    for text in ("PUT", "POST", "GET"):
        expect(requests.filter(has_text=text)).to_contain_text("not allowed")
    expect(shown).to_contain_text("the policy allows no signed document")


def test_axe_finds_nothing_serious_in_light_and_dark(looker: Looker, world: World) -> None:
    _ask_all(world)
    _open(looker, "red-5")
    assert {scheme: looker.judge(scheme) for scheme in _SCHEMES} == {"light": [], "dark": []}


def test_a_narrow_window_scrolls_the_table_and_not_the_page(looker: Looker) -> None:
    looker.page.set_viewport_size({"width": 420, "height": 800})
    try:
        shown = _open(looker, "red-5")
        table = shown.get_by_role("region", name="Audiences in red")
        wide: bool = table.evaluate("one => one.scrollWidth > one.clientWidth")
        assert wide
        overflows: bool = looker.page.evaluate(
            "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        )
        assert not overflows
    finally:
        looker.page.set_viewport_size({"width": 1280, "height": 800})


def test_the_picture_of_the_documentation_is_this_page(looker: Looker, world: World) -> None:
    images = os.environ.get("CONSOLE_IMAGES")
    _ask_all(world)
    shown = _open(looker, "red-5")
    page = (REPOSITORY / "docs/how-to/console.md").read_text()
    for scheme in _SCHEMES:
        looker.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        taken = shown.screenshot()
        assert len(taken) > 10_000
        name = f"console-identity-{scheme}.png"
        if images:
            Path(images, name).write_bytes(taken)
        assert f"../images/{name}" in page
        assert (REPOSITORY / "docs/images" / name).read_bytes().startswith(b"\x89PNG")
