from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imdsproxy.cli.checks import Subject
from imdsproxy.cli.checks.guests import (
    check_hop_limits,
    check_overrides,
    check_path_rules,
    check_token_keys,
    check_trees,
)
from imdsproxy.core.tokens import TokenKey, render_token_keys
from support.check_subject import subject


def _on(**policy: object) -> Subject:
    return subject({"policy": policy})


_OPEN = {"tokens": "required"}


_LOCKED = {"openstack_tokens": "required", "nocloud_tokens": "required"}


_DENIED = {"/latest/user-data": "deny"}
_LOCKED_PATHS = {"/openstack/latest/user_data": "required", "/nocloud/user-data": "deny"}
_GIVE = "/openstack and /nocloud give the same"


@pytest.mark.parametrize(
    ("policy", "text", "hint"),
    [
        ({"host": _OPEN}, f"policy.host: EC2's tree takes a token, and {_GIVE} user-data without",
         "openstack_tokens: required and nocloud_tokens: required ("),
        ({"host": {**_OPEN, "openstack_tokens": "required"}},
         "policy.host: EC2's tree takes a token, and /nocloud gives the same user-data without",
         "nocloud_tokens: required ("),
        ({"projects": {"p": {"paths": _DENIED}}}, f"policy.projects.p: /latest/user-data is denied, and {_GIVE}",
         "paths: {/openstack/latest/user_data: deny, /nocloud/user-data: deny}, "),
        ({"host": {"paths": _LOCKED_PATHS}}, "policy.host: /nocloud/user-data is denied, and EC2's tree gives the same",
         "paths: {/latest/user-data: deny}, "),
    ],
)  # fmt: skip
def test_user_data_that_one_tree_keeps_and_another_gives_is_warned_of_with_what_closes_it(
    policy: dict[str, Any], text: str, hint: str
) -> None:
    (finding,) = check_trees(_on(**policy))
    assert (finding.ok, finding.warning, finding.text) == (True, True, text)
    assert finding.hint.startswith(hint)


def _host(**rules: object) -> dict[str, Any]:
    return {"host": rules}


@pytest.mark.parametrize(
    ("policy", "places"),
    [
        ({}, []),
        (_host(tokens="optional"), []),
        (_host(**_OPEN, **_LOCKED), []),
        (_host(**_OPEN, seal_user_data=True), []),
        (_host(**_OPEN, endpoint=False), []),
        # What the host says holds in a network that says the rest.
        ({"host": _LOCKED, "networks": {"red": _OPEN}}, []),
        ({"host": _OPEN, "networks": {"red": _LOCKED}}, ["policy.host"]),
        ({"host": _OPEN, "networks": {"red": {"hop_limit": 1}}}, ["policy.host"]),
        ({"host": {**_OPEN, **_LOCKED}, "networks": {"red": {"nocloud_tokens": "optional"}}}, ["policy.networks.red"]),
        ({**_host(**_OPEN, seal_user_data=True), "projects": {"p": {"seal_user_data": False}}}, ["policy.projects.p"]),
        *(
            ({one: {"red": _OPEN, "green": {**_OPEN, **_LOCKED}, "blue": {"hop_limit": 1}}}, [f"policy.{one}.red"])
            for one in ("networks", "projects", "instances")
        ),
        (_host(paths={**_DENIED, **_LOCKED_PATHS}), []),
        (_host(paths={"/latest/user-data": "required", **_LOCKED_PATHS}), []),
        (_host(paths={"/latest/user-data": "required"}), ["policy.host"]),
        (_host(tokens="required", paths=_LOCKED_PATHS), []),
        (_host(tokens="required", paths={"/latest/user-data": "optional"}), []),
        (_host(**_OPEN, **_LOCKED, paths={"/nocloud": "optional"}), ["policy.host"]),
        (_host(**_OPEN, **_LOCKED, paths={"/nocloud": "allow"}), []),
        (_host(seal_user_data=True, paths=_DENIED), []),
        (_host(endpoint=False, paths=_DENIED), []),
        # Whole trees that are denied are turned off: nothing is meant to be kept by that.
        (_host(paths={"/nocloud": "deny", "/openstack": "deny"}), []),
        (_host(paths={"/": "deny", "/latest/meta-data": "allow"}), []),
    ],
)  # fmt: skip
def test_each_scope_that_leaves_a_tree_open_is_named_once(
    policy: dict[str, Any], places: list[str]
) -> None:
    assert [one.text.partition(":")[0] for one in check_trees(_on(**policy))] == places


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
    assert check_path_rules(_on(host={"paths": served})) == []
    found = check_path_rules(_on(networks={"red": {"paths": {**served, **never}}}))
    assert [one.text for one in found] == [
        f"policy.networks.red.paths: nothing is ever served at {path} or beneath it"
        for path in sorted(never)
    ]
    assert all(one.warning and one.hint for one in found)


