"""The how-to page of Keystone, followed with genuine Keystone, Apache, openstackclient and openstacksdk."""

import contextlib
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import pytest

from support.document_blocks import Block, missing_lines
from support.identity.keystone import AUDIENCE, Keystone
from support.identity.keystone_site import open_keystone_of
from support.identity.rotation import signer_pid
from support.identity.site import OTHER_PROJECT, PROJECT, Site
from support.lab import until
from support.world import World

pytestmark = [pytest.mark.root, pytest.mark.slow]

_PAGE: Final = "identity-keystone.md"


@pytest.fixture(scope="module")
def shared_world(shared_site: Site) -> World:
    return shared_site.world


@pytest.fixture
def keystone(site: Site) -> Iterator[Keystone]:
    with open_keystone_of(site) as made:
        site.variables = made.administer("admin")
        yield made


def _token(site: Site) -> str:
    """Return what `openstack` in the guest prints of a new token of Keystone."""
    return site.run("openstack --os-cloud me token issue", in_guest=True).stdout


def _is_alive(site: Site) -> bool:
    """Return whether Keystone still takes the token in the file `token`."""
    script = (
        f"OS_TOKEN=$(cat token) OS_AUTH_TYPE=token OS_PROJECT_ID={PROJECT} "
        "OS_AUTH_URL=https://keystone.example:5000/v3 "
        "OS_CACERT=/etc/ssl/certs/ca-certificates.crt openstack token issue"
    )
    return site.run(script, in_guest=True).returncode == 0


def _keep_token(site: Site) -> None:
    script = "openstack --os-cloud me token issue -f value -c id >token"
    site.succeed(script, in_guest=True)
    assert _is_alive(site)


@pytest.mark.usefixtures("keystone")
def test_a_guest_uses_openstack_as_the_page_says_until_the_trust_ends(site: Site) -> None:
    site.follow(
        _PAGE,
        "## Keystone takes the issuer's tokens",
        "## imdsproxy gives tokens for Keystone",
        "## The guest uses OpenStack",
    )
    _keep_token(site)
    site.follow(_PAGE, "### For one project")
    assert "HTTP 404" in _token(site)
    assert not _is_alive(site)
    for script in ("sh mapping.sh", "sh audience.sh"):
        site.succeed(script)
    until(lambda: PROJECT in _token(site), what="a token again")
    _keep_token(site)
    site.follow(_PAGE, "### For all guests")
    assert not _is_alive(site)
    assert "HTTP 401" in _token(site)
    site.succeed("rm /etc/imdsproxy/conf.d/*; imdsproxy reload --allow-dropped")


def test_the_page_names_the_reason_of_each_refusal(site: Site, keystone: Keystone) -> None:
    def allow(audience: str) -> None:
        site.world.have_policy({"host": {"audiences": [audience]}})

    def lose_the_signer() -> None:
        """Stop the signer until the controller replaces it; of a new project, no token is cached."""
        allow(AUDIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.kill(signer_pid(site.world), signal.SIGSTOP)
        site.have_guest(uuid.uuid4().hex)

    def lose_the_role() -> None:
        site.have_guest()
        site.succeed(
            f"openstack role remove reader --group vm-{PROJECT} --group-domain default --project {PROJECT}",
        )

    def change_apache(change: str) -> None:
        site.succeed("sh mapping.sh")
        site.succeed(f"sed --in-place {change} /etc/apache2/conf-enabled/imds.conf")
        site.succeed("systemctl restart apache2 keystone")

    def change_issuer() -> None:
        change_apache("s/aud:other/aud:keystone/")
        site.succeed("openstack identity provider set imds --remote-id https://before.example")

    def is_seen(failure: str, cause: Callable[[], object] | None) -> bool:
        if cause is not None:
            cause()
        return not missing_lines(Block(0, "", (failure,)), _token(site))

    site.follow(_PAGE, "## Keystone takes the issuer's tokens")
    site.succeed(
        f"imdsproxy identity setup keystone --part guest --project {PROJECT} --url {keystone.url} |"
        " sed 's/# cacert:/cacert:/' >clouds.sh",
    )
    site.succeed("sh clouds.sh", in_guest=True)
    causes: dict[str, Callable[[], object]] = {
        "Not Found (HTTP 404)": lambda: None,
        "Unrecognized schema in response body. (HTTP 400)": lambda: allow("vault"),
        "Service Unavailable (HTTP 503)": lose_the_signer,
        "The request you have made requires authentication. (HTTP 401)": lose_the_role,
        "Unauthorized (HTTP 401)": lambda: change_apache("s/aud:keystone/aud:other/"),
        "You are not authorized to perform the requested action. (HTTP 403)": change_issuer,
    }
    assert set(site.failures(_PAGE)) == set(causes)
    for failure, cause in causes.items():
        again = cause is lose_the_signer
        if not again:
            cause()
        seen = partial(is_seen, failure, cause if again else None)
        until(seen, within_s=30, what=failure)
    # As the page says of the last.
    site.succeed(
        "openstack identity provider delete imds; openstack mapping delete imds; sh mapping.sh",
    )
    until(lambda: PROJECT in _token(site), what="a token again")
    # The role of another project does not help: the token names the guest's own.
    site.have_guest(OTHER_PROJECT)
    until(lambda: "requires authentication" in _token(site), what="the refusal")
