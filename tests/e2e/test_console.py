"""The console in Debian's Chromium, for a real daemon that has ten thousand guests.

With `CONSOLE_IMAGES=docs/images` the test of looks writes the pictures of the documentation.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import expect

from support.console import Looker, open_looker, run_console
from support.daemon import instance
from support.demonstration import REPOSITORY
from support.lab import RecordMapping
from support.patience import patience
from support.world import World, open_world

pytestmark = pytest.mark.root

_MANY: Final = 10_000
_SCHEMES: Final = ("light", "dark")
_PICTURES: Final = {
    "live": "/live",
    "networks": "/networks",
    "guest": "/guests/red-5",
    "documents": "/guests/red-5/documents?path=/openstack/latest/meta_data.json",
    "problems": "/problems",
}
"""The views that `docs/how-to/console.md` shows."""

_RENAME: Final = """
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replace(/imdst-[0-9a-f]+-/, "qdhcp-");
"""
_XSS: Final = "<img src=x onerror=alert(1)>'\"</script>"
_HOSTILE: Final = instance(
    "hostile",
    "red",
    77,
    fields={
        "name": _XSS,
        "project": _XSS,
        "availability_zone": _XSS,
        "instance_type": _XSS,
        "hostname": "hostile",
        "tags": {_XSS: _XSS},
        "ssh_keys": [
            {
                "name": _XSS.replace("=", "").replace("/", ""),
                "key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 " + _XSS,
            }
        ],
        "user_data": _XSS,
        "vendor_data": _XSS,
    },
)
_SECRET: Final = "db-password-of-web"
_WEB: Final = instance(
    "red-5",
    "red",
    fields={
        "name": "web-1",
        "project": "shop",
        "instance_type": "m1.small",
        "tags": {"role": "web", "stage": "production"},
        "ssh_keys": [
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGnJqK4b1xK8YhXl8e2nQ7mRZyB2L1zv7oQ2J0b0s1t2 anna@desk"
        ],
        "user_data": f"#cloud-config\npassword: {_SECRET}\n",
    },
)


def _line(number: int) -> bytes:
    port = {
        "network": "green",
        "mac": f"52:54:00:{number >> 16:02x}:{number >> 8 & 255:02x}:{number & 255:02x}",
        "addresses": [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"],
    }
    record = {
        "id": f"vm-{number:05}",
        "name": f"worker-{number}",
        "project": "batch",
        "ports": [port],
    }
    return json.dumps({"instance": record}).encode() + b"\n"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    usual: dict[str, object] = {"requests_per_s": 100, "burst": 4000, "connections": 160}
    settings: dict[str, dict[str, object]] = {
        "limits": usual,
        "resolver": {"hold_s": 0.5},
        "tokens": {"count_reads": "all"},
    }
    with open_world(settings) as world:
        numbers = range(70_000, 70_000 + _MANY - 5)
        world.daemon.admin.post_records(map(_line, numbers), {}, lambda _: None)
        gone: RecordMapping = {
            "id": "yellow",
            "name": "Yellow",
            "listener": {"namespace": "qdhcp-yellow"},
        }
        world.daemon.put([gone], [_WEB, _HOSTILE])
        yield world


@pytest.fixture(scope="module")
def opened(world: World) -> Iterator[Looker]:
    with run_console(world.daemon.admin.socket) as console, open_looker(console) as looker:
        yield looker


@pytest.fixture
def looker(opened: Looker) -> Iterator[Looker]:
    """A browser; what it complains about, and what its pages ask elsewhere, fails the test."""
    opened.complaints.clear()
    yield opened
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith(opened.console.root)] == []


def test_networks_are_listed_with_their_state_and_what_to_do(looker: Looker) -> None:
    page = looker.open("/networks")
    row = page.get_by_role("row", name="red", exact=False)
    expect(row.first).to_contain_text("serving")
    page.get_by_role("link", name="yellow", exact=True).click()
    expect(page.get_by_role("note")).to_contain_text("namespace")
    expect(page.get_by_role("heading", level=1)).to_contain_text("not served")


def test_among_ten_thousand_guests_one_is_found_as_its_name_is_typed(looker: Looker) -> None:
    page = looker.open("/guests")
    expect(page.get_by_role("status")).to_have_text(f"{_MANY:,} guests")
    page.get_by_label("Search").press_sequentially("worker-70123")
    expect(page.get_by_role("status")).to_have_text("1 guest")
    expect(page.get_by_role("row")).to_have_count(2)
    page.get_by_role("link", name="worker-70123").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("worker-70123")
    page.go_back()
    expect(page.get_by_role("status")).to_have_text("1 guest")


def test_pages_of_guests_follow_one_another(looker: Looker) -> None:
    page = looker.open("/guests?network=green&text=worker")
    first = page.get_by_role("row").nth(1).inner_text()
    page.get_by_role("link", name="Next page").click()
    expect(page.get_by_role("row").nth(1)).not_to_have_text(first)
    page.get_by_role("link", name="First page").click()
    expect(page.get_by_role("row").nth(1)).to_contain_text("worker-70000")


@pytest.mark.parametrize(
    "path",
    [
        "/networks",
        "/guests",
        "/guests?text=10.1.17.",
        "/guests?text=nothing-has-this",
        "/guests/vm-70123",
        "/guests/vm-70123/edit",
        "/guests/vm-70123/documents",
        "/problems",
        "/live",
    ],
)
def test_each_view_is_there_within_a_second_with_ten_thousand_guests(
    looker: Looker, path: str
) -> None:
    looker.open(path)
    assert looker.took_s() < 1 * patience()


def test_a_guests_page_shows_who_it_is_and_why_as_a_path_to_its_answer(looker: Looker) -> None:
    page = looker.open("/guests/red-5")
    path = page.get_by_role("list", name="The path of a request from 10.0.0.5")
    titles = path.get_by_role("listitem").locator(".title")
    assert titles.all_inner_texts() == [
        "Guest",
        "Listener",
        "MAC filter",
        "HAProxy's map",
        "Instance",
        "Policy",
        "Answer",
    ]
    expect(path.get_by_role("listitem").last).to_contain_text("200 OK")
    expect(path).to_contain_text("by an address of its port")


def test_a_guests_page_shows_what_it_asks_for_and_whether_it_can_be_made_to_use_tokens(
    looker: Looker, world: World
) -> None:
    page = looker.open("/guests/vm-70123")
    expect(page.get_by_text("not known yet")).to_be_visible()
    expect(page.get_by_role("img", name="Recent requests")).to_be_visible()
    page = looker.open("/guests/red-5")
    # One connection each: a worker of before a reload ends those that are kept.
    for _ in range(300):
        world.red.ask("/latest/meta-data/", headers=("User-Agent: old-client/1",))
    # By itself, while the page is open.
    expect(page.get_by_text("of 4,000 in 40 s")).to_have_text(re.compile("^[3-9][0-9][0-9] of"))
    page = looker.open("/guests/red-5")
    expect(page.get_by_text("not ready for required")).to_be_visible()
    expect(page.get_by_role("cell", name="old-client/1")).to_be_visible()


def test_documents_are_shown_in_each_dialect_and_their_secrets_once_asked_for(
    looker: Looker,
) -> None:
    page = looker.open("/guests/red-5")
    assert _SECRET not in page.content()
    page.get_by_role("link", name="Documents").click()
    page.get_by_role("link", name="instance-type").click()
    expect(page.locator("pre")).to_have_text("m1.small")
    page.get_by_role("link", name="OpenStack").click()
    expect(page.locator("pre")).to_contain_text('"random_seed": "(hidden)"')
    assert "AAAAC3Nza" not in page.content()
    page.get_by_role("button", name="Show keys and passwords").click()
    expect(page.locator("pre")).to_contain_text("AAAAC3Nza")
    page.get_by_role("link", name="NoCloud").click()
    page.get_by_role("link", name="/nocloud/user-data").click()
    expect(page.get_by_text("This document is a secret.")).to_be_visible()
    assert _SECRET not in page.content()
    page.get_by_role("button", name="Show document").click()
    expect(page.locator("pre")).to_contain_text(_SECRET)


def test_a_record_that_is_changed_in_the_form_is_what_the_guest_reads(
    looker: Looker, world: World
) -> None:
    page = looker.open("/guests/red-5")
    page.get_by_role("link", name="Change the record").click()
    page.get_by_label("Instance type").fill("m1.large")
    tags = page.get_by_role("table", name="Tags")
    tags.get_by_label("Name").last.fill("owner")
    tags.get_by_label("Value").last.fill("anna")
    page.get_by_role("button", name="Store").click()
    expect(page.get_by_role("status")).to_have_text("Stored, and in force.")
    expect(page.get_by_text("owner = anna")).to_be_visible()
    assert world.red.ask("/latest/meta-data/instance-type").text == "m1.large"
    # What the form does not show is as it was.
    assert _SECRET in world.red.ask("/latest/user-data").text
    assert world.daemon.admin.get("/v1/instances/red-5")["record"]["tags"]["owner"] == "anna"
    world.daemon.put((), [_WEB])


def test_what_the_daemon_does_not_accept_is_shown_at_its_field_and_nothing_is_stored(
    looker: Looker, world: World
) -> None:
    before = world.daemon.admin.get("/v1/instances/red-5")["record"]
    page = looker.open("/guests/red-5/edit")
    ports = page.get_by_role("table", name="Ports")
    ports.get_by_label("MAC").first.fill("52:54:00")
    page.get_by_label("Host name").fill("no host name")
    page.get_by_text("Policy rules").click()
    page.get_by_label("hop limit").fill("many")
    page.get_by_role("button", name="Store").click()
    expect(page.get_by_role("alert")).to_be_focused()
    for label in ("MAC", "Host name", "hop limit"):
        field = page.get_by_label(label).first
        expect(field).to_have_attribute("aria-invalid", "true")
        assert page.locator(f"[id='{field.get_attribute('aria-describedby')}']").inner_text()
    expect(page.get_by_label("Host name")).to_have_value("no host name")
    assert world.daemon.admin.get("/v1/instances/red-5")["record"] == before


def test_a_form_of_a_record_that_has_changed_meanwhile_is_refused(
    looker: Looker, world: World
) -> None:
    page = looker.open("/guests/red-5/edit")
    body = {"instance_type": "m1.tiny"}
    world.daemon.admin.request("PATCH", "/v1/instances/red-5", body=body)
    page.get_by_label("Project", exact=True).fill("other")
    page.get_by_role("button", name="Store").click()
    expect(page.get_by_role("alert")).to_contain_text("changed by another")
    world.daemon.put((), [_WEB])


def test_a_networks_record_is_changed_in_its_form(looker: Looker, world: World) -> None:
    page = looker.open("/networks/grey/edit")
    page.get_by_label("MTU", exact=True).fill("1400")
    subnets = page.get_by_role("table", name="Subnets")
    subnets.get_by_label("Name servers").first.fill("10.0.0.2, 10.0.0.3")
    page.get_by_role("button", name="Store").click()
    expect(page.get_by_role("status")).to_contain_text("Stored")
    record = world.daemon.admin.get("/v1/networks/grey")["record"]
    assert record["mtu"] == 1400
    assert record["subnets"][0]["dns"] == ["10.0.0.2", "10.0.0.3"]


def test_requests_appear_as_they_are_answered_and_only_those_that_are_asked_for(
    looker: Looker, world: World
) -> None:
    page = looker.open("/live?network=red&status=4")
    expect(page.locator("#seen")).to_have_text("0 requests")
    world.guests["green"].ask("/latest/none-green")
    world.red.ask("/latest/meta-data/")
    world.red.ask("/latest/<img/src=x/onerror=alert(1)>", headers=(f"User-Agent: {_XSS}",))
    row = page.get_by_role("row").nth(1)
    expect(row).to_contain_text("<img/src=x/onerror=alert(1)>")
    expect(row).to_contain_text("404")
    expect(page.get_by_role("row")).to_have_count(2)
    page.get_by_role("button", name="Pause").click()
    world.red.ask("/latest/none-red")
    expect(page.locator("#seen")).to_have_text("2 requests")
    expect(page.get_by_role("row")).to_have_count(2)
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("row")).to_have_count(3)
    page.get_by_role("link", name="red-5").first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("web-1")


def test_what_is_wrong_is_listed_with_what_to_do(looker: Looker) -> None:
    page = looker.open("/problems")
    trouble = page.get_by_role("listitem").filter(has_text="yellow")
    expect(trouble.first).to_contain_text("guests notice")
    expect(trouble.first).to_contain_text("To do:")
    trouble.first.get_by_role("link", name="network yellow").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("yellow")


def test_texts_of_guests_and_records_are_shown_as_texts(looker: Looker, world: World) -> None:
    world.red.ask("/latest/user-data", headers=(f"User-Agent: {_XSS}",))
    paths = (
        "/guests?text=hostile",
        "/guests?text=" + "%3Cimg%20src=x%3E",
        "/guests/hostile",
        "/guests/hostile/edit",
        "/guests/red-5",
        "/guests/hostile/documents?path=/openstack/latest/meta_data.json",
        "/guests/hostile/documents?path=/latest/meta-data/tags/instance/",
        "/guests/hostile/documents?path=/latest/<img src=x onerror=alert(1)>",
        "/live?network=<img src=x onerror=alert(1)>",
        "/problems",
    )
    for path in paths:
        page = looker.open(path)
        assert page.locator("img[src='x'], img[onerror]").count() == 0, path
    page = looker.open("/guests/hostile")
    expect(page.get_by_role("heading", level=1)).to_contain_text(_XSS)
    page = looker.open("/guests/hostile/documents?path=/latest/user-data")
    page.get_by_role("button", name="Show document").click()
    expect(page.locator("pre")).to_have_text(_XSS)


def test_axe_finds_nothing_serious_in_light_and_dark(looker: Looker) -> None:
    paths = (
        "/networks",
        "/networks/yellow",
        "/guests",
        "/guests/red-5",
        "/guests/red-5/documents",
        "/guests/red-5/edit",
        "/live",
        "/problems",
    )
    found: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        looker.open(path)
        found |= {(path, scheme): looker.judge(scheme) for scheme in _SCHEMES}
    assert [f"{place}: {one}" for place, serious in found.items() for one in serious] == []


def test_all_of_it_is_reached_with_the_keyboard(looker: Looker) -> None:
    page = looker.open("/networks")
    press = page.keyboard.press
    focused = page.locator(":focus")
    press("Tab")
    expect(focused).to_have_text("Skip to the content")
    press("Enter")
    press("Tab")
    expect(page.get_by_role("link", name=f"{_MANY:,}").first).to_be_focused()
    press("Enter")
    page.wait_for_url("**/guests")
    page.get_by_label("Search").focus()
    page.keyboard.type("web-1 shop")
    expect(page.get_by_role("status")).to_have_text("1 guest")
    expect(page.get_by_label("Search")).to_be_focused()
    for _ in range(4):
        press("Tab")
    expect(page.get_by_role("link", name="web-1")).to_be_focused()
    press("Enter")
    page.wait_for_url("**/guests/red-5")
    reached: list[str] = []
    press("Tab")
    while focused.count():
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        reached.append(focused.inner_text())
        press("Tab")
    wanted = (
        "Skip to the content",
        "Problems",
        "Documents",
        "Change the record",
        "red",
        "Defaults",
    )
    assert [one for one in wanted if one not in reached] == []


def test_pictures_of_the_documentation_are_these_pages(looker: Looker, world: World) -> None:
    images = os.environ.get("CONSOLE_IMAGES")
    world.daemon.remove_instance("hostile")
    page = looker.open("/live")
    expect(page.locator("#seen")).to_have_text("0 requests")
    for path in ("meta-data/", "meta-data/hostname", "user-data", "meta-data/none"):
        world.red.ask(f"/latest/{path}")
    expect(page.get_by_role("row")).to_have_count(5)
    for name, path in _PICTURES.items():
        if name != "live":
            looker.open(path)
        if name == "guest":
            _fill_line(looker, world, points=12 if images else 2)
        # The lab's own names are as long as they are random.
        page.evaluate(_RENAME)
        for scheme in _SCHEMES:
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            taken = page.screenshot(full_page=name == "guest")
            assert len(taken) > 10_000
            if images:
                Path(images, f"console-{name}-{scheme}.png").write_bytes(taken)
    world.daemon.put((), [_HOSTILE])


def test_the_page_about_the_console_shows_each_picture_in_light_and_dark() -> None:
    page = (REPOSITORY / "docs/how-to/console.md").read_text()
    for name in (f"console-{view}-{scheme}.png" for view in _PICTURES for scheme in _SCHEMES):
        assert f"../images/{name}" in page
        assert (REPOSITORY / "docs/images" / name).read_bytes().startswith(b"\x89PNG")


def _fill_line(looker: Looker, world: World, points: int) -> None:
    """Have the guest ask until the line of its requests has so many points."""
    line = looker.page.locator("polyline")
    number = 0
    while len((line.get_attribute("points") or "").split()) < points:
        for _ in range(number % 7):
            world.red.ask("/latest/meta-data/hostname")
        number += 1
        looker.page.wait_for_timeout(1000)
