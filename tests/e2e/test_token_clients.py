"""Genuine clients where session tokens are optional, required and off: they get their values, or fail as documented.

They run as a guest: in its network namespace, with no way to anything but the metadata service. Its EC2 tree has no
`iam/`, so credentials are shown as far as they go: the clients ask with their token, and are told that there are none.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from support.daemon import instance, user_data_of
from support.guest import Guest
from support.lab import until, within
from support.world import World, open_world

pytestmark = pytest.mark.root

_ZONE: Final = "eu-west-1a"
_REGION: Final = "eu-west-1"
_INSTANCE_ID: Final = "i-c81da598eaef5cb7a"
_IN_REGION_S: Final = 1.1
_CROSS_REGION_S: Final = 3.1
_NOTHING: Final[Mapping[str, str]] = {}
_V2_ONLY: Final = {"AWS_EC2_METADATA_V1_DISABLED": "true"}
_AWS: Final = Path(sys.executable).with_name("aws")
_ANSWER: Final = re.compile(r'http://169\.254\.169\.254:80 "([A-Z]+) (/\S+) HTTP/1\.1" ([0-9]+)')
_TOKEN: Final = ("PUT", "/latest/api/token", "200")
_NO_TOKEN: Final = ("PUT", "/latest/api/token", "404")
_ROLE: Final = ("GET", "/latest/meta-data/iam/security-credentials/", "404")
_ZONE_SAID: Final = ("GET", "/latest/meta-data/placement/availability-zone/", "200")

_BOTOCORE: Final = """
import json, sys
from botocore.exceptions import MetadataRetrievalError
from botocore.utils import IMDSFetcher, InstanceMetadataFetcher, InstanceMetadataRegionFetcher

config = json.loads(sys.argv[1])
found = {}
token = IMDSFetcher(config=config)._fetch_metadata_token()
found["token"] = token is not None

def ask(name, read):
    try:
        found[name] = read()
    except MetadataRetrievalError:
        found[name] = "refused by botocore"
    except IMDSFetcher._RETRIES_EXCEEDED_ERROR_CLS:
        found[name] = "no good answer"

get = lambda path: IMDSFetcher(config=config)._get_request(path, None, token).text
ask("instance_id", lambda: get("latest/meta-data/instance-id"))
ask("user_data", lambda: get("latest/user-data"))
ask("region", InstanceMetadataRegionFetcher(config=config).retrieve_region)
ask("credentials", InstanceMetadataFetcher(config=config).retrieve_iam_role_credentials)
print(json.dumps(found))
"""

_BOTO3: Final = """
import json, logging, sys
import boto3
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
session = boto3.Session()
try:
    credentials = session.get_credentials()
except Exception as error:
    credentials = type(error).__name__
# With AWS_DEFAULTS_MODE=auto its timeout depends on whether the metadata says that the guest is in this region.
given = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
client = session.client("s3", region_name=sys.argv[1], **given)
print(json.dumps([credentials, client.meta.config.connect_timeout]))
"""

_EC2_METADATA: Final = """
import json
from ec2_metadata import ec2_metadata as guest
(interface,) = guest.network_interfaces.values()
print(json.dumps({
    "instance_id": guest.instance_id,
    "zone": guest.availability_zone,
    "hostname": guest.private_hostname,
    "addresses": [guest.private_ipv4, *interface.private_ipv4s, *interface.ipv6s],
    "mac": guest.mac,
    "tags": dict(guest.tags),
    "user_data": guest.user_data.decode(),
    "role": guest.iam_info,
    "public": guest.public_ipv4,
}))
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world() as made:
        fields = {"availability_zone": _ZONE, "tags": {"color": "red"}}
        made.daemon.put(instances=[instance("red-5", "red", fields=fields)])
        yield made


def _say(world: World, mode: str) -> None:
    world.daemon.reconfigure({"policy": {"host": {"tokens": mode}}})


