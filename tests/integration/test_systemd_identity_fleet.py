"""The signer's unit of a hub under a real systemd, for a guest of the fleet's only host."""

import json
import re
from collections.abc import Iterator
from typing import Final

import jwt
import pytest

from support.guest import Guest
from support.identity.requests import wait_token
from support.lab import until
from support.systemd_daemon import HUB, HUB_SIGNER, PROGRAM, SIGNER, UnitDaemon, installed

pytestmark = [pytest.mark.root, pytest.mark.slow]

_URL: Final = "https://127.0.0.1:8469"
_ISSUER: Final = "https://127.0.0.1:8443"
_CERTIFICATE: Final = "/etc/imdsproxy/issuer.pem"
_SETTINGS: Final = {
    "hub": {"listen": ["127.0.0.1:8469"]},
    "sources": {"fleet": {"enabled": True}, "sqlite": {"enabled": False}},
    "identity": {
        "enabled": True,
        "issuer": _ISSUER,
        "listen": "127.0.0.1:8443",
        "certificate": _CERTIFICATE,
    },
}
_KEYS: Final = "/var/lib/imdsproxy/identity/keys"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UnitDaemon]:
    """A machine that is a fleet's hub and its only host, made as docs/how-to/fleet.md says."""
    with installed(tmp_path_factory.mktemp("machine")) as daemon:
        machine = daemon.machine
        daemon.plug_in()
        daemon.configure(json.dumps(_SETTINGS))
        words = ("req", "-x509", "-newkey", "rsa:2048", "-noenc", "-subj", "/CN=issuer")
        names = (
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            "/root/key",
            "-out",
            "/root/crt",
        )
        machine.run("openssl", *words, *names)
        machine.run(
            "sh", "-c", f"cat /root/crt /root/key >{_CERTIFICATE}; chmod 600 {_CERTIFICATE}"
        )
        machine.run(
            "systemd-run", "--collect", "--unit=etcd-here", "etcd", "--data-dir=/var/lib/etcd-here"
        )
        machine.run("imdsproxy", "fleet", "init", "--name", "hub1", "--address", "127.0.0.1")
        machine.run("systemctl", "start", HUB_SIGNER, HUB)
        machine.run("sh", "-c", f"imdsproxy fleet enrol a --fleet {_URL} | imdsproxy fleet join")
        machine.run("systemctl", "start", "imdsproxy")
        for guest in daemon.guests:
            _place(daemon, guest)
        _command(daemon, "policy", "set", "fleet", "--audience", "vault")
        yield daemon


def _command(daemon: UnitDaemon, *arguments: str) -> str:
    return daemon.command(*arguments, "--fleet", _URL)


def _place(daemon: UnitDaemon, guest: Guest) -> None:
    name = guest.network
    subnet = ("--subnet", "10.0.0.0/24")
    _command(daemon, "network", "add", name, "--namespace", f"net-{name}", *subnet)
    port = ("-n", name, "--mac", guest.mac, "--address", guest.addresses[0])
    _command(daemon, "instance", "add", name, "--host", "a", *port)


def test_guests_get_tokens_of_the_unit_of_a_hub_s_signer(daemon: UnitDaemon) -> None:
    machine = daemon.machine
    for guest in daemon.guests:
        claims = jwt.decode(wait_token(guest), options={"verify_signature": False})
        assert (claims["iss"], claims["aud"]) == (_ISSUER, "vault")
        assert claims["sub"].endswith(guest.name)
    assert machine.unit(SIGNER, "ActiveState") == "inactive"


def test_only_the_signer_s_account_reads_the_keys_and_it_has_neither_network_nor_rights(
    daemon: UnitDaemon,
) -> None:
    machine = daemon.machine
    pid = machine.main_pid(HUB_SIGNER)
    status = machine.run("cat", f"/proc/{pid}/status")
    owner = machine.run("id", "-u", "imdsproxy-signer")
    assert f"Uid:\t{owner}\t{owner}\t{owner}\t{owner}" in status
    assert all(f"Cap{kind}:\t{'0' * 16}" in status for kind in ("Prm", "Eff", "Amb"))
    links = machine.run("nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-o", "link")
    assert [line.split()[1] for line in links.splitlines()] == ["lo:"]
    assert machine.run("stat", "-c", "%U %a", f"{_KEYS}/seal.key") == "imdsproxy-signer 600"
    for account in ("imdsproxy-hub", "imdsproxy-front", "imdsproxy-identity", "haproxy"):
        read = ("setpriv", f"--reuid={account}", f"--regid={account}", "--clear-groups", "cat")
        refused, words = machine.attempt(*read, f"{_KEYS}/seal.key")
        assert refused, account
        assert words.endswith("Permission denied\n"), (account, words)
    rating = machine.run("systemd-analyze", "security", "--threshold=30", "--no-pager", HUB_SIGNER)
    assert "Overall exposure level" in rating


def test_a_killed_signer_is_started_again_and_the_hub_signs_with_the_same_key(
    daemon: UnitDaemon,
) -> None:
    machine = daemon.machine

    def signs() -> bool:
        check = ("identity", "check", "blue", "--audience", "vault", "--fleet", _URL)
        return (
            re.search(r"^signer +good", machine.attempt(PROGRAM, *check)[1], re.MULTILINE)
            is not None
        )

    def key() -> str:
        keys = json.loads(_command(daemon, "identity", "keys", "--json"))["keys"]
        return str(keys[0]["id"])

    until(signs, within_s=20, what="a hub that signs")
    of_before, before = key(), machine.main_pid(HUB_SIGNER)
    machine.run("kill", "-9", str(before))
    until(lambda: machine.main_pid(HUB_SIGNER) not in {0, before}, within_s=20, what="a new signer")
    until(signs, within_s=20, what="a hub that signs again")
    assert key() == of_before


def test_a_restart_of_the_signer_leaves_the_host_s_state_to_its_accounts(
    daemon: UnitDaemon,
) -> None:
    machine = daemon.machine
    listed = ("sh", "-c", "cd /var/lib/imdsproxy; find . -printf '%p %u:%g %m\\n' | sort")
    before = machine.run(*listed)
    assert ". root:haproxy 750" in before.splitlines()
    # An operator has copied the key of another hub's signer.
    machine.run("chown", "root:root", f"{_KEYS}/seal.key")
    machine.run("systemctl", "restart", HUB_SIGNER)
    assert machine.run(*listed) == before
