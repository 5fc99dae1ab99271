"""The doctor on a genuine Nova, asked as its proxy asks."""

from __future__ import annotations

import hashlib
import hmac

from imdsproxy.cli.doctor import parse_url
from imdsproxy.core.doctor import Severity, Surroundings
from imdsproxy.core.doctor.checks_documents import examine
from imdsproxy.core.doctor.crawl import crawl
from imdsproxy.core.model import Dialect
from support.openstack.lab import OpenStack


def test_novas_own_faults_are_found(openstack: OpenStack) -> None:
    instance = next(iter(openstack.instances.values()))
    signature = hmac.new(openstack.secret.encode(), instance.uuid.encode(), hashlib.sha256)
    headers = [
        f"X-Instance-ID: {instance.uuid}",
        f"X-Tenant-ID: {instance.project_id}",
        f"X-Instance-ID-Signature: {signature.hexdigest()}",
        "X-Forwarded-For: 10.0.0.5",
    ]

    done = crawl(parse_url(openstack.nova_url, headers), direct=True)
    findings = {one.code: one for one in examine(done, Surroundings())}

    assert Dialect.OPENSTACK in done.served
    assert Dialect.EC2 in done.served
    # An error page is no token, and a path below a leaf is an exception in Nova. Its first answer may be slow.
    odd = findings.pop("no-answer", None) or findings.pop("server-error")
    assert odd.paths == ("/latest/meta-data/instance-id/x",)
    assert findings.pop("token-error-body").severity is Severity.WARNING
    assert set(findings) <= {"slow"}