def _run(
    guest: Guest, *argv: str | Path, home: Path, environment: Mapping[str, str] = _NOTHING
) -> subprocess.CompletedProcess[str]:
    """Run a program as a guest, with nothing of ours around it."""
    bare = {"HOME": str(home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    return subprocess.run(
        (*within(guest.namespace), *argv),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**bare, **environment},
    )


def _told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _answers(log: str) -> set[tuple[str, str, str]]:
    """Method, path and status of each request to the metadata service, as botocore's log tells them."""
    return {(method, path, status) for method, path, status in _ANSWER.findall(log)}


def _botocore(guest: Guest, home: Path, *, v1_disabled: bool) -> dict[str, Any]:
    config = json.dumps({"ec2_metadata_v1_disabled": v1_disabled})
    return _told(_run(guest, sys.executable, "-c", _BOTOCORE, config, home=home))


_BOTOCORE_GETS: Final = {
    "instance_id": _INSTANCE_ID,
    "user_data": user_data_of("red-5").decode(),
    "region": _REGION,
    "credentials": {},
}


@pytest.mark.parametrize("v1_disabled", [True, False])
@pytest.mark.parametrize("mode", ["optional", "required"])
def test_botocore_gets_a_token_and_its_values(
    world: World, tmp_path: Path, mode: str, *, v1_disabled: bool
) -> None:
    _say(world, mode)
    told = _botocore(world.red, tmp_path, v1_disabled=v1_disabled)
    assert told == {"token": True, **_BOTOCORE_GETS}


@pytest.mark.parametrize(("attempts", "told"), [(1, False), (2, True)])
def test_botocore_that_asks_twice_survives_the_503_of_a_guest_that_is_not_known_yet(
    world: World, tmp_path: Path, attempts: int, *, told: bool
) -> None:
    """By default it asks once, and then without a token, which is served unless one is required."""
    world.daemon.reconfigure({"policy": {"networks": {"red": {"hop_limit": 2}}}})
    ttl = ("X-aws-ec2-metadata-token-ttl-seconds: 60",)
    until(
        lambda: world.red.ask("/latest/api/token", method="PUT", headers=ttl).status == 200,
        what="the rule",
    )
    number = 90 + attempts
    guest = world.lab.guest("red", number)
    ports = {"ports": [{"network": "red", "mac": guest.mac}]}
    world.daemon.put(instances=[instance(f"red-{number}", "red", number, fields=ports)])
    config = json.dumps(
        {"ec2_metadata_v1_disabled": False, "metadata_service_num_attempts": attempts}
    )
    ask = _BOTOCORE.replace(
        "IMDSFetcher(config=config)", f"IMDSFetcher(num_attempts={attempts}, config=config)"
    )
    found = _told(_run(guest, sys.executable, "-c", ask, config, home=tmp_path))
    assert found["token"] is told
    assert found["user_data"] == user_data_of(f"red-{number}").decode()


def test_with_tokens_off_botocore_falls_back_and_gets_the_same(
    world: World, tmp_path: Path
) -> None:
    _say(world, "off")
    told = _botocore(world.red, tmp_path, v1_disabled=False)
    assert told == {"token": False, **_BOTOCORE_GETS}


def test_with_tokens_off_botocore_that_may_not_fall_back_asks_nothing(
    world: World, tmp_path: Path
) -> None:
    _say(world, "off")
    told = _botocore(world.red, tmp_path, v1_disabled=True)
    assert told == {"token": False, **dict.fromkeys(_BOTOCORE_GETS, "refused by botocore")}


def _boto3(
    guest: Guest, region: str, home: Path, environment: Mapping[str, str] = _NOTHING
) -> tuple[object, set[tuple[str, str, str]]]:
    auto = {"AWS_DEFAULTS_MODE": "auto", **environment}
    done = _run(guest, sys.executable, "-c", _BOTO3, region, home=home, environment=auto)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), _answers(done.stderr)


@pytest.mark.parametrize("environment", [_NOTHING, _V2_ONLY], ids=["may-fall-back", "may-not"])
def test_boto3_knows_its_region_and_that_it_has_no_role(
    world: World, tmp_path: Path, environment: Mapping[str, str]
) -> None:
    _say(world, "required")
    asked = {_TOKEN, _ROLE, _ZONE_SAID}
    assert _boto3(world.red, _REGION, tmp_path, environment) == ([None, _IN_REGION_S], asked)
    elsewhere = [None, _CROSS_REGION_S]
    assert _boto3(world.red, "us-west-2", tmp_path, environment) == (elsewhere, asked)


