from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imdsproxy.cli.checks.tokens import (
    check_guards,
    check_hop_limits,
    check_path_rules,
    check_records_trees,
    check_token_keys,
    check_trees,
)
from imdsproxy.config.schema import Settings
from imdsproxy.core.policy import PolicyBook
from imdsproxy.core.records.document import Records, parse_records
from imdsproxy.core.tokens import TokenKey, render_token_keys


def _book(**policy: object) -> PolicyBook:
    return Settings.model_validate({"policy": policy}).policy.book()


_OPEN = {"tokens": "required"}


def _records(number: int, policy: object) -> Records:
    """So many instances with user-data, all in the network red, whose record has the policy."""
    network = {"id": "red", "listener": {"namespace": "red"}, "policy": policy}
    instances = [
        {
            "id": f"web-{one}",
            "name": "web",
            "ports": [{"network": "red", "addresses": [f"10.0.0.{one + 1}"]}],
            "user_data": "x",
        }
        for one in range(number)
    ]
    found = parse_records({"networks": [network], "instances": instances})
    assert found.all_problems == ()
    return found


_LOCKED = {"openstack_tokens": "required", "nocloud_tokens": "required"}


def test_ec2s_tree_alone_required_is_warned_of_with_the_scope() -> None:
    (finding,) = check_trees(_book(host=_OPEN))
    assert finding.text == (
        "policy.host: EC2's tree takes a token, and /openstack and /nocloud give the same user-data without"
    )
    assert finding.hint.startswith("openstack_tokens: required and nocloud_tokens: required (")
    assert (finding.ok, finding.warning, finding.area) == (True, True, "tokens")
    (half,) = check_trees(_book(host={**_OPEN, "openstack_tokens": "required"}))
    assert "and /nocloud gives the same" in half.text
    assert half.hint.startswith("nocloud_tokens: required (")


def test_a_tree_that_a_record_leaves_open_is_warned_of_with_the_first_few_it_is_of() -> None:
    (finding,) = check_records_trees([_records(9, _OPEN)], _book())
    assert finding.text == (
        "user-data is open beside a tree that keeps it: "
        "/openstack of web-0 in red, /nocloud of web-0 in red, /openstack of web-1 in red and 15 more"
    )
    assert (finding.ok, finding.warning, finding.area) == (True, True, "tokens")
    (few,) = check_records_trees([_records(1, _OPEN)], _book(host={"openstack_tokens": "required"}))
    assert few.text.endswith(": /nocloud of web-0 in red")
    for policy, host in (({}, {}), ({**_OPEN, **_LOCKED}, {}), (_OPEN, _LOCKED)):
        assert check_records_trees([_records(9, policy)], _book(host=host)) == []


@pytest.mark.parametrize("section", ["networks", "projects", "instances"])
def test_each_scope_that_leaves_a_tree_open_is_named(section: str) -> None:
    scopes = {"red": _OPEN, "green": {**_OPEN, **_LOCKED}, "blue": {"hop_limit": 1}}
    found = check_trees(_book(**{section: scopes}))
    assert [one.text.partition(":")[0] for one in found] == [f"policy.{section}.red"]


@pytest.mark.parametrize(
    ("policy", "places"),
    [
        ({}, []),
        ({"host": {"tokens": "optional"}}, []),
        ({"host": {**_OPEN, **_LOCKED}}, []),
        ({"host": {**_OPEN, "seal_user_data": True}}, []),
        ({"host": {**_OPEN, "endpoint": False}}, []),
        # What the host says holds in a network that says the rest.
        ({"host": _LOCKED, "networks": {"red": _OPEN}}, []),
        ({"host": _OPEN, "networks": {"red": _LOCKED}}, ["policy.host"]),
        ({"host": _OPEN, "networks": {"red": {"hop_limit": 1}}}, ["policy.host"]),
        (
            {"host": {**_OPEN, **_LOCKED}, "networks": {"red": {"nocloud_tokens": "optional"}}},
            ["policy.networks.red"],
        ),
        (
            {
                "host": {**_OPEN, "seal_user_data": True},
                "projects": {"p": {"seal_user_data": False}},
            },
            ["policy.projects.p"],
        ),
    ],
)
def test_nobody_is_warned_of_what_is_locked_or_was_said_already(
    policy: dict[str, Any], places: list[str]
) -> None:
    found = check_trees(_book(**policy))
    assert [one.text.partition(":")[0] for one in found] == places


_DENIED = {"/latest/user-data": "deny"}
_LOCKED_PATHS = {"/openstack/latest/user_data": "required", "/nocloud/user-data": "deny"}


def test_user_data_that_is_denied_in_one_tree_and_given_in_another_is_warned_of() -> None:
    (finding,) = check_trees(_book(projects={"p": {"paths": _DENIED}}))
    assert finding.text == (
        "policy.projects.p: /latest/user-data is denied, and /openstack and /nocloud give the same"
    )
    assert finding.hint.startswith(
        "paths: {/openstack/latest/user_data: deny, /nocloud/user-data: deny}, "
    )
    assert finding.warning
    (other,) = check_trees(_book(host={"paths": _LOCKED_PATHS}))
    assert other.text == "policy.host: /nocloud/user-data is denied, and EC2's tree gives the same"


