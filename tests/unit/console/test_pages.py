"""What pages say of the daemon's answers: paths, problems, secrets, lines."""

import json
from dataclasses import asdict
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.api.guests import Explanation, PairReport
from imdsproxy.api.status import report_status
from imdsproxy.console.explained import Step, plan_path
from imdsproxy.console.masking import is_secret, mask_secrets
from imdsproxy.console.pages import make_environment
from imdsproxy.console.rates import HEIGHT, WIDTH, Rates, draw_line
from imdsproxy.console.troubles import list_troubles
from imdsproxy.controller.parts import Parts
from imdsproxy.model.entities import Instance, InstanceId, MacAddress, NetworkId, Port
from imdsproxy.model.observation import Claimant, Observation
from imdsproxy.model.policy_report import PolicyInForce, RuleInForce
from support.controllers import busy_controller, idle_controller
from support.record_builders import key

# Paths

_MAC = MacAddress("52:54:00:12:34:56")


def _explained(**fields: Any) -> list[Step]:
    found = Explanation(*key("blue", "10.0.0.5"), "found", 200, ("network blue comes from sqlite",))
    for name, value in fields.items():
        setattr(found, name, value)
    return plan_path(json.loads(json.dumps(asdict(found), default=str)))


_FOUND: dict[str, Any] = {
    "instance": InstanceId("web"),
    "instance_name": "Web",
    "source": "sqlite",
    "how": "address",
    "revision": "abc",
    "installed": "web|abc",
}


def _named(steps: list[Step], title: str) -> Step:
    return next(one for one in steps if one.title == title)


def test_a_guest_that_is_found_has_a_good_path_to_its_answer() -> None:
    steps = _explained(**_FOUND)
    assert [(one.title, one.name, one.state) for one in steps] == [
        ("Guest", "10.0.0.5", "plain"),
        ("Listener", "blue", "good"),
        ("HAProxy's map", "web", "good"),
        ("Instance", "Web", "good"),
        ("Answer", "200 OK", "good"),
    ]


def test_a_network_that_is_not_served_is_bad_at_its_listener_and_its_answer() -> None:
    steps = _explained(**_FOUND, verdict="not-served", answer=503)
    bad = [one.title for one in steps if one.state == "bad"]
    assert bad == ["Listener", "Answer"]


def test_a_conflict_names_all_that_claim_the_address() -> None:
    claimants = (Claimant("file", InstanceId("a")), Claimant("sqlite", InstanceId("b")))
    steps = _explained(verdict="conflict", answer=503, claimants=claimants, installed="!")
    assert _named(steps, "HAProxy's map").name == "no instance: 503"
    assert _named(steps, "Instance").lines[:2] == ("a (file)", "b (sqlite)")


@pytest.mark.parametrize(
    ("installed", "name"),
    [
        (None, "nothing"),
        ("!", "no instance: 503"),
        ("web|abc", "web"),
        ("+1troo--:0:0:64|web|abc", "web"),
        ("@0|signature|web|project", "web"),
        ("+1troo--:0:0:64|@0|signature|web|project", "web"),
    ],
)
def test_a_value_of_the_map_is_named_by_its_instance(installed: str | None, name: str) -> None:
    assert _named(_explained(installed=installed), "HAProxy's map").name == name


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        (PairReport(_MAC, _MAC, _MAC, gate=True), "one MAC only"),
        (PairReport(None, MacAddress("*"), MacAddress("*"), gate=True), "any MAC"),
        (PairReport(None, _MAC, None, gate=True), "no pair: asks the resolver"),
    ],
)
def test_the_mac_filter_is_on_the_path_where_macs_are_checked(pair: PairReport, name: str) -> None:
    assert _named(_explained(**_FOUND, pair=pair), "MAC filter").name == name


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        ("required", "required"),
        (True, "on"),
        (("keystone", "vault"), "keystone, vault"),
        ((), "none"),
        (None, "as in the settings"),
    ],
)
def test_rules_that_a_scope_sets_are_on_the_path(value: Any, spelled: str) -> None:
    rules = (RuleInForce("rule", value, "host"), RuleInForce("endpoint", True, "default"))
    policy = PolicyInForce(rules, 0, None, boot_over=True, reopened_at=None, word="")
    step = _named(_explained(**_FOUND, rules=policy), "Policy")
    assert step.lines == (f"rule: {spelled} (host)",)


# Identity tokens


