"""Session tokens (IMDSv2), and answers that make a client believe in another cloud."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from imdsproxy.core.doctor.crawl import GOOGLE, TOKEN, TTL_HEADER, Crawl
from imdsproxy.core.doctor.exchange import Answer
from imdsproxy.core.doctor.finding import Finding, Severity
from imdsproxy.core.model import Dialect

_NOT_FOUND: Final = 404
_UNAUTHORIZED: Final = (401, 403)
_TURN_OFF: Final = (
    "while there are no tokens, answer PUT /latest/api/token with 404 and an empty body"
)
_REFUSING: Final[dict[int, tuple[str, ...]]] = {
    400: ("botocore, AWS CLI, awscrt, the SDKs for Go, Node and Ruby: no documents at all",),
    403: (
        "cloud-init on a guest that looks like Amazon's: stays without",
        "Ansible's ec2_metadata_facts",
        "Ruby's Aws::EC2Metadata",
    ),
}
_REFUSING_ELSE: Final = ("Ohai", "Ansible's ec2_metadata_facts", "Ignition (aws): the boot fails")


def check_tokens(crawl: Crawl) -> Iterator[Finding]:
    """How the token route answers, whom tokens keep out, and Google's mark."""
    answer = crawl.said(TOKEN)
    if answer is not None and (crawl.serves(Dialect.EC2) or answer.status != _NOT_FOUND):
        yield from _granted(answer) if answer.ok else _refused(answer)
    yield from _required(crawl)
    yield from _google(crawl)
    yield from _foreign(crawl)


def _granted(answer: Answer) -> Iterator[Finding]:
    token = answer.text
    paths = (TOKEN.path,)
    if not token.strip():
        yield Finding(
            "token-empty",
            Severity.ERROR,
            "a token request is answered 200 with nothing in it",
            _TURN_OFF,
            ("botocore", "AsyncAws", "s3cmd", "the SDKs for Node and Ruby"),
            paths,
        )
        return
    if not token.isprintable() or " " in token:
        yield Finding(
            "token-form",
            Severity.ERROR,
            "the token is not one line of printable characters",
            "send the token alone, without a newline: clients put the body into a header",
            ("every client that sends tokens",),
            paths,
        )
    if answer.header(TTL_HEADER) is None:
        yield Finding(
            "token-ttl-missing",
            Severity.ERROR,
            "the token's answer does not say how long it is good for",
            f"repeat {TTL_HEADER} in the answer",
            ("AWS SDKs for Go v1 and v2 (rclone, restic)", "AWS SDK for Ruby"),
            paths,
        )


def _refused(answer: Answer) -> Iterator[Finding]:
    paths = (TOKEN.path,)
    if answer.status != _NOT_FOUND:
        yield Finding(
            "token-refused",
            Severity.ERROR,
            f"a token request is answered {answer.status}",
            _TURN_OFF,
            _REFUSING.get(answer.status, _REFUSING_ELSE),
            paths,
        )
    elif "\n" in answer.text.strip("\n") or answer.body.endswith(b"\n"):
        yield Finding(
            "token-error-body",
            Severity.WARNING,
            "the 404 of the token route has a body of several lines",
            _TURN_OFF,
            ("elastic-apm and cloud-detect, which put the body into a header",),
            paths,
        )


def _required(crawl: Crawl) -> Iterator[Finding]:
    openstack = crawl.said("/openstack")
    if openstack is not None and openstack.status in _UNAUTHORIZED:
        yield Finding(
            "openstack-refused",
            Severity.ERROR,
            f"/openstack is answered {openstack.status}",
            "ask no token for the OpenStack documents: none of their clients sends one",
            (
                "cloud-init, which looks once",
                "cloudbase-init",
                "Ignition, which then waits for ever",
            ),
            ("/openstack",),
        )
    if crawl.token:
        yield Finding(
            "token-required",
            Severity.NOTE,
            "the EC2 documents are given only to who sends a token",
            "leave them optional where such clients boot",
            ("cloudbase-init's EC2", "os-collect-config", "curl recipes"),
        )


def _google(crawl: Crawl) -> Iterator[Finding]:
    answer = crawl.said(GOOGLE)
    if answer is not None and (answer.header("metadata-flavor") or "").lower() == "google":
        yield Finding(
            "google-flavor",
            Severity.ERROR,
            "answers carry Metadata-Flavor: Google",
            "do not send that header",
            ("google-auth and all that uses it: they believe that this is Google's cloud",),
            (GOOGLE.path,),
        )


def _foreign(crawl: Crawl) -> Iterator[Finding]:
    for prefix, name, clients in (
        ("/computeMetadata/", "Google's", "google-auth, gcp-metadata"),
        ("/metadata/instance", "Azure's", "Azure SDKs"),
    ):
        there = [
            ask.path for ask, answer in crawl.answers() if ask.path.startswith(prefix) and answer.ok
        ]
        if there:
            yield Finding(
                "foreign-cloud",
                Severity.WARNING,
                f"{name} documents are answered",
                "answer what is not served with 404",
                (clients,),
                tuple(there),
            )