@pytest.mark.parametrize(
    ("policy", "warned"),
    [
        ({"paths": {**_DENIED, **_LOCKED_PATHS}}, False),
        ({"paths": {"/latest/user-data": "required", **_LOCKED_PATHS}}, False),
        ({"paths": {"/latest/user-data": "required"}}, True),
        ({"tokens": "required", "paths": _LOCKED_PATHS}, False),
        ({"tokens": "required", "paths": {"/latest/user-data": "optional"}}, False),
        ({**_OPEN, **_LOCKED, "paths": {"/nocloud": "optional"}}, True),
        ({**_OPEN, **_LOCKED, "paths": {"/nocloud": "allow"}}, False),
        ({"seal_user_data": True, "paths": _DENIED}, False),
        ({"endpoint": False, "paths": _DENIED}, False),
        # Whole trees that are denied are turned off: nothing is meant to be kept by that.
        ({"paths": {"/nocloud": "deny", "/openstack": "deny"}}, False),
        ({"paths": {"/": "deny", "/latest/meta-data": "allow"}}, False),
    ],
)
def test_what_is_said_of_paths_keeps_user_data_or_leaves_it_open(
    policy: dict[str, Any], *, warned: bool
) -> None:
    assert bool(check_trees(_book(host=policy))) is warned


def test_a_rule_for_a_path_that_nothing_has_is_warned_of() -> None:
    served = {
        "/": "allow",
        "/latest": "allow",
        "/latest/meta-data/public-keys/0/openssh-key": "deny",
        "/latest/meta-data/block-device-mapping/ami": "deny",
        "/latest/dynamic/instance-identity/document": "deny",
        "/openstack/content/0000": "deny",
        "/openstack/latest/vendor_data2.json": "deny",
        "/nocloud/network-config": "deny",
    }
    never = {
        "/latest/meta-data/iam": "deny",
        "/latest/userdata": "deny",
        "/latest/user-data/x": "deny",
        "/openstack/latest/user-data": "deny",
        "/nocloud/user_data": "deny",
        "/latest/api": "deny",
    }
    assert check_path_rules(_book(host={"paths": served})) == []
    found = check_path_rules(_book(networks={"red": {"paths": {**served, **never}}}))
    assert [one.text for one in found] == [
        f"policy.networks.red.paths: nothing is ever served at {path} or beneath it"
        for path in sorted(never)
    ]
    assert all(one.warning and one.hint for one in found)


def test_a_hop_limit_does_nothing_behind_the_unix_listener() -> None:
    book = _book(
        host={"hop_limit": 2}, networks={"red": {"hop_limit": 64}, "blue": {"hop_limit": 1}}
    )
    found = check_hop_limits(book, unix_listener=True)
    assert [one.text.partition(" does nothing")[0] for one in found] == [
        "policy.host: hop_limit 2",
        "policy.networks.blue: hop_limit 1",
    ]
    assert all(one.warning and one.hint for one in found)
    assert check_hop_limits(book, unix_listener=False) == []
    assert check_hop_limits(_book(), unix_listener=True) == []


def _settings(path: Path | None = None) -> Settings:
    return Settings.model_validate({"tokens": {"key_file": None if path is None else str(path)}})


def _keys(path: Path, mode: int = 0o600) -> Path:
    path.write_text(render_token_keys([TokenKey(b"k" * 32), TokenKey(b"l" * 32)]))
    path.chmod(mode)
    return path


def test_keys_that_are_roots_alone_are_counted(tmp_path: Path) -> None:
    path = _keys(tmp_path / "keys")
    for settings, default in ((_settings(path), tmp_path / "none"), (_settings(), path)):
        (finding,) = check_token_keys(settings, default)
        assert (finding.ok, finding.warning, finding.text) == (True, False, f"2 keys in {path}")


def test_the_first_key_is_made_and_a_file_that_settings_name_has_to_be_there(
    tmp_path: Path,
) -> None:
    path = tmp_path / "keys"
    (made,) = check_token_keys(_settings(), path)
    assert (made.ok, made.text) == (True, f"the first key will be made in {path}")
    (missing,) = check_token_keys(_settings(path), tmp_path / "other")
    assert missing.exit_status == 78
    assert missing.text.startswith("tokens.key_file: cannot read")
    assert missing.hint


@pytest.mark.parametrize(
    ("mode", "status", "hint"), [(0o640, 0, "chmod 0600"), (0o644, 78, "chmod o-rwx")]
)
def test_keys_that_others_can_read_are_told_of_without_their_bytes(
    tmp_path: Path, mode: int, status: int, hint: str
) -> None:
    path = _keys(tmp_path / "keys", mode)
    (finding,) = check_token_keys(_settings(path), path)
    assert (finding.exit_status, finding.warning) == (status, status == 0)
    assert hint in finding.hint
    assert TokenKey(b"k" * 32).text not in finding.text + finding.hint


def test_a_file_that_holds_no_key_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("s3cret\n")
    path.chmod(0o600)
    (finding,) = check_token_keys(_settings(), path)
    assert finding.exit_status == 78
    assert "line 1" in finding.text
    assert "s3cret" not in finding.text


def test_a_damaged_guard_file_is_found_before_the_start(tmp_path: Path) -> None:
    path = tmp_path / "guards.json"
    assert check_guards(path) == []
    path.write_text('{"format": 1, "instances": {"web": [1, 0]}}')
    (fine,) = check_guards(path)
    assert (fine.ok, fine.warning, "1 instance" in fine.text) == (True, False, True)
    path.write_text("{")
    (damaged,) = check_guards(path)
    assert damaged.exit_status == 71
    assert f"{path} is damaged" in damaged.text
