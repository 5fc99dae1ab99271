"""Genuine clients where session tokens are optional, required and off: they get their values, or fail as documented.

They run as a guest: in its network namespace, with no way to anything but the metadata service. Its EC2 tree has no
`iam/`, so credentials are shown as far as they go: the clients ask with their token, and find that there are none.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from support.daemon import instance, user_data_of
from support.demonstration import REPOSITORY
from support.document_blocks import blocks_of
from support.lab import within
from support.world import World, open_world

pytestmark = pytest.mark.root

_ZONE: Final = "eu-west-1a"
_REGION: Final = "eu-west-1"
_INSTANCE_ID: Final = "i-c81da598eaef5cb7a"
_IN_REGION_S: Final = 1.1
_CROSS_REGION_S: Final = 3.1
_PAGE: Final = REPOSITORY / "docs/explanation/tokens.md"
_V2_ONLY: Final = {"AWS_EC2_METADATA_V1_DISABLED": "true"}
_ANSWER: Final = re.compile(r'http://169\.254\.169\.254:80 "([A-Z]+) (/\S+) HTTP/1\.1" ([0-9]+)')
_TOKEN: Final = ("PUT", "/latest/api/token", "200")
_NO_TOKEN: Final = ("PUT", "/latest/api/token", "404")
_ROLE: Final = ("GET", "/latest/meta-data/iam/security-credentials/", "404")
_ZONE_SAID: Final = ("GET", "/latest/meta-data/placement/availability-zone/", "200")

_BOTOCORE: Final = """
import json, sys
from botocore.exceptions import MetadataRetrievalError
from botocore.utils import IMDSFetcher, InstanceMetadataFetcher, InstanceMetadataRegionFetcher

config = {"ec2_metadata_v1_disabled": sys.argv[1] == "True"}
found = {}
token = IMDSFetcher(config=config)._fetch_metadata_token()
found["token"] = token is not None

def ask(name, read):
    try:
        found[name] = read()
    except MetadataRetrievalError:
        found[name] = "refused by botocore"

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


def _run(
    world: World, mode: str, *argv: str, home: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program as a guest where tokens are in this mode, with nothing of ours around it."""
    world.daemon.reconfigure({"policy": {"host": {"tokens": mode}}})
    return subprocess.run(
        (*within(world.red.namespace), *argv),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **environment},
    )


def _printed(done: subprocess.CompletedProcess[str]) -> object:
    assert done.returncode == 0, done.stderr
    found: object = json.loads(done.stdout)
    return found


def _answers(done: subprocess.CompletedProcess[str]) -> set[tuple[str, str, str]]:
    """Method, path and status of each request to the metadata service, as botocore's log has them."""
    return {(method, path, status) for method, path, status in _ANSWER.findall(done.stderr)}


_BOTOCORE_GETS: Final = {
    "instance_id": _INSTANCE_ID,
    "user_data": user_data_of("red-5").decode(),
    "region": _REGION,
    "credentials": {},
}


@pytest.mark.parametrize("v1_disabled", [True, False])
@pytest.mark.parametrize("mode", ["optional", "required", "off"])
def test_botocore_gets_its_values_with_a_token_or_falls_back_where_it_may(
    world: World, tmp_path: Path, mode: str, *, v1_disabled: bool
) -> None:
    done = _run(world, mode, sys.executable, "-c", _BOTOCORE, str(v1_disabled), home=tmp_path)
    refused = mode == "off" and v1_disabled
    values = dict.fromkeys(_BOTOCORE_GETS, "refused by botocore") if refused else _BOTOCORE_GETS
    assert _printed(done) == {"token": mode != "off", **values}


_ALL: Final = {_ROLE, _ZONE_SAID}


@pytest.mark.parametrize(
    ("way", "found", "asked"),
    [
        (("required", _REGION, {}), [None, _IN_REGION_S], {_TOKEN, *_ALL}),
        (("required", _REGION, _V2_ONLY), [None, _IN_REGION_S], {_TOKEN, *_ALL}),
        (("required", "us-west-2", {}), [None, _CROSS_REGION_S], {_TOKEN, *_ALL}),
        (("off", _REGION, {}), [None, _IN_REGION_S], {_NO_TOKEN, *_ALL}),
        (("off", _REGION, _V2_ONLY), ["MetadataRetrievalError", _CROSS_REGION_S], {_NO_TOKEN}),
    ],
)
def test_boto3_knows_its_region_and_that_it_has_no_role(
    world: World,
    tmp_path: Path,
    way: tuple[str, str, Mapping[str, str]],
    found: list[object],
    asked: set[tuple[str, str, str]],
) -> None:
    mode, region, more = way
    words = (sys.executable, "-c", _BOTO3, region)
    done = _run(world, mode, *words, home=tmp_path, AWS_DEFAULTS_MODE="auto", **more)
    assert (_printed(done), _answers(done)) == (found, asked)


@pytest.mark.parametrize("mode", ["optional", "required", "off"])
def test_ec2_metadata_reads_its_values_with_a_token_and_nothing_without(
    world: World, tmp_path: Path, mode: str
) -> None:
    done = _run(world, mode, sys.executable, "-c", _EC2_METADATA, home=tmp_path)
    if mode == "off":
        assert done.returncode != 0
        assert "Failed to fetch token: 404" in done.stderr
        return
    assert _printed(done) == {
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


def test_where_tokens_are_required_the_pages_two_lines_read_what_is_401_without(
    world: World, tmp_path: Path
) -> None:
    blocks = blocks_of(_PAGE, "# Session tokens, and what a guest may read")
    (script,) = (one.script for one in blocks if one.script.startswith("token="))
    done = _run(world, "required", "/bin/sh", "-euc", script, home=tmp_path)
    assert (done.returncode, done.stdout) == (0, _INSTANCE_ID), done.stderr
    assert world.red.ask("/latest/meta-data/instance-id").status == 401