def test_texts_of_a_captured_process_are_escaped_on_a_guest_s_page() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    last = {"at": 1, "outcome": hostile, "token_id": hostile, "expires_at": 2}
    last |= {"ready_id": hostile, "ready_until": 3}
    audience = {"audience": hostile, "allowed": False, "keystone": True}
    use = {
        "network": hostile,
        "addresses": [hostile],
        "requests": [{"method": "PUT", "path": hostile, "allowed": False, "why": hostile}],
        "audiences": [{**audience, "last": last, "reason": hostile}],
        "origin": hostile,
        "problem": hostile,
    }
    template = make_environment().get_template("identity.html")
    html = template.render(identity={"enabled": True, "networks": [use]})
    assert "<img" not in html
    assert html.count("&lt;img") == 11


# Problems


async def _troubles(one: Parts) -> list[tuple[str, str]]:
    report = asdict(await report_status(one))
    return [(each.level, f"{each.where}: {each.what}") for each in list_troubles(report)]


async def test_where_nothing_is_wrong_there_is_no_problem(tmp_path: Path) -> None:
    with idle_controller(tmp_path) as controller:
        assert await _troubles(controller) == []


async def test_everything_that_the_status_names_is_a_problem_and_what_guests_notice_comes_first(
    tmp_path: Path,
) -> None:
    with busy_controller(tmp_path) as controller:
        other = Instance(
            InstanceId("other"),
            "other",
            "other",
            ports=(Port(NetworkId("blue"), None, (ip_address("10.0.0.3"),)),),
        )
        controller.records.observe(Observation("neutron", instances={other.id: other}))
        found = await _troubles(controller)
    text = "\n".join(f"{level} {what}" for level, what in found)
    for part in (
        "bad red: not served: nginx has port 80",
        "bad last plan: red: no device",
        "bad address blue/10.0.0.3: claimed by other of neutron, b of sqlite",
        "bad source sqlite: name is empty",
        "bad source neutron: has not answered for 12 s",
        "warn red: 3 requests with an address of one and the MAC of another",
        "warn policy: policy.networks.bleu",
        "warn audit log: /x: disk full",
    ):
        assert part in text
    levels = [level for level, _ in found]
    assert levels == sorted(levels)


# Secrets


@pytest.mark.parametrize(
    "path",
    [
        "/latest/user-data",
        "/2009-04-04/user-data/",
        "/latest//user-data?x",
        "/latest/user%2ddata",
        "/openstack/latest/user_data",
        "/openstack/latest/vendor_data2.json",
        "/openstack/2013-04-04/password",
        "/nocloud/vendor-data",
        "/latest/meta-data/../user-data",
    ],
)
def test_documents_that_are_secrets_are_known_however_they_are_spelled(path: str) -> None:
    assert is_secret(path)


@pytest.mark.parametrize("path", ["/", "/latest/meta-data/", "/openstack/latest/meta_data.json"])
def test_other_documents_are_shown(path: str) -> None:
    assert not is_secret(path)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ('{"random_seed": "YWI=", "x": 1}', '{"random_seed": "(hidden)", "x": 1}'),
        ('{"admin_pass": "a\\"b", "x": "c"}', '{"admin_pass": "(hidden)", "x": "c"}'),
        ("ssh-rsa AAAAB3NzaC1yc2EAAAADAQ== a@b", "ssh-rsa (hidden) a@b"),
        ("ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTIt", "ecdsa-sha2-nistp256 (hidden)"),
        ("hostname: ssh-gateway", "hostname: ssh-gateway"),
    ],
)
def test_keys_and_passwords_in_documents_are_masked(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked


# Texts and lines


def test_code_in_help_is_marked_and_everything_in_it_escaped() -> None:
    template = make_environment().from_string("{{ text | code }}")
    text = "take `a<b>` not <i> `c"
    assert template.render(text=text) == "take <code>a&lt;b&gt;</code> not &lt;i&gt; <code>c</code>"


def test_a_name_that_no_page_gives_is_an_error_and_not_a_blank() -> None:
    with pytest.raises(Exception, match="undefined"):
        make_environment().from_string("{{ nothing }}").render()


def test_the_line_of_requests_ends_at_the_right_and_stays_in_its_picture() -> None:
    points = [tuple(map(float, one.split(","))) for one in draw_line([0, 5, 10, 5], 10).split()]
    assert points[-1][0] == WIDTH
    assert [y for _, y in points][0::2] == [HEIGHT - 2, 2]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_only_the_last_numbers_of_the_last_guests_are_kept() -> None:
    rates = Rates()
    for number in range(200):
        kept = rates.add("busy", number)
        rates.add(f"other-{number}", 1)
    assert (len(kept), kept[-1]) == (90, 199)
    assert len(rates.add("other-1", 7)) == 1
