"""script/demo --identity: two projects with equal addresses, and each guest proves who it is, without a secret in it.

etcd, hubs, signers, HAProxy, Keystone behind Apache, OpenBao and openstackclient are the genuine programs. Each machine
is a network namespace. The commands that are printed are the ones that are run.
"""

from __future__ import annotations

import http.client
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console

from demo.fleet_operator import DemoError, Operator
from demo.identity_site import AUDIENCES, NETWORKS, Site, Tenant, open_site
from demo.interruption import InterruptError, end_at_signals, ignore_signals
from demo.lines import Line, holds, render_table
from support.guest import Lost
from support.identity.openbao import Refused
from support.identity.requests import claims_of, request_token, wait_token
from support.openstack.servers import NotUp

_PAUSE_S: Final = 0.3
_OK: Final = 200
_READS: Final = "bao kv get, secret of {}"
# `request_token` asserts that the guest gets its session token.
_FAILURES: Final = (
    *(Lost, Refused, OSError, http.client.HTTPException, DemoError, AssertionError),
)


@dataclass(slots=True)
class Prover:
    """Guest that logs in to OpenBao again and again, each time with a token that was signed for it anew.

    Attributes:
        lost: Reason of each login that failed.
        subjects: Names by which the tokens call the guest.
    """

    site: Site
    tenant: Tenant
    logins: int = 0
    lost: list[str] = field(default_factory=list)
    subjects: set[str] = field(default_factory=set)
    longest_s: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_PAUSE_S):
            begun = time.monotonic()
            try:
                self._log_in()
            except _FAILURES as error:
                self.lost.append(str(error))
            self.longest_s = max(self.longest_s, time.monotonic() - begun)

    def _log_in(self) -> None:
        more = (f"X-imdsproxy-nonce: {self.logins}",)
        reply = request_token(self.tenant.guest, "openbao", more=more)
        if reply.status != _OK:
            raise DemoError(f"the request for a token got {reply.status}")
        self.subjects.add(str(claims_of(reply.text)["sub"]))
        if (secret := self.site.log_in(self.tenant, reply.text)) != self.tenant.password:
            raise DemoError(f"OpenBao gave the secret {secret}")
        self.logins += 1