def test_a_hop_limit_does_nothing_behind_the_unix_listener() -> None:
    networks = {"red": {"hop_limit": 64}, "blue": {"hop_limit": 1}}
    policy = {"host": {"hop_limit": 2}, "networks": networks}
    found = check_hop_limits(subject({"policy": policy, "unix_listener": {"enabled": True}}))
    assert [one.text.partition(" does nothing")[0] for one in found] == [
        "policy.host: hop_limit 2",
        "policy.networks.blue: hop_limit 1",
    ]
    assert all(one.warning and one.hint for one in found)
    assert check_hop_limits(_on(**policy)) == []
    assert check_hop_limits(subject({"unix_listener": {"enabled": True}})) == []


_TWO = render_token_keys([TokenKey(b"k" * 32), TokenKey(b"l" * 32)])


@pytest.mark.parametrize(
    ("content", "mode", "status", "warning", "text", "hint"),
    [
        (_TWO, 0o600, 0, False, "2 keys in ", ""),
        (_TWO, 0o640, 0, True, "a group can use ", "chmod 0600"),
        (_TWO, 0o644, 78, False, "tokens.key_file: ", "chmod o-rwx"),
        ("s3cret\n", 0o600, 78, False, "line 1", ""),
        (None, 0, 78, False, "tokens.key_file: cannot read", "create it"),
    ],
)
def test_a_file_of_keys_is_for_root_alone_and_never_shown(
    tmp_path: Path,
    content: str | None,
    mode: int,
    *,
    status: int,
    warning: bool,
    text: str,
    hint: str,
) -> None:
    named, default = tmp_path / "keys", subject({"paths": {"state_dir": str(tmp_path)}})
    subjects = [(named, subject({"tokens": {"key_file": str(named)}}))]
    if content is not None:
        subjects.append((default.layout.token_keys, default))
    for path, on in subjects:
        if content is not None:
            path.write_text(content)
            path.chmod(mode)
        (finding,) = check_token_keys(on)
        assert (finding.exit_status, finding.warning) == (status, warning)
        assert text in finding.text
        assert hint in finding.hint
        for secret in (TokenKey(b"k" * 32).text, "s3cret"):
            assert secret not in finding.text + finding.hint


def test_the_first_key_is_made_at_the_start(tmp_path: Path) -> None:
    on = subject({"paths": {"state_dir": str(tmp_path)}})
    (made,) = check_token_keys(on)
    assert (made.ok, made.text) == (True, f"the first key will be made in {on.layout.token_keys}")


def test_a_damaged_file_of_overrides_is_found_before_the_start(tmp_path: Path) -> None:
    on = subject({"paths": {"state_dir": str(tmp_path)}})
    path = on.layout.guards
    assert check_overrides(on) == []
    path.write_text('{"format": 1, "instances": {"web": [1, 0]}}')
    (fine,) = check_overrides(on)
    assert (fine.ok, fine.warning, "1 instance" in fine.text) == (True, False, True)
    path.write_text("{")
    (damaged,) = check_overrides(on)
    assert damaged.exit_status == 71
    assert f"{path} is damaged" in damaged.text