def test_with_tokens_off_boto3_falls_back_and_knows_the_same(world: World, tmp_path: Path) -> None:
    _say(world, "off")
    asked = {_NO_TOKEN, _ROLE, _ZONE_SAID}
    assert _boto3(world.red, _REGION, tmp_path) == ([None, _IN_REGION_S], asked)


def test_with_tokens_off_boto3_that_may_not_fall_back_says_so(world: World, tmp_path: Path) -> None:
    _say(world, "off")
    told = ["MetadataRetrievalError", _CROSS_REGION_S]
    assert _boto3(world.red, _REGION, tmp_path, _V2_ONLY) == (told, {_NO_TOKEN})


@pytest.mark.parametrize("mode", ["optional", "required"])
def test_ec2_metadata_reads_its_values(world: World, tmp_path: Path, mode: str) -> None:
    _say(world, mode)
    assert _told(_run(world.red, sys.executable, "-c", _EC2_METADATA, home=tmp_path)) == {
        "instance_id": _INSTANCE_ID,
        "zone": _ZONE,
        "hostname": "red-5",
        "addresses": ["10.0.0.5", "10.0.0.5", "2001:db8::5"],
        "mac": world.red.mac,
        "tags": {"color": "red"},
        "user_data": user_data_of("red-5").decode(),
        "role": None,
        "public": None,
    }


def test_with_tokens_off_ec2_metadata_reads_nothing(world: World, tmp_path: Path) -> None:
    """It knows no other way, as real EC2 has none without tokens."""
    _say(world, "off")
    done = _run(world.red, sys.executable, "-c", _EC2_METADATA, home=tmp_path)
    assert done.returncode != 0
    assert "Failed to fetch token: 404" in done.stderr


def _aws(
    guest: Guest, *words: str, home: Path, environment: Mapping[str, str] = _NOTHING
) -> subprocess.CompletedProcess[str]:
    return _run(guest, sys.executable, _AWS, *words, "--debug", home=home, environment=environment)


@pytest.mark.parametrize("environment", [_NOTHING, _V2_ONLY], ids=["may-fall-back", "may-not"])
def test_the_aws_command_line_looks_for_a_role_with_a_token(
    world: World, tmp_path: Path, environment: Mapping[str, str]
) -> None:
    _say(world, "required")
    done = _aws(world.red, "configure", "list", home=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"access_key +<not set>", done.stdout)
    assert _answers(done.stderr) == {_TOKEN, _ROLE}


def test_the_aws_command_line_looks_for_its_region_with_a_token(
    world: World, tmp_path: Path
) -> None:
    _say(world, "required")
    environment = {"AWS_DEFAULTS_MODE": "auto", "AWS_MAX_ATTEMPTS": "1", **_V2_ONLY}
    nowhere = ("--region", _REGION, "--no-sign-request", "--endpoint-url", "http://169.254.169.1:9")
    words = ("s3api", "list-buckets", *nowhere)
    done = _aws(world.red, *words, home=tmp_path, environment=environment)
    assert _answers(done.stderr) == {_TOKEN, _ZONE_SAID}


def test_with_tokens_off_the_aws_command_line_falls_back_where_it_may(
    world: World, tmp_path: Path
) -> None:
    _say(world, "off")
    done = _aws(world.red, "configure", "list", home=tmp_path)
    assert (done.returncode, _answers(done.stderr)) == (0, {_NO_TOKEN, _ROLE})
    done = _aws(world.red, "configure", "list", home=tmp_path, environment=_V2_ONLY)
    assert _answers(done.stderr) == {_NO_TOKEN}
    assert "IMDSv1 has been disabled" in done.stderr


def test_where_tokens_are_required_who_sends_none_is_told_401(world: World) -> None:
    """So that what is tested above is not served to just anybody."""
    _say(world, "required")
    assert world.red.ask("/latest/meta-data/placement/availability-zone/").status == 401