@dataclass(slots=True)
class Demonstration:
    """One run.

    Attributes:
        lines: Of the table, as they become known.
    """

    site: Site
    operator: Operator
    lines: list[Line] = field(default_factory=list)

    def run(self) -> bool:
        """Run all of it; return whether each line of the table holds."""
        say = self.operator.say
        say("Two hosts join, each with the networks blue and red, whose addresses are the same")
        for name in ("a", "b"):
            self.site.add_host(name)
        say("Two projects, each with one guest, both at 10.0.0.5 on host a; no guest has a secret")
        shop = self.site.add_tenant("shop", "web", "blue", "a")
        bank = self.site.add_tenant("bank", "db", "red", "a")
        self.site.admit(shop, bank)
        self._store(shop, bank)
        say("All that web has, and db likewise: clouds.yaml, and a script that reads a secret")
        for text in self.site.show_files(shop):
            self._quote(text)
        provers = [Prover(self.site, one) for one in (shop, bank)]
        for prover in provers:
            prover.start()
        try:
            say("Each guest logs in to Keystone and OpenBao, then tries the other's project")
            self._log_in(shop, bank)
            self._log_in(bank, shop)
            self._disturb(shop)
        finally:
            for prover in provers:
                prover.end()
        for prover in provers:
            self._count(prover)
        self.operator.console.print()
        self.operator.console.print(render_table(self.lines))
        return holds(self.lines)

    def _store(self, *tenants: Tenant) -> None:
        audiences = " ".join(f"--audience {name}" for name in AUDIENCES)
        for network in NETWORKS:
            self.operator.imdsproxy(f"network add {network} --bridge {network}")
        for tenant in tenants:
            self.operator.imdsproxy(f"policy set project/{tenant.project} {audiences}")
            guest = tenant.guest
            self.operator.imdsproxy(
                f"instance add {tenant.instance} --host {tenant.hosts[0]} --project {tenant.project} "
                f"-n {guest.network} --mac {guest.mac} --address {guest.addresses[0]}"
            )
        for tenant in tenants:
            wait_token(tenant.guest, "openbao", project_id=tenant.project)

    def _log_in(self, own: Tenant, other: Tenant) -> None:
        self._issue_token(own, own)
        self._add(own, _READS.format(own.name), self.site.read_secret(own, own), own.password)
        self._issue_token(own, other)
        answer = self.site.read_secret(own, other)
        self._add(own, _READS.format(other.name), answer, "refused: Code: 403")

    def _issue_token(self, own: Tenant, wanted: Tenant) -> None:
        what = f"openstack token issue, project {wanted.name}"
        right = f"a token of {own.name}" if own is wanted else "refused: HTTP 401"
        self._add(own, what, self.site.issue_token(own, wanted), right)

    def _disturb(self, moving: Tenant) -> None:
        hub, say = self.site.world.hubs[0], self.operator.say
        self._request_as_host(moving, "a token")
        say(f"{hub.name} and its signer are killed, while each guest logs in with new tokens")
        self.site.signers.kill(hub.name)
        hub.end(signal.SIGKILL)
        say(f"{moving.instance} moves from a to b")
        self.operator.imdsproxy(f"instance move {moving.instance} --to b")
        self.site.migrate(moving, "b")
        self.operator.imdsproxy(f"instance move {moving.instance} --finish")
        say("The guest goes on where it is now; the host that it left can speak for it no more")
        self._issue_token(moving, moving)
        self._request_as_host(moving, "refused: subject")

    def _request_as_host(self, tenant: Tenant, right: str) -> None:
        """Request a guest's token of a hub as one who has captured host a."""
        what = f"requests a token of {tenant.instance}, which is on {tenant.hosts[-1]}"
        answer = self.site.request_as_host("a", tenant)
        self.lines.append(Line("host a", "a", what, answer, right))

    def _count(self, prover: Prover) -> None:
        tenant, where = prover.tenant, " → ".join(prover.tenant.hosts)
        answer = (
            f"{prover.logins} logins, {len(prover.lost)} lost, "
            f"{len(prover.subjects)} subject, longest {prover.longest_s * 1000:.0f} ms"
        )
        right = r"[1-9]\d* logins, 0 lost, 1 subject, .*"
        self._add(tenant, "all the while, a new token for each login", answer, right, where)
        for reason in prover.lost:
            self.operator.console.print(f"    {reason}", style="red", markup=False)

    def _add(self, tenant: Tenant, what: str, answer: str, right: str, where: str = "") -> None:
        who = f"{tenant.instance} of {tenant.name}"
        line = Line(who, where or tenant.hosts[-1], what, answer, right)
        self.lines.append(line)
        self.operator.console.print(f"  {who}: {what}: {answer}", markup=False, highlight=False)

    def _quote(self, text: str) -> None:
        for shown in text.strip().splitlines():
            self.operator.console.print(f"    {shown}", style="dim", highlight=False, markup=False)


def main(words: Sequence[str]) -> int:
    """Run it; return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    if words:
        console.print("script/demo: --identity goes with no other option", style="red")
        return 2
    end_at_signals()
    console.print(
        "etcd of three members, two hubs, each with a signer; Keystone and OpenBao trust them",
        style="bold",
    )
    try:
        with (
            tempfile.TemporaryDirectory(prefix="imdst-demo-") as made,
            open_site(Path(made)) as site,
        ):
            good = Demonstration(site, Operator(site.world, console)).run()
            ignore_signals()
    except (DemoError, NotUp) as error:
        console.print(f"script/demo: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except InterruptError as interrupted:
        return interrupted.exit_status
    console.print()
    words_of = "Each guest proved who it is, and nobody else did." if good else "A line is wrong."
    console.print(words_of, style="green" if good else "red")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
